"""The trunk's output for every token of a rollout, kept for all roles and epochs.

The first sequences' states are on the device, as many as a budget allows; the others' are in host
memory, pinned where the device is a GPU, and travel to it microbatch by microbatch. Where the
states lie changes no bit of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .microbatches import Layout

__all__ = ["TrunkCache", "on_device"]


def on_device(x: Tensor, device: torch.device) -> Tensor:
    """``x`` on ``device``; a GPU is not waited for."""
    if x.device.type != "cpu" or device.type != "cuda":
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)


class TrunkCache:
    """States [B, L, D], zero until they are written.

    Args:
        batch, length, size: B, L, D.
        budget_mb: megabytes of states on the device; None: all of them.
    """

    def __init__(
        self,
        batch: int,
        length: int,
        size: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
        budget_mb: int | None = None,
    ):
        kept = batch
        if budget_mb is not None:
            kept = min(batch, budget_mb * 2**20 // (length * size * dtype.itemsize))
        self.device_rows = torch.zeros(kept, length, size, dtype=dtype, device=device)
        self.host_rows = torch.zeros(
            batch - kept, length, size, dtype=dtype, pin_memory=device.type == "cuda"
        )

    @property
    def host_bytes(self) -> int:
        """Bytes in host memory that would otherwise be on the device."""
        return self.host_rows.numel() * self.host_rows.dtype.itemsize

    @property
    def device_bytes(self) -> int:
        return self.device_rows.numel() * self.device_rows.dtype.itemsize

    def write(self, layout: Layout, states: Tensor) -> None:
        """Keep the states of a microbatch, [b, w, D], its padding left out."""
        own = on_device(layout.own, states.device)
        index = layout.token_index.flatten()[layout.own]
        self.write_tokens(index, states.flatten(0, 1).index_select(0, own))

    def write_tokens(self, index: Tensor, states: Tensor) -> None:
        """Keep the states [n, D] of the tokens at ``index``, [n] int64 into B·L."""
        for flat, numbers, chosen in self.places(index):
            part = len(chosen) != len(index)
            taken = states.index_select(0, on_device(chosen, states.device)) if part else states
            flat.index_copy_(0, numbers.to(flat.device), taken.to(flat.device))

    def take(self, layout: Layout) -> Tensor:
        """The states of a microbatch, [b, w, D], on the device."""
        index = layout.token_index.flatten()
        device = self.device_rows.device
        taken = self.device_rows.new_empty(0)
        for flat, numbers, chosen in self.places(index):
            part = on_device(flat.index_select(0, on_device(numbers, flat.device)), device)
            if len(chosen) == len(index):
                taken = part
                break
            if not taken.numel():
                taken = self.device_rows.new_empty(len(index), flat.shape[-1])
            taken.index_copy_(0, on_device(chosen, device), part)
        return taken.view(*layout.token_index.shape, -1)

    def places(self, index: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Where tokens ([n], into [B·L]) are kept: states, places in them, and which of the n."""
        boundary = self.device_rows.shape[0] * self.device_rows.shape[1]
        beyond = index >= boundary
        here, there = ((x.nonzero().squeeze(-1)) for x in (~beyond, beyond))
        both = [
            (self.device_rows.flatten(0, 1), index[here], here),
            (self.host_rows.flatten(0, 1), index[there] - boundary, there),
        ]
        return [place for place in both if len(place[2])]
