"""A tiny backbone in every mode, with the untouched model that its reference must equal."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tiny
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from fastrlhf.backbone import LoraSettings, SharedBackbone
from fastrlhf.heads import LanguageModelHead
from fastrlhf.pretrained import find_pretrained
from fastrlhf.quantization import loading_options
from fastrlhf.trunk import WholeDecoder, split_decoder
from fastrlhf_kernels import linear_logprobs

TOKENS = torch.tensor([[0, 0, 5, 9, 3, 7, 2], [4, 8, 1, 2, 9, 6, 11], [3, 1, 6, 6, 0, 0, 0]])
MASK = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7, [1, 1, 1, 1, 0, 0, 0]], dtype=torch.bool)
FOLLOWED = MASK[:, :-1] & MASK[:, 1:]  # positions whose next token is real


# Rows of whole blocks: others bitsandbytes' own forward gets wrong on a CPU.
WIDE = {"hidden_size": 64, "num_hidden_layers": 4, "initializer_range": 0.2}


@dataclass(frozen=True)
class Mode:
    settings: dict[str, Any]
    tied: bool = True
    split: int | None = 2  # None: entered with the tokens
    starts_as_reference: bool = True
    reference: dict[str, Any] = field(default_factory=dict)  # how the untouched model is loaded
    adapter: bool = False


LORA = LoraSettings(rank=4)
MODES = {
    "lora_all": Mode({"lora": LORA}, split=0),
    "lora_top": Mode({"lora": LORA, "train_layers": 2}),
    "hydra": Mode({"lora": None, "train_layers": 2}),
    "hydra_untied": Mode({"lora": None, "train_layers": 2}, tied=False),
    "full": Mode({"lora": None}, split=None),
    "full_untied": Mode({"lora": None}, split=None, tied=False),
    "full_int8": Mode({"lora": None, "reference_quantization": "int8"}, True, None, False,
                      {"quantization": "int8"}),
    "full_nf4": Mode({"lora": None, "reference_quantization": "nf4"}, True, None, False,
                     {"quantization": "nf4"}),
    "int8": Mode({"lora": LORA, "train_layers": 2, "quantization": "int8"},
                 reference={"quantization": "int8"}),
    "nf4": Mode({"lora": LORA, "train_layers": 2, "quantization": "nf4"},
                reference={"quantization": "nf4"}),
    "adapter": Mode({"lora": LORA, "train_layers": 2}, adapter=True),
}  # fmt: skip


class Scene:
    """Folders of a tiny model, tied and not, and of an adapter for it."""

    def __init__(self, path: Path):
        self.folders = {tied: path / ("tied" if tied else "untied") for tied in (True, False)}
        for tied, folder in self.folders.items():
            tiny.model(tie_word_embeddings=tied, **WIDE).save_pretrained(folder)
            tiny.tokenizer().save_pretrained(folder)
        self.adapter = make_adapter(path / "adapter", tiny.model(**WIDE))

    def backbone(
        self, mode: Mode, dtype: torch.dtype = torch.float32, **settings: Any
    ) -> SharedBackbone:
        torch.manual_seed(0)
        if mode.adapter:
            settings["adapter"] = self.adapter
        folder = str(self.folders[mode.tied])
        return SharedBackbone.from_pretrained(folder, dtype=dtype, **mode.settings | settings)

    def untouched(self, mode: Mode, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        found = find_pretrained(str(self.folders[mode.tied]))
        model = found.load(dtype=dtype, **mode.reference)
        return adapted(model, self.adapter) if mode.adapter else model

    def of_transformers(self, mode: Mode) -> Tensor:
        """The reference's log-probabilities by transformers' own forward, bitsandbytes' too."""
        options = {"dtype": torch.float32}
        if mode.reference:
            kind = mode.reference["quantization"]
            options |= loading_options(kind, device="cpu", dtype=torch.float32)
        model = AutoModelForCausalLM.from_pretrained(self.folders[mode.tied], **options)
        if mode.adapter:
            model = adapted(model, self.adapter)
        # In training bitsandbytes neither repacks weights nor rounds activations; no dropout here.
        model.train()
        positions = (MASK.long().cumsum(-1) - 1).clamp_min(0)
        with torch.no_grad():
            logits = model(TOKENS, attention_mask=MASK, position_ids=positions).logits
        picked = logits.log_softmax(-1)[:, :-1].gather(-1, TOKENS[:, 1:, None])[..., 0]
        return picked[FOLLOWED]


def make_adapter(folder: Path, model: PreTrainedModel, **changes: Any) -> Path:
    """An adapter as PEFT saves it, whose second matrices are not zero."""
    settings: dict[str, Any] = {
        "r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "up_proj"],
        "layers_to_transform": [2, 3], "task_type": "CAUSAL_LM",
    }  # fmt: skip
    torch.manual_seed(7)
    peft = get_peft_model(model, LoraConfig(**settings | changes))
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.2)
    peft.save_pretrained(str(folder), save_embedding_layers=False)
    return folder


def adapted(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    return PeftModel.from_pretrained(model, str(folder)).eval().get_base_model()


def logprobs(hidden: Tensor, head: LanguageModelHead) -> Tensor:
    """Of the tokens that follow, through the fused op, [n]."""
    return linear_logprobs(
        hidden[:, :-1][FOLLOWED], head.weight, TOKENS[:, 1:][FOLLOWED], bias=head.bias,
        logit_scale=head.logit_scale, softcap=head.softcap,
    ).logprobs  # fmt: skip


def of_role(backbone: SharedBackbone, role: str) -> Tensor:
    """A role's log-probabilities; as the policy with a gradient."""
    head = backbone.reference_head if role == "reference" else backbone.head
    return logprobs(backbone.hidden(role, backbone.trunk(TOKENS, MASK), MASK), head)


def of_model(model: PreTrainedModel, split: int | None) -> Tensor:
    """Those of a plain model, entered as the mode enters it."""
    decoder = model.get_decoder()
    halves = WholeDecoder(decoder) if split is None else split_decoder(decoder, split)
    with torch.no_grad():
        hidden = halves.top(halves.trunk(TOKENS, MASK), MASK)
        return logprobs(hidden, LanguageModelHead.of(model))


def loss(backbone: SharedBackbone) -> Tensor:
    """One that every trained weight of policy and critic is part of."""
    trunk = backbone.trunk(TOKENS, MASK)
    hidden = backbone.hidden("policy", trunk, MASK)
    total = logprobs(hidden, backbone.head).float().square().sum()
    if backbone.critic:
        total = total + (backbone.values(hidden, trunk, MASK)[MASK] - 1).square().sum()
    return total


def train(backbone: SharedBackbone, loss: Callable[[SharedBackbone], Tensor] = loss) -> None:
    """Three steps that visibly change what trains."""
    optimizer = torch.optim.SGD(backbone.trainable(), lr=1e-3)
    for _ in range(3):
        loss(backbone).backward()
        torch.nn.utils.clip_grad_norm_(backbone.trainable(), 100.0)
        optimizer.step()
        optimizer.zero_grad()
