"""A model without weights, quantised or not, in the place of one that is loaded."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from .memory_tracking import StorageTracker, tensor_bytes
from .quantization import Quantization, compute_dequantized

__all__ = ["ShapeOnly"]

NF4_BLOCK = 64  # weights that share a scale,
NESTED_BLOCK = 256  # and scales that share one of their own


@dataclass
class ShapeOnly:
    """Loads as `pretrained.Pretrained` does, on the device that torch has for its default.

    `base` are the bytes of the first model that was loaded, `outer` those of its embedding and
    head.
    """

    config: PreTrainedConfig
    tracker: StorageTracker
    base: int = 0
    outer: int = 0

    def load(
        self,
        *,
        dtype: torch.dtype,
        device: str | torch.device = "meta",
        quantization: Quantization | None = None,
    ) -> PreTrainedModel:
        before = self.tracker.live
        # Making a model writes its dtype into the configuration.
        model = AutoModelForCausalLM.from_config(copy.deepcopy(self.config), dtype=dtype)
        if quantization is not None:
            quantize(model, quantization, dtype)
            compute_dequantized(model)
        if not self.base:
            self.base = self.tracker.live - before
            ends = (model.get_input_embeddings(), model.get_output_embeddings())
            self.outer = tensor_bytes([list(end.parameters()) for end in ends])
        return model.eval()

    def file_bytes(self, dtype: torch.dtype, quantization: Quantization | None) -> int:
        """The weights' file, where loading makes other numbers of what it says; else 0."""
        kept = getattr(self.config, "dtype", None) or torch.float32
        if kept == dtype and quantization is None:
            return 0
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(copy.deepcopy(self.config), dtype=kept)
        return tensor_bytes(list(model.parameters()))


def quantize(model: PreTrainedModel, quantization: Quantization, dtype: torch.dtype) -> None:
    """Put bitsandbytes' linears in the place of the decoder's, as transformers does on loading."""
    for parent in list(model.get_decoder().modules()):
        for name, linear in list(parent.named_children()):
            if type(linear) is nn.Linear:
                made = nf4 if quantization == "nf4" else int8
                setattr(parent, name, made(linear, dtype))


def nf4(linear: nn.Linear, dtype: torch.dtype) -> nn.Module:
    from bitsandbytes.functional import QuantState
    from bitsandbytes.nn import Linear4bit, Params4bit

    count = linear.weight.numel()
    blocks = -(-count // NF4_BLOCK)
    nested = QuantState(
        absmax=torch.empty(-(-blocks // NESTED_BLOCK)), code=torch.empty(256),
        blocksize=NESTED_BLOCK, dtype=torch.float32,
    )  # fmt: skip
    state = QuantState(
        absmax=torch.empty(blocks, dtype=torch.uint8), shape=linear.weight.shape,
        code=torch.empty(16), blocksize=NF4_BLOCK, quant_type="nf4", dtype=dtype,
        offset=torch.empty(()), state2=nested,
    )  # fmt: skip
    made: Any = Linear4bit(
        linear.in_features, linear.out_features, bias=linear.bias is not None,
        compute_dtype=dtype, quant_type="nf4", device="meta",
    )  # fmt: skip
    made.weight = Params4bit(
        torch.empty((count + 1) // 2, 1, dtype=torch.uint8), requires_grad=False,
        quant_state=state, blocksize=NF4_BLOCK, compress_statistics=True, quant_type="nf4",
        bnb_quantized=True, module=made,
    )  # fmt: skip
    made.bias = linear.bias
    made.quant_state = state
    return made


def int8(linear: nn.Linear, dtype: torch.dtype) -> nn.Module:
    from bitsandbytes.nn import Int8Params, Linear8bitLt

    made: Any = Linear8bitLt(
        linear.in_features, linear.out_features, bias=linear.bias is not None,
        has_fp16_weights=False, device="meta",
    )  # fmt: skip
    made.weight = Int8Params(
        torch.empty(linear.weight.shape, dtype=torch.int8), requires_grad=False,
        has_fp16_weights=False, SCB=torch.empty(linear.out_features),
    )  # fmt: skip
    made.bias = linear.bias
    return made
