"""How many bytes of tensors are alive: the peak of any torch code, with or without data.

`StorageTracker` sees every storage that an operator makes and when the last tensor on it dies,
saved activations included, so on the meta device it measures code that never ran, and on a real one
it counts the same code by the same rule. What it cannot see is counted for it or left out:

1. Our fused operators work in buffers of their own; `head_workspace` says how many bytes.
2. What libraries allocate below torch (oneDNN, MKL, cuBLAS) is left out; the plan adds one measured
   constant for all of it.
3. On the meta device attention would run as its textbook formula. It goes to the operator that the
   planned device would run.
4. A question about data that is not there ("is nothing masked?") is answered by `answer`, and as
   many rows as there can be are selected by a mask.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from importlib import import_module
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastrlhf_kernels import _backend, _cpu
from fastrlhf_kernels._head import HeadOptions

__all__ = ["StorageTracker", "head_workspace", "running_as", "tensor_bytes"]

aten = torch.ops.aten


def tensor_bytes(*tensors: Any) -> int:
    """Bytes of the storages under ``tensors``, each once; modules and records may hold them."""
    storages = {}
    for x in tree_leaves(tensors):
        if isinstance(x, Tensor):
            storages[x.untyped_storage()._cdata] = x.untyped_storage().nbytes()
    return sum(storages.values())


class StorageTracker(TorchDispatchMode):
    """Counts the bytes of the storages made within the block, and the most there were at a time.

    ``device``: whose kernels are counted, "cpu" or "cuda". `live` and `peak` are bytes; `restart`
    forgets the peak so far.
    """

    def __init__(self, device: str = "cpu") -> None:
        super().__init__()
        self.device = device
        # What code is told that asks a meta tensor a question: "is nothing masked?"
        self.answer = False
        self.live = 0
        self.peak = 0
        self._known: dict[int, weakref.ref] = {}

    def restart(self) -> None:
        self.peak = self.live

    def __torch_dispatch__(
        self,
        func: Any,
        types: Collection[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        answer = without_data(func, args, kwargs, self.answer)
        result = func(*args, **(kwargs or {})) if answer is None else answer
        for x in (result,) if isinstance(result, Tensor) else tree_leaves(result):
            if isinstance(x, Tensor):
                self.see(x)
        if func.namespace == "fastrlhf" and func._opname in HEAD_OPS:
            size = head_workspace(func._opname, func._schema, args, kwargs or {}, self.device)
            self.passing(size)
        return result

    def see(self, tensor: Tensor) -> None:
        """Count the storage of ``tensor`` until it is freed, if it is not counted yet."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return

        def gone(died: Any) -> None:
            if self._known.get(key) is died:
                self.live -= size
                del self._known[key]

        self._known[key] = weakref.ref(storage, gone)
        self.live += size
        self.peak = max(self.peak, self.live)

    def forget(self, tensor: Tensor) -> None:
        """Count ``tensor`` no more: it lies in another memory."""
        del self._known[tensor.untyped_storage()._cdata]
        self.live -= tensor.untyped_storage().nbytes()

    def passing(self, size: int) -> None:
        """``size`` bytes were there for a moment."""
        self.peak = max(self.peak, self.live + size)


# Operators of a number each, which torch works out in Python where there are no numbers: slowly.
ELEMENTWISE = frozenset({
    aten.add.Tensor, aten.mul.Tensor, aten.sub.Tensor, aten.neg.default, aten.silu.default,
    aten.silu_backward.default, aten.rsqrt.default, aten.pow.Tensor_Scalar, aten.cos.default,
    aten.sin.default, aten.gelu.default, aten.gelu_backward.default, aten.div.Tensor,
    aten.tanh.default, aten.clamp.default, aten.reciprocal.default, aten.mul.Scalar,
})  # fmt: skip
IN_PLACE = frozenset({
    aten.copy_.default, aten.mul_.Tensor, aten.add_.Tensor, aten.fill_.Scalar,
    aten.uniform_.default, aten.zero_.default,
})  # fmt: skip

SLOW = frozenset({aten.addmm.default, aten.linalg_vector_norm.default})


def elementwise(func: Any, args: tuple[Any, ...]) -> Tensor | None:
    """The result of a simple operator on meta tensors, by its first operand of full shape."""
    if func in IN_PLACE:
        return args[0]
    tensors = [x for x in args if isinstance(x, Tensor)]
    first = tensors[0]
    if any(x.shape != first.shape or x.dtype != first.dtype for x in tensors):
        shape = torch.broadcast_shapes(*(x.shape for x in tensors))
        full = [x for x in tensors if x.shape == shape]
        if not full or any(x.dtype != first.dtype for x in tensors):
            return None
        first = full[0]
    if not first.dtype.is_floating_point:
        return None
    return torch.empty_strided(first.shape, first.stride(), dtype=first.dtype, device="meta")


def reduced(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None) -> Tensor | None:
    """The result of a product with a bias, or of a norm over all of a meta tensor."""
    given, named = args[0], kwargs or {}
    if func is aten.addmm.default:
        return given.new_empty(args[1].shape[0], args[2].shape[1])
    if func is aten.linalg_vector_norm.default and len(args) < 3 and named.keys() <= {"dtype"}:
        return given.new_empty((), dtype=named.get("dtype") or given.dtype)
    return None


def without_data(
    func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None, answer: bool
) -> Any:
    """What an operator on meta tensors answers that torch would read data for, or be slow at.

    None: it does neither.
    """
    given = args[0] if args else None
    if not isinstance(given, Tensor) or given.device.type != "meta":
        return None
    if func in ELEMENTWISE or func in IN_PLACE:
        return elementwise(func, args)
    if func in SLOW:
        return reduced(func, args, kwargs)
    if func is aten._local_scalar_dense.default:
        return answer if given.dtype == torch.bool else 0
    if func is aten.nonzero.default:
        return given.new_empty(given.numel(), given.dim(), dtype=torch.int64)
    if func is aten.index.Tensor and any(x is not None and x.dtype == torch.bool for x in args[1]):
        places: list[Tensor | None] = []
        for x in args[1]:
            if x is not None and x.dtype == torch.bool:
                places += [x.new_empty(x.numel(), dtype=torch.int64)] * x.dim()
            else:
                places.append(x)
        return func(given, places)
    return None


HEAD_OPS = (
    "linear_logprobs",
    "linear_logprobs_backward",
    "linear_policy_loss",
    "linear_policy_loss_",
)
"""our operators with a head inside"""


def head_workspace(
    name: str, schema: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], device: str = "cpu"
) -> int:
    """Bytes that a fused head operator holds while it runs, beyond what it takes and returns.

    On a CPU counted as `fastrlhf_kernels._head.ChunkedHead` allocates: logits of a chunk (of a tile
    where no gradient follows) for policy and reference, a tile of the weight in float32, the
    chunk's hidden states and their gradient. On a GPU: the logits of as many rows as the workspace
    takes, or all of it.
    """
    given = dict(zip((x.name for x in schema.arguments), args, strict=False)) | dict(kwargs)
    hidden, weight, vocab = given["hidden"], given["weight"], given["valid_vocab"]
    (count, size), copies = hidden.shape, 1 if given["ref_hidden"] is None else 2
    differentiates = name == "linear_logprobs_backward" or (
        name.startswith("linear_policy_loss")
        and any(given[f"needs_{x}"] for x in ("hidden", "weight", "bias"))
    )
    if device != "cpu":
        row = vocab * (4 * copies + hidden.dtype.itemsize) if differentiates else vocab
        return min(given["workspace_bytes"], count * row)
    options = HeadOptions(
        given["logit_scale"], given["softcap"], given["kl_direction"], vocab,
        given["workspace_bytes"],
    )  # fmt: skip
    rows, columns = options.chunk_rows(count), options.spans(size)[0].stop
    logits = rows * (vocab if differentiates else columns) * copies
    states = rows * size * (copies + differentiates)
    raised = 0
    if weight.dtype != torch.float32:
        packs = _cpu.available() and _cpu.multiplies_bfloat16(hidden, weight)
        # Packed for the logits, which takes half, the weight is raised for the gradient alone.
        raised = columns * size * copies // 2 if packs else columns * size * copies
        raised += columns * size * (packs and differentiates)
    return 4 * (logits + states + raised)


def attention(
    kind: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`scaled_dot_product_attention` on meta tensors by the operator that ``kind`` would run."""
    if enable_gqa and key.shape[1] != query.shape[1]:
        key, value = (shared_heads(x, query.shape[1]) for x in (key, value))
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(
            attn_mask.logical_not(), float("-inf")
        )
    if kind == "cpu":
        return aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
        )[0]
    if attn_mask is not None:
        attn_mask = attn_mask.expand(*query.shape[:-1], key.shape[-2])
    keeps = torch.is_grad_enabled() and query.requires_grad
    return aten._scaled_dot_product_efficient_attention(
        query, key, value, attn_mask, keeps, dropout_p, is_causal, scale=scale
    )[0]


def shared_heads(x: Tensor, heads: int) -> Tensor:
    batch, own, length, size = x.shape
    return x[:, :, None].expand(batch, own, heads // own, length, size).flatten(1, 2)


def passes(x: Tensor) -> Tensor:
    """`x.isfinite()` of a number that is not there: what stops a run is not planned for."""
    return torch.ones(x.shape, dtype=torch.bool, device="cpu")


@contextmanager
def running_as(kind: str) -> Iterator[None]:
    """Within the block, meta tensors go the ways that tensors on ``kind`` would go."""
    backend = "triton" if kind == "cuda" else "cpu"
    # A number a token is all that this module takes; its kernels are no operators.
    tokens = import_module("fastrlhf_kernels.policy_loss")
    replaced: list[tuple[Any, str, Any]] = [
        # Our operators would take the reference, which is plain torch, for an unknown device.
        (_backend, "_device_backend", lambda *_: backend),
        (tokens, "resolve", lambda *_, **__: "reference"),
        (functional, "scaled_dot_product_attention", partial(attention, kind)),
        (Tensor, "isfinite", passes),
    ]
    with ExitStack() as stack:
        for owner, name, stand_in in replaced:
            stack.enter_context(patch.object(owner, name, stand_in))
        yield
