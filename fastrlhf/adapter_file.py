"""A LoRA adapter on disk in PEFT's format, checked against the model before that is changed.

Only plain LoRA on the decoder's layers is taken: what else PEFT can save (other methods, trained
biases, whole modules, starts that rewrite the base) would make a reference that is not the base
with this adapter. Weights are read from safetensors alone; pickled ones could run code.
"""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from pathlib import Path

from peft import LoraConfig
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from .errors import UserError

__all__ = ["AdapterFile"]

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
# Starts of LoRA that leave the base as it is.
PLAIN_STARTS = (True, False, "gaussian", "orthogonal", "eva")


@dataclass(frozen=True)
class AdapterFile:
    """A plain LoRA adapter that was read."""

    folder: Path
    config: LoraConfig
    state: dict[str, Tensor]

    @classmethod
    def read(cls, folder: str | Path, model: PreTrainedModel, first_layer: int) -> AdapterFile:
        """Read the adapter in ``folder`` for the layers of ``model`` from ``first_layer`` on.

        Raises:
            UserError: no adapter there, one of another kind, or one that fits another model.
        """
        file = cls.open(folder)
        check_fit(file.folder, file.config, file.state, model, first_layer)
        return file

    @classmethod
    def open(cls, folder: str | Path) -> AdapterFile:
        """Read the adapter in ``folder``, whatever model it is for.

        Raises:
            UserError: no adapter there, or one of another kind.
        """
        folder = Path(folder)
        for name in (CONFIG, WEIGHTS):
            if not (folder / name).is_file():
                raise UserError(f"adapter {folder} holds no {name}: give a folder written by PEFT")
        try:
            kind = json.loads((folder / CONFIG).read_text())["peft_type"]
            # PEFT warns about settings of other kinds, which are refused in a sentence below.
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                config = LoraConfig.from_pretrained(str(folder))
            state = load_file(folder / WEIGHTS)
        except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"adapter {folder} cannot be read ({reason}): give a folder written by PEFT"
            ) from error
        check_kind(folder, kind, config)
        config.inference_mode, config.lora_dropout = False, 0.0
        return cls(folder, config, state)


def check_kind(folder: Path, kind: str, config: LoraConfig) -> None:
    if kind != "LORA":
        raise UserError(f"adapter {folder} has {kind}; give a plain LoRA adapter")
    other = {
        "DoRA": config.use_dora,
        "layer_replication": config.layer_replication,
        f"bias={config.bias!r}": config.bias != "none",
        "modules_to_save": config.modules_to_save,
        f"init_lora_weights={config.init_lora_weights!r}": (
            config.init_lora_weights not in PLAIN_STARTS
        ),
    }
    if found := [name for name, there in other.items() if there]:
        raise UserError(f"adapter {folder} has {found[0]}; give a plain LoRA adapter")


def check_fit(
    folder: Path,
    config: LoraConfig,
    state: dict[str, Tensor],
    model: PreTrainedModel,
    first_layer: int,
) -> None:
    made_for, given = config.base_model_name_or_path or "", model.config._name_or_path
    names = f"the adapter in {folder} was made for {made_for or 'another model'}"

    def refuse(reason: str) -> UserError:
        ours = given or f"this {model.config.model_type} model"
        return UserError(f"{names}, not for {ours}: {reason}; give one of the two that fits")

    modules = dict(model.named_modules())
    layers: set[int] = set()
    for key, weight in state.items():
        path, _, matrix = key.removeprefix(PREFIX).removesuffix(".weight").rpartition(".")
        if matrix not in ("lora_A", "lora_B"):
            raise refuse(f"it has a weight {key}")
        if path not in modules:
            raise refuse(f"the model has no {path}")
        linear = modules[path]
        side = 1 if matrix == "lora_A" else 0
        if weight.ndim != 2 or weight.shape[side] != width(linear, side):
            raise refuse(
                f"{path} is {width(linear, 1)} to {width(linear, 0)} wide, and {matrix} is "
                f"{' × '.join(map(str, weight.shape))}"
            )
        rank = rank_of(config, path)
        if weight.shape[1 - side] != rank:
            raise UserError(
                f"the adapter in {folder} is not whole: {matrix} of {path} has rank "
                f"{weight.shape[1 - side]}, and its adapter_config.json says {rank}; save it again "
                "with PEFT"
            )
        index = [int(part) for part in path.split(".") if part.isdigit()]
        if not index:
            raise refuse(f"{path} is in none of the decoder's layers")
        layers.add(index[0])
    if not layers:
        raise refuse("it holds no weights")
    if min(layers) < first_layer:
        depth = model.config.get_text_config().num_hidden_layers
        raise UserError(
            f"the adapter in {folder} begins at layer {min(layers)} of {depth}, below the trained "
            f"ones; set train_layers to {depth - min(layers)} or 'all'"
        )
    if is_hub_name(made_for) and is_hub_name(given) and last_part(made_for) != last_part(given):
        # Renamed copies and later versions fit as well; shapes cannot tell them from strangers.
        warnings.warn(
            f"{names}, and this is {given}: the shapes fit, but on other weights an adapter says "
            "nothing of use",
            stacklevel=2,
        )


def rank_of(config: LoraConfig, path: str) -> int:
    """The rank that PEFT gives to the adapter of the linear layer at ``path``."""
    patterns = config.rank_pattern or {}
    return patterns.get(get_pattern_key(list(patterns), path), config.r)


def is_hub_name(name: str) -> bool:
    return name.count("/") == 1 and name[0] not in "./~" and not Path(name).exists()


def last_part(name: str) -> str:
    return name.rpartition("/")[2].lower()


def width(linear: nn.Module, side: int) -> int:
    """Outputs (side 0) or inputs (side 1) of a linear layer, however its weight is stored."""
    # One that carries an adapter already is within a wrapper.
    linear = getattr(linear, "base_layer", linear)
    if isinstance(linear, nn.Linear):
        return (linear.out_features, linear.in_features)[side]
    weight = getattr(linear, "weight", None)  # transformers' Conv1D, [in, out]
    return -1 if weight is None else weight.shape[1 - side]
