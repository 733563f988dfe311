"""What a model does to its logits after the output layer: softcap(scale · (W h + b)).

Families declare scale and cap in their configurations under many names, and one that is missed
would give logits that are wrong without a sign. So the model's own code is asked for one row, with
a decoder that returns what it is told, and any other answer is refused.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import MoeModelOutputWithPast

from .errors import UserError

__all__ = ["declared_scale", "declared_softcap", "refuse_other_logits"]

# logit_scale: Cohere. lm_head_multiplier: Falcon-H1. output_multiplier: Muse.
MULTIPLIES = ("logit_scale", "lm_head_multiplier", "output_multiplier")
# logits_scaling: Granite and MiniCPM3. logits_mup_width_multiplier: Inkling.
DIVIDES = ("logits_scaling", "logits_mup_width_multiplier")
# final_logit_softcapping: Gemma 2 and later. The others: RecurrentGemma, xLSTM.
CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")

# What transformers does otherwise than the name says.
MULTIPLIES_ALL_THE_SAME = {"hyperclovax": "logits_scaling"}
IGNORES = {"mpt": "logit_scale"}


def declared_scale(config: PretrainedConfig) -> float:
    """What the logits are multiplied with, by the name that the configuration has for it."""
    config = config.get_text_config()
    kind = config.model_type
    for name in (*MULTIPLIES, *DIVIDES):
        value = getattr(config, name, None)
        if value is not None and IGNORES.get(kind) != name:
            multiplies = name in MULTIPLIES or MULTIPLIES_ALL_THE_SAME.get(kind) == name
            return value if multiplies else 1.0 / value
    # The first MiniCPM, whose code is not in transformers.
    base = getattr(config, "dim_model_base", None)
    return 1.0 if base is None else base / config.hidden_size


def declared_softcap(config: PretrainedConfig) -> float | None:
    """The c of c·tanh(logits / c); None where the logits are not capped."""
    config = config.get_text_config()
    caps = (getattr(config, name, None) for name in CAPS)
    return next((cap for cap in caps if cap is not None), None)


class DecoderOutput(MoeModelOutputWithPast):
    """Final hidden states, and nothing of what else a family's decoder may return."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("_"):
            raise AttributeError(name)


@torch.no_grad()
def refuse_other_logits(
    model: PreTrainedModel, weight: Tensor, logits: Callable[[Tensor], Tensor]
) -> None:
    """Raise a UserError unless ``logits`` is what ``model`` computes from final hidden states."""
    if weight.is_meta:
        return
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, 1, weight.shape[1], generator=generator).to(weight.device, weight.dtype)
    decoder = model.get_decoder()
    before = vars(decoder).get("forward")
    decoder.forward = lambda *args, **kwargs: DecoderOutput(last_hidden_state=hidden)
    try:
        token = torch.zeros(1, 1, dtype=torch.long, device=weight.device)
        theirs = model(input_ids=token, use_cache=False, return_dict=True).logits
    finally:
        if before is None:
            del decoder.forward
        else:
            decoder.forward = before
    ours = logits(hidden)
    # The model rounds its logits to its own dtype; a scale left out is off by far more.
    slack = torch.finfo(theirs.dtype).eps ** 0.5 * theirs.abs().max()
    if ours.shape != theirs.shape or bool((ours - theirs).abs().max() > slack):
        raise UserError(
            f"{model.config.model_type} models compute more after the last norm than an output "
            "layer with a scale and a cap, which is all the fused losses know: use another model"
        )
