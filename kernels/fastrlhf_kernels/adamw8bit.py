"""AdamW with block-wise 8-bit moments and stochastic rounding, one fused sweep a tensor.

State is 2 bytes a parameter and one float32 scale per 256 numbers and moment, as in Dettmers et al.
2022 and bitsandbytes, with decoupled weight decay and torch's bias correction. Deviations:
1. bfloat16 parameters are rounded stochastically, E[round(x)] = x: steps of 1e-6 would otherwise
   round to nothing. The random bits are a hash of (seed, step, tensor number, element), so a
   resumed run repeats them and all backends round alike, to the same bits.
2. A second moment above 0 is never quantised to 0. It would leave eps alone below a first moment
   whose code is not 0, and one step would be up to 1/eps times too long.
3. A block whose moment is NaN or infinite is read back as NaN: a broken gradient shows in the
   parameters, at once in its own entries and one step later in the 255 around it.
Refused: sparse gradients, gradients that are neither float32 nor of the parameter's dtype, and
parameters other than float32, bfloat16 and float16.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from . import _cpu, _reference_adamw8bit
from ._backend import BACKENDS, describe, resolve
from ._reference_adamw8bit import BLOCK, AdamWStep, Moments, rounding_key


def _check_number(name: str, value: float, allowed: bool, meaning: str) -> None:
    if not allowed:
        raise ValueError(f"AdamW8bit: {name}={value!r}: allowed are {meaning}")


class AdamW8bit(torch.optim.Optimizer):
    """`torch.optim.AdamW` whose two moments take 2 bytes a parameter instead of 8.

        m = β1·m + (1 − β1)·g;  v = β2·v + (1 − β2)·g²
        p = (1 − lr·weight_decay)·p − lr·(m / (1 − β1^t)) / (sqrt(v / (1 − β2^t)) + eps)

    params: tensors or groups, float32, bfloat16 or float16, of any layout; gradients of the same
    dtype or float32. Tensors below `min_8bit_size` elements keep float32 moments.
    stochastic_rounding: of bfloat16 parameters; False rounds to the nearest. seed: of its random
    bits; it is saved with the state. backend: as for the ops.

    `state_dict()` holds plain tensors for each parameter: "step" (int64, 0-dim, on the CPU),
    "exp_avg" and "exp_avg_sq" (uint8, or float32 for small tensors, in the parameter's shape) and
    "exp_avg_scale" and "exp_avg_sq_scale" (float32, one for 256 elements). Loading it continues
    with the same bits.

    Raises ValueError for numbers out of range and dtypes it does not take, RuntimeError for sparse
    gradients and backends that are not there.
    Source: Loshchilov & Hutter 2019, algorithm 2; Dettmers et al. 2022; docs/math.md, section 8.
    """

    _backend = "auto"  # of a copy: torch copies an optimizer's state and groups only

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        min_8bit_size: int = 4096,
        stochastic_rounding: bool = True,
        seed: int = 0,
        backend: str = "auto",
    ) -> None:
        for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
            _check_number(name, value, 0 <= value < float("inf"), "finite numbers ≥ 0")
        for i, beta in enumerate(betas):
            _check_number(f"betas[{i}]", beta, 0 <= beta < 1, "numbers in [0, 1)")
        if backend not in BACKENDS:
            raise ValueError(f"backend={backend!r}: allowed are {', '.join(BACKENDS)}")
        self._backend = backend
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": betas,
                "eps": eps,
                "weight_decay": weight_decay,
                "min_8bit_size": min_8bit_size,
                "stochastic_rounding": stochastic_rounding,
                "seed": seed,
            },
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step for every parameter with a gradient; returns the closure's loss, if any."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        number = 0
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step_tensor(parameter, parameter.grad, group, number)
                number += 1
        return loss

    def _step_tensor(
        self, parameter: Tensor, gradient: Tensor, group: dict[str, Any], number: int
    ) -> None:
        self._check(parameter, gradient)
        state = self.state[parameter]
        if not state:
            state.update(_zero_state(parameter, coded=parameter.numel() >= group["min_8bit_size"]))
        state["step"] += 1
        t = int(state["step"])
        rounds = group["stochastic_rounding"] and parameter.dtype == torch.bfloat16
        step = AdamWStep.at(
            t, lr=float(group["lr"]), betas=group["betas"], eps=group["eps"],
            weight_decay=group["weight_decay"],
            key=rounding_key(group["seed"], t, number) if rounds else None,
        )  # fmt: skip
        moments = Moments(
            state["exp_avg"].view(-1), state["exp_avg_sq"].view(-1),
            state.get("exp_avg_scale"), state.get("exp_avg_sq_scale"),
        )  # fmt: skip
        # A view of the parameter, or a copy where its elements do not lie in order.
        flat = parameter.detach().reshape(-1)
        self._kernel(parameter)(flat, gradient.reshape(-1).contiguous(), moments, step)
        if flat.data_ptr() != parameter.data_ptr():
            parameter.copy_(flat.view(parameter.shape))

    def _check(self, parameter: Tensor, gradient: Tensor) -> None:
        shapes = describe(parameter=parameter, gradient=gradient)
        if gradient.is_sparse:
            raise RuntimeError(f"AdamW8bit does not take sparse gradients, got {shapes}")
        if parameter.dtype not in _cpu.TYPES:
            raise ValueError(
                f"AdamW8bit: parameters are float32, bfloat16 or float16, got {shapes}"
            )
        if gradient.dtype not in (parameter.dtype, torch.float32):
            raise ValueError(
                f"AdamW8bit: a gradient is float32 or of its parameter's dtype, got {shapes}"
            )

    def _kernel(self, parameter: Tensor) -> Callable[[Tensor, Tensor, Moments, AdamWStep], None]:
        # A model may be spread over several GPUs; the kernel runs on its parameter's.
        with torch.cuda.device_of(parameter):
            backend = resolve(
                self._backend, parameter.device, parameter.dtype, op="AdamW8bit",
                available=("reference", "cpu", "triton"),
            )  # fmt: skip
        if backend == "triton":
            from ._triton_adamw8bit import adamw_step

            return adamw_step
        if backend == "cpu":
            from ._cpu_adamw8bit import adamw_step

            return adamw_step
        return _reference_adamw8bit.adamw_step

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from `state_dict()`, with the same bits."""
        super().load_state_dict(state_dict)
        # torch has cast the state to the parameter's dtype: scales and codes would be damaged.
        saved = [i for group in state_dict["param_groups"] for i in group["params"]]
        own = [parameter for group in self.param_groups for parameter in group["params"]]
        for i, parameter in zip(saved, own, strict=True):
            for name, value in state_dict["state"].get(i, {}).items():
                device = value.device if name == "step" else parameter.device
                self.state[parameter][name] = value.detach().to(device, copy=True)


def _zero_state(parameter: Tensor, *, coded: bool) -> dict[str, Tensor]:
    state = {"step": torch.zeros((), dtype=torch.int64, device="cpu")}
    for name, zero in (("exp_avg", 127), ("exp_avg_sq", 0)):
        if coded:
            state[name] = torch.full(
                parameter.shape, zero, dtype=torch.uint8, device=parameter.device
            )
            state[f"{name}_scale"] = torch.zeros(
                -(-parameter.numel() // BLOCK), dtype=torch.float32, device=parameter.device
            )
        else:
            state[name] = torch.zeros(parameter.shape, dtype=torch.float32, device=parameter.device)
    return state
