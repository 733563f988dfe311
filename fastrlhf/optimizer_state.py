"""An optimizer's state as named tensors for safetensors and numbers for JSON, and back.

Of any optimizer whose `state_dict()` holds tensors, numbers and dicts of them for each parameter;
that is every make of optim.py. A name is the parameter's place among the trained ones and the
state's own name: `12/exp_avg`, `12/__bnb_optimizer_quant_state__/absmax1`. What the optimizer was
told stays the configuration's; of its groups only the learning rate is kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from .errors import UserError

__all__ = ["load_optimizer_state", "optimizer_numbers", "optimizer_tensors"]

RATES = ("lr", "initial_lr")


def leaves(tree: Mapping[Any, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        here = f"{path}/{key}" if path else str(key)
        if isinstance(value, Mapping):
            yield from leaves(value, here)
        else:
            yield here, value


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The state's tensors; those that several parameters share are there once for each."""
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, value in leaves(optimizer.state_dict()["state"]):
        if isinstance(value, Tensor):
            whole = value.detach().contiguous()
            shared = whole.numel() > 0 and whole.data_ptr() in seen
            tensors[name] = whole.clone() if shared else whole
            seen.add(whole.data_ptr())
    return tensors


def optimizer_numbers(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The rest, for JSON."""
    held = optimizer.state_dict()
    numbers = {name: v for name, v in leaves(held["state"]) if not isinstance(v, Tensor)}
    groups = [{k: float(g[k]) for k in RATES if k in g} for g in held["param_groups"]]
    return {"numbers": numbers, "groups": groups}


def load_optimizer_state(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], rest: Mapping[str, Any]
) -> None:
    """Continue from what the two functions above gave.

    Raises:
        UserError: the state is that of other parameters.
    """
    groups = optimizer.state_dict()["param_groups"]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, Any] = {}
    for name, value in (*tensors.items(), *rest["numbers"].items()):
        index, *path = name.split("/")
        place = state.setdefault(int(index), {})
        for part in path[:-1]:
            place = place.setdefault(part, {})
        place[path[-1]] = value
    for index, own in state.items():
        sizes = {x.numel() for name, x in own.items() if "exp_avg" in name and "scale" not in name}
        if index >= len(parameters) or sizes - {parameters[index].numel()}:
            raise UserError(
                "the checkpoint's optimizer state is of other weights; resume with the settings "
                "and the model of the run"
            )
    for group, rates in zip(groups, rest["groups"], strict=True):
        group.update(rates)
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    page_again(optimizer)


def page_again(optimizer: torch.optim.Optimizer) -> None:
    """Move bitsandbytes' large states back to host memory, from where a paged make reads them."""
    make: Any = optimizer
    if not getattr(make, "is_paged", False):
        return
    for parameter, state in make.state.items():
        for name in ("state1", "state2"):
            if parameter.device.type != "cpu" and name in state:
                buffer = make.get_state_buffer(parameter, dtype=state[name].dtype)
                buffer.copy_(state[name])
                state[name] = buffer
