"""Candidates measured in turns: what one machine does in one minute is compared with itself.

Each candidate is called once to warm up, checked against the group's truth, measured for memory,
and then timed in rounds. A round calls every candidate, from a first one that moves on each round.
One pytest-benchmark benchmark is one group: its rounds are these rounds, and `extra_info` holds the
candidates' times.
"""

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from peak import extra_mb
from torch import Tensor

Call = Callable[[], tuple[Tensor, ...]]

OURS = ("cpu", "triton", "reference", "in place")
UNAVAILABLE = ("backend; it has", "kernels are not installed", "needs Triton")
"""what our ops say where a backend does not exist here; every other error is a bug"""
SHORT = 0.05
"""seconds: what a candidate takes less than is noisy, and measured in more rounds; on a CPU it is
called so often in each that it takes as long"""


class Missing(Exception):
    """A candidate that cannot run here; the text says why."""


@dataclass(frozen=True)
class Problem:
    """The candidates of a group, and what the hardware needs at least."""

    calls: Mapping[str, Callable[[], Call]]
    """candidate -> what makes its call, or raises Missing"""
    floor: Mapping[str, float]
    """candidate -> how many of its times make the floor"""
    truth: str | None = "eager"
    """whose outputs the others are held against, where it takes part; None compares nothing"""
    tolerance: float = 1e-3
    """relative RMS of each output"""
    gradient_mb: float = 0.0
    """of the gradients among what a call returns; "in place" writes its over the logits"""
    sizes: Mapping[str, int | None] = field(default_factory=dict)
    """N, D, V"""


@dataclass(frozen=True)
class Measured:
    seconds: Mapping[str, list[float]]
    """candidate -> seconds a call, one entry a round"""
    peak_mb: Mapping[str, float | None]
    error: Mapping[str, float | None]
    """candidate -> largest relative RMS of its outputs against the truth's"""
    skipped: Mapping[str, str]


def timed(call: Call, device: str, repeats: int = 1) -> float:
    """Seconds a call; on a GPU by its events, so that the queue and not the host is timed."""
    if device == "cpu":
        begun = time.perf_counter()
        for _ in range(repeats):
            call()
        return (time.perf_counter() - begun) / repeats
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000 / repeats


def relative_rms(got: Tensor, truth: Tensor) -> float:
    """‖got − truth‖ / ‖truth‖, over four million entries of what is larger."""
    assert got.shape == truth.shape
    step = max(1, truth.numel() >> 22) | 1  # odd, so that no column of a matrix is left out
    got, truth = (x.detach().flatten()[::step].double() for x in (got, truth))
    return float((got - truth).norm() / truth.norm().clamp(min=1e-12))


def _first_call(name: str, make: Callable[[], Call]) -> tuple[Call, tuple[Tensor, ...]]:
    try:
        call = make()
        return call, call()
    except Missing:
        raise
    except RuntimeError as error:
        # The reference makes the logits, as eager does; that a kernel runs out of memory is news.
        allowed = (*UNAVAILABLE, *(("out of memory",) if name == "reference" else ()))
        if name in OURS and not any(text in str(error) for text in allowed):
            raise
        raise Missing(str(error).splitlines()[0]) from error
    except Exception as error:
        # Whatever a peer cannot do on this machine is its row's reason, not the end of the run.
        if name in OURS:
            raise
        raise Missing(f"{type(error).__name__}: {error}".splitlines()[0]) from error


def _prepare(problem: Problem, without: frozenset[str], device: str):
    """Warm calls, their outputs' errors and memory, and their time, for those that can run."""
    calls: dict[str, Call] = {}
    once: dict[str, float] = {}
    peaks: dict[str, float | None] = {}
    errors: dict[str, float | None] = {}
    skipped: dict[str, str] = {}
    truth: tuple[Tensor, ...] | None = None
    # The floor's candidates come first: they warm up the matrix library too.
    names = [*problem.floor, *(x for x in problem.calls if x not in problem.floor)]
    for name in sorted(names, key=lambda x: (x not in problem.floor, x != problem.truth)):
        if name in without:
            continue
        try:
            calls[name], outputs = _first_call(name, problem.calls[name])
        except Missing as missing:
            skipped[name] = str(missing)
            continue
        errors[name] = None
        if name == problem.truth:
            truth = outputs
        elif truth is not None and name not in problem.floor:
            pairs = zip(outputs, truth, strict=True)
            error = max(relative_rms(got, expected) for got, expected in pairs)
            if not error <= problem.tolerance:  # NaN too
                said = (
                    f"{error:.1e} from {problem.truth}, allowed is {problem.tolerance:.0e}: "
                    "no time is reported for a wrong result"
                )
                assert name not in OURS, f"{name} is {said}"
                skipped[name] = said
                del calls[name], errors[name], outputs
                continue
            errors[name] = error
        del outputs
        begun = time.perf_counter()
        peaks[name] = extra_mb(calls[name], device)
        once[name] = time.perf_counter() - begun
    return calls, once, peaks, errors, skipped


def measure(
    benchmark: Any,
    problem: Problem,
    without: frozenset[str],
    device: str,
    budget: float,
    least: int = 3,
) -> Measured:
    """Run a group as one benchmark of about `budget` seconds, but `least` rounds at least.

    Where a candidate takes less than `SHORT` seconds they are 5 at least.
    """
    calls, once, peaks, errors, skipped = _prepare(problem, without, device)
    shortest = SHORT if device == "cpu" else 0.005
    repeats = {name: max(1, min(50, math.ceil(shortest / t))) for name, t in once.items()}
    one_round = sum(once[name] * repeats[name] for name in calls)
    least = max(least, 5 if min(once.values()) < SHORT else 0)
    rounds = max(least, min(15, int(budget / max(one_round, 1e-9))))
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls)

    def turn() -> None:
        order.append(order.pop(0))
        for name in order:
            seconds[name].append(timed(calls[name], device, repeats[name]))

    benchmark.pedantic(turn, rounds=rounds)
    return Measured(seconds, peaks, errors, skipped)


def percentile(values: list[float], share: float) -> float:
    """By linear interpolation between the nearest two."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def rows(group: Any, problem: Problem, measured: Measured) -> list[dict[str, Any]]:
    """One row a candidate: times in seconds, ratios of medians, memory in MiB."""
    medians = {name: statistics.median(times) for name, times in measured.seconds.items()}
    floor = sum(count * medians[name] for name, count in problem.floor.items())
    made = []
    for name, times in measured.seconds.items():
        median, peak = medians[name], measured.peak_mb[name]
        made.append(
            {
                "bench": "ops", "op": group.op, "mode": group.mode, "variant": group.variant,
                "shape": group.shape, **problem.sizes, "dtype": group.dtype, "provider": name,
                "median": median, "p20": percentile(times, 0.2), "p80": percentile(times, 0.8),
                "rounds": len(times),
                "peak_extra_mb": None if peak is None else round(peak, 1),
                "gradient_mb": 0.0 if name == "in place" else round(problem.gradient_mb, 1),
                "floor": floor,
                "floor_is": " + ".join(f"{n:g} × {x}" for x, n in problem.floor.items()),
                "ratio_to_floor": median / floor,
                "ratio_to_eager": median / medians["eager"] if "eager" in medians else None,
                "error": measured.error[name],
            }
        )  # fmt: skip
    return made
