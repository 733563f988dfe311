"""Fail when a tensor with a vocabulary-sized dimension grows beyond a budget."""

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_IMPLEMENTATIONS: dict[Any, Callable[..., Any]] = {}


def visible_to_audit(op: Any) -> Any:
    """Mark a custom operator as ours: an `OperatorMode` looks at what it does inside."""
    _IMPLEMENTATIONS[op._opoverload] = op._init_fn
    return op


class OperatorMode(TorchDispatchMode):
    """A dispatch mode that sees into our custom operators too; `observe` gets every other op."""

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Collection[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func in _IMPLEMENTATIONS:
            with self:
                return _IMPLEMENTATIONS[func](*args, **(kwargs or {}))
        return self.observe(func, args, kwargs or {})

    def observe(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        """Run `func` and return its result."""
        raise NotImplementedError


class VocabTensorError(RuntimeError):
    """An op created a vocabulary-sized tensor beyond the budget."""


class forbid_vocab_tensors(OperatorMode):
    """`with forbid_vocab_tensors(budget, vocab_sizes={V}): loss(...).backward()` or it raises.

    budget: bytes. Any op that allocates a tensor with a dimension in `vocab_sizes` and more bytes
    than that raises VocabTensorError; views and in-place results allocate nothing and pass. So do
    tensors that share storage with one in `exempt` or have its shape (as it is or transposed):
    parameters, their gradients, their optimizer state. `largest_bytes` is the largest allocation
    seen that is not exempt. Sees into the forward and backward of autograd functions.
    """

    def __init__(
        self, budget: int, *, vocab_sizes: Collection[int], exempt: Iterable[Tensor] = ()
    ) -> None:
        super().__init__()
        self.budget = budget
        self.vocab_sizes = frozenset(vocab_sizes)
        self.largest_bytes = 0
        exempt = list(exempt)
        self._exempt_storages = {x.untyped_storage().data_ptr() for x in exempt}
        shapes = {tuple(x.shape) for x in exempt}
        self._exempt_shapes = shapes | {shape[::-1] for shape in shapes}

    def observe(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        result = func(*args, **kwargs)
        created = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        if any(self.vocab_sizes.intersection(x.shape) for x in created):
            given = {
                x.untyped_storage().data_ptr()
                for x in tree_leaves((args, kwargs))
                if isinstance(x, Tensor)
            }
            for x in created:
                self._check(func, x, given)
        return result

    def _check(self, func: Callable[..., Any], x: Tensor, given: set[int]) -> None:
        storage = x.untyped_storage()
        if (
            not self.vocab_sizes.intersection(x.shape)
            or storage.data_ptr() in given | self._exempt_storages
            or tuple(x.shape) in self._exempt_shapes
        ):
            return
        self.largest_bytes = max(self.largest_bytes, storage.nbytes())
        if storage.nbytes() > self.budget:
            raise VocabTensorError(
                f"{func} created {list(x.shape)} {x.dtype}: {storage.nbytes():,} bytes; tensors "
                f"with a dimension in {sorted(self.vocab_sizes)} are allowed {self.budget:,}"
            )
