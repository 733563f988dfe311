"""Reward models as rewards: the backbone's reward role, its folder, and classifiers of others.

A `RewardModel` scores the text of prompt and completion, tokenised together and without an
end-of-sequence token, at its last token (docs/math.md, 5.8). Its folder is an adapter in PEFT's
format with a `score` layer, which transformers loads too:

    AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)

Those logits are its scores less `bias` of the folder's reward.json: transformers' classifiers have
none. The bias and the layer's scale are such that scores have mean 0 and deviation 1 on the
training's texts (docs/math.md, 5.7).
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..adapter_file import CONFIG, PREFIX, WEIGHTS, AdapterFile, check_fit
from ..adapters import LoraSettings
from ..backbone import SharedBackbone
from ..checkpoint import in_place
from ..data import text_ids
from ..errors import UserError
from ..heads import RewardHead
from ..identity import sampled
from ..pretrained import PACKAGED, Pretrained, find_pretrained
from ..text_states import TextStates

__all__ = [
    "RewardModel",
    "fingerprint",
    "folder_name",
    "is_reward_model",
    "same_base",
    "save_reward_model",
]

FACTS = "reward.json"
SCORE = f"{PREFIX}score.weight"


@torch.no_grad()
def fingerprint(backbone: SharedBackbone) -> dict[str, str | None]:
    """Tells one base from another: of some numbers of every frozen weight, in bfloat16.

    The layers' matrices have one of their own, None where they are quantised. The output head is
    not in it: rewards are not computed with it, and it may train.
    """
    model = backbone.adapters.model
    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    embeddings = {id(p) for p in inputs.parameters()}
    output = {id(p) for p in outputs.parameters()} - embeddings
    digests = {"matrices": hashlib.sha256(), "rest": hashlib.sha256()}
    quantized = False
    with backbone.base.placed(originals=True):
        named = {n.replace(".base_layer.", "."): p for n, p in model.named_parameters()}
        for name, p in sorted(named.items()):
            if "lora_" in name or id(p) in output:
                continue
            kind = "matrices" if p.ndim > 1 and id(p) not in embeddings else "rest"
            quantized |= not p.is_floating_point()
            numbers = sampled(p).to("cpu", torch.bfloat16).view(torch.uint8).numpy().tobytes()
            digests[kind].update(name.encode() + numbers)
    found: dict[str, str | None] = {k: d.hexdigest()[:16] for k, d in digests.items()}
    return found | ({"matrices": None} if quantized else {})


def same_base(ours: dict[str, str | None], kept: Any) -> bool:
    """Whether two fingerprints are of one base, as far as both tell."""
    if not isinstance(kept, dict):
        return False
    matrices = {ours["matrices"], kept.get("matrices")} - {None}
    return ours["rest"] == kept.get("rest") and len(matrices) < 2


def is_reward_model(folder: str | Path) -> bool:
    """Whether ``folder`` is one that `save_reward_model` wrote."""
    return (Path(folder) / FACTS).is_file()


def folder_name(folder: str | Path) -> str:
    """What a reward model is called: all runs' own folders of it are called `model`."""
    path = Path(folder).absolute()
    return path.parent.name if path.name == "model" and path.parent.name else path.name


def save_reward_model(
    backbone: SharedBackbone, folder: Path, base: str, facts: dict[str, Any]
) -> Path:
    """Write the reward role to ``folder``, in PEFT's format for sequence classification.

    Args:
        base: where the base model is loaded from.
        facts: kept in its reward.json: what the model was trained on and how good it is.
    """
    head = backbone.reward_head
    assert head is not None
    facts = {
        "bias": float(head.linear.bias),
        "base": base,
        "base_fingerprint": fingerprint(backbone),
        **facts,
    }
    with in_place(folder) as made:
        write_adapter(backbone, made, base, head)
        (made / FACTS).write_text(json.dumps(facts, indent=2))
        if backbone.tokenizer is not None:
            backbone.tokenizer.save_pretrained(made)
    return folder


def write_adapter(backbone: SharedBackbone, folder: Path, base: str, head: RewardHead) -> None:
    (name,) = backbone.roles["reward"]
    backbone.adapters.save(folder, [name])
    # PEFT writes an adapter that is not the default one to a folder of its name.
    for path in (folder / name).iterdir():
        path.rename(folder / path.name)
    (folder / name).rmdir()
    state = load_file(folder / WEIGHTS)
    state[SCORE] = head.linear.weight.detach().cpu().contiguous()
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
    config = json.loads((folder / CONFIG).read_text())
    config |= {
        "task_type": "SEQ_CLS",
        "modules_to_save": ["classifier", "score"],
        "base_model_name_or_path": base,
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=2))


class RewardFile:
    """A reward model on disk, read but not on a model yet."""

    def __init__(self, folder: str | Path):
        self.folder = folder = Path(folder)
        try:
            self.facts = json.loads((folder / FACTS).read_text())
            self.state = load_file(folder / WEIGHTS)
            self.score = self.state.pop(SCORE)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.config = LoraConfig.from_pretrained(str(folder))
            self.bias, self.base = float(self.facts["bias"]), str(self.facts["base"])
        except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"the reward model in {folder} cannot be read ({reason}): give a folder that "
                "`fastrlhf reward` wrote"
            ) from error
        # As an adapter on the shared backbone it is plain LoRA: the score layer is the head.
        self.config.modules_to_save, self.config.task_type = None, "CAUSAL_LM"
        self.config.inference_mode = False

    @property
    def layers(self) -> list[int]:
        """The decoder's layers that carry the adapter."""
        found = self.config.layers_to_transform
        return [found] if isinstance(found, int) else sorted(found or [])

    def check_base(self, backbone: SharedBackbone) -> None:
        """Refuse a model on which this reward model was not trained."""
        if not same_base(fingerprint(backbone), self.facts.get("base_fingerprint")):
            model = backbone.model
            ours = model.config._name_or_path or f"this {model.config.model_type} model"
            raise UserError(
                f"the reward model in {self.folder} was trained on {self.base}, not on {ours}, so "
                "they cannot share a backbone; set reward_backbone: own, or give one of that base"
            )

    def adapter(self, backbone: SharedBackbone, first_layer: int) -> AdapterFile:
        """Its adapter, checked against the model of ``backbone``."""
        self.check_base(backbone)
        check_fit(self.folder, self.config, self.state, backbone.model, first_layer)
        return AdapterFile(self.folder, self.config, self.state)

    def fill(self, head: RewardHead) -> None:
        """Give the head its weights."""
        with torch.no_grad():
            head.linear.weight.copy_(self.score)
            head.linear.bias.fill_(self.bias)


class RewardModel:
    """A trained reward role as a reward function: text in, one normalised score each out.

    Args:
        backbone: has a reward role. None: it is loaded from the file's base on first use, unless
            `share` gives one before.
        file: the folder's contents, for messages and for what was not loaded yet.
    """

    def __init__(
        self,
        backbone: SharedBackbone | None = None,
        tokenizer: Any = None,
        *,
        file: RewardFile | None = None,
        microbatch_tokens: int = 2048,
    ):
        self.backbone = backbone
        self.tokenizer: Any = tokenizer or getattr(backbone, "tokenizer", None)
        self.file = file
        self.microbatch_tokens = microbatch_tokens
        self.__name__ = "reward_model" if file is None else folder_name(file.folder)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> RewardModel:
        """The reward model in ``folder``; its base is loaded on first use, or shared.

        Raises:
            UserError: a folder that holds none, or half of one.
        """
        return cls(file=RewardFile(folder))

    def share(self, backbone: SharedBackbone, tokenizer: Any) -> None:
        """Become a role of a policy's backbone: no second copy of the base.

        Raises:
            UserError: another base, or a policy whose trained layers are not adapters or begin
                above this model's.
        """
        if self.file is None or self.backbone is not None:
            return  # it has a backbone already
        if "reward" in backbone.roles:
            raise UserError(
                "one reward model shares the policy's backbone already; for another one leave "
                "reward_backbone at auto"
            )
        if backbone.lora is None:
            raise UserError(
                "a reward model shares the backbone of a policy that trains adapters; set "
                "use_peft: true, or reward_backbone: own"
            )
        depth = backbone.decoder.config.num_hidden_layers
        adapter = self.file.adapter(backbone, depth - backbone.top)
        backbone.adapters.load("reward", adapter)
        backbone.roles["reward"] = ("reward",)
        head = RewardHead(backbone.decoder.config.hidden_size).to(backbone.device)
        self.file.fill(head)
        backbone.reward_head = head
        # What was added is frozen; what trained before trains on.
        backbone.train_roles(*backbone.trained_roles)
        backbone.to(backbone.device)
        self.backbone, self.tokenizer = backbone, tokenizer

    def load(self) -> SharedBackbone:
        """Its own base, loaded on first use."""
        if self.backbone is None:
            assert self.file is not None
            base = self.file.base
            if Path(base).name == PACKAGED and not Path(base).is_dir():
                base = PACKAGED  # the folder was written on another machine
            remote = bool(self.file.facts.get("trust_remote_code"))
            found = find_pretrained(base, trust_remote_code=remote)
            self.backbone = load_reward_backbone(self.file, found)
            self.tokenizer = found.tokenizer
        return self.backbone

    def __call__(
        self, prompts: Sequence[str], completions: Sequence[str], **_: object
    ) -> list[float]:
        texts = [prompt + text for prompt, text in zip(prompts, completions, strict=True)]
        return self.scores(texts).tolist()

    def scores(self, texts: Sequence[str]) -> Tensor:
        """Of whole texts, [n] float32."""
        backbone = self.load()
        tokens = [text_ids(text, self.tokenizer) for text in texts]
        for number, (ids, text) in enumerate(zip(tokens, texts, strict=True), start=1):
            if not ids:
                raise UserError(f"text {number} is empty ({text!r}); a reward model needs a token")
        states = TextStates(backbone, tokens, budget_mb=0, microbatch_tokens=self.microbatch_tokens)
        return states.all_scores()

    def normalize(self, scores: Tensor) -> None:
        """Shift and scale the reward so that these scores of its own, [n], get mean 0, std 1."""
        normalize_head(self.load(), scores)


@torch.no_grad()
def normalize_head(backbone: SharedBackbone, scores: Tensor) -> None:
    """Change the head so that what it scored ``scores`` ([n]) gets mean 0 and deviation 1."""
    head = backbone.reward_head
    assert head is not None
    std = scores.std()
    if not float(std) > 0:
        raise UserError("every reference text has the same reward; train for longer")
    head.linear.weight.div_(std)
    head.linear.bias.sub_(scores.mean()).div_(std)


def load_reward_backbone(file: RewardFile, found: Pretrained) -> SharedBackbone:
    """A backbone that has the reward role alone."""
    depth = found.config.get_text_config().num_hidden_layers
    device = "cuda" if torch.cuda.is_available() else "cpu"
    first = min(file.layers) if file.layers else 0
    backbone = SharedBackbone.load(
        found,
        device=device,
        lora=LoraSettings(file.config.r, float(file.config.lora_alpha)),
        train_layers=depth - first,
        critic=None,
        reward=True,
        reference=False,
        tokenizer=found.tokenizer,
    )
    adapter = file.adapter(backbone, first)
    assert backbone.adapters.peft is not None and backbone.reward_head is not None
    set_peft_model_state_dict(backbone.adapters.peft, adapter.state, adapter_name="reward")
    file.fill(backbone.reward_head)
    return backbone
