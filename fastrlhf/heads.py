"""What sits on the final hidden states: the language-model head, the value and the reward head."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastrlhf_kernels.few_rows import few_rows_linear, fits_few_rows

from .logit_scale import declared_scale, declared_softcap, refuse_other_logits

__all__ = ["LanguageModelHead", "RewardHead", "ValueHead", "last_states"]


TILE = 8192  # rows of a bf16 weight that are in float32 at a time


@dataclass(frozen=True)
class LanguageModelHead:
    """The model's output layer in the form in which the fused ops take it."""

    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]
    logit_scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, model: PreTrainedModel) -> LanguageModelHead:
        """The head of a transformers model, with the scale and cap that its config declares.

        Raises:
            UserError: the model's logits are something else.
        """
        output = model.get_output_embeddings()
        bias = getattr(output, "bias", None)
        head = cls(
            output.weight.detach(),
            None if bias is None else bias.detach(),
            declared_scale(model.config),
            declared_softcap(model.config),
        )
        refuse_other_logits(model, head.weight, head.logits)
        return head

    def through(self, output: nn.Module) -> LanguageModelHead:
        """The same scale and cap on the weights of ``output``, with gradients if they train."""
        given = (output.get_parameter("weight"), getattr(output, "bias", None))
        weight, bias = (x if x is None or x.requires_grad else x.detach() for x in given)
        assert weight is not None
        return replace(self, weight=weight, bias=bias)

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """Logits of a few rows, for sampling: [..., D] -> [..., V], never rounded below float32.

        They carry no gradient: what trains goes through the fused ops.
        """
        rows = hidden.reshape(-1, hidden.shape[-1]).float()
        if self.weight.dtype == rows.dtype or fits_few_rows(rows, self.weight):
            logits = few_rows_linear(rows, self.weight)
        else:
            logits = rows.new_empty(rows.shape[0], self.weight.shape[0])
            for start in range(0, self.weight.shape[0], TILE):
                tile = self.weight[start : start + TILE].float()
                torch.mm(rows, tile.t(), out=logits[:, start : start + TILE])
        if self.bias is not None:
            logits += self.bias.float()
        if self.logit_scale != 1.0:
            logits.mul_(self.logit_scale)
        if self.softcap is not None:
            logits.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits.view(*hidden.shape[:-1], -1)


class ValueHead(nn.Module):
    """A linear map from hidden states to values, in float32, that starts at zero.

    The states are scaled by 1/√D: an Adam step moves every weight by the learning rate, so a value
    would otherwise move by D of them at once and never settle. Shapes: [..., D] -> [...].
    """

    def __init__(self, hidden_size: int):
        super().__init__()
        self.linear = nn.Linear(hidden_size, 1, dtype=torch.float32)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        self.scale = hidden_size**-0.5

    def forward(self, hidden: Tensor) -> Tensor:
        return self.linear(hidden.float() * self.scale).squeeze(-1)


class RewardHead(nn.Module):
    """A linear map from a sequence's last hidden state to its reward, in float32.

    Its weights start with a standard deviation of 1/√(D + 1) (Stiennon et al. 2020), its bias at
    zero. Shapes: [..., D] -> [...].
    """

    def __init__(self, hidden_size: int):
        super().__init__()
        self.linear = nn.Linear(hidden_size, 1, dtype=torch.float32)
        nn.init.normal_(self.linear.weight, std=(hidden_size + 1) ** -0.5)
        nn.init.zeros_(self.linear.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.linear(hidden.float()).squeeze(-1)


def last_states(hidden: Tensor, attention_mask: Tensor) -> Tensor:
    """The states of each row's last real token, whichever side is padded: [B, L, D] -> [B, D]."""
    length = attention_mask.shape[1]
    last = length - 1 - attention_mask.long().flip(1).argmax(1)
    return hidden[torch.arange(len(hidden), device=hidden.device), last]
