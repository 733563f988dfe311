"""What is measured: every op, at the heads of real models, with as many tokens as the time allows.

The tokens of a group are the same for all its candidates. On a CPU they are few, and the two large
heads are measured in one variant of each mode, so that the whole suite stays within a quarter of an
hour on two cores. A GPU measures everything, Qwen3-8B's head too; but logits of Qwen2.5-1.5B, whose
vocabulary Qwen2.5-0.5B has, are measured nowhere.
"""

import difflib
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch


class Shape(NamedTuple):
    """One layer's sizes; a rollout's are its sequences and their length."""

    hidden: int | None
    vocab: int | None
    intermediate: int | None


SHAPES = {
    "Qwen3-8B": Shape(4096, 151936, 12288),
    "SmolLM2-135M": Shape(576, 49152, 1536),
    "Qwen2.5-0.5B": Shape(896, 151936, 4864),
    "Qwen2.5-1.5B": Shape(1536, 151936, 8960),
    "Llama-3-8B": Shape(4096, 128256, 14336),
    "64x1024": Shape(None, None, None),
}
ROLLOUT = (64, 1024)
"""sequences and tokens of the shape "64x1024", for the ops that see no vocabulary"""

FROZEN, TRAINED = "frozen head", "trained head"
HALF, HEAD_KL = "frozen head, half the rows without signal", "frozen head, exact KL"
LOGITS_KL = "exact KL"

VARIANTS = {
    "logprobs": (("fwd", ""), ("fwd", LOGITS_KL), ("fwd+bwd", "")),
    "linear_logprobs": (("fwd", ""), ("fwd+bwd", FROZEN), ("fwd+bwd", TRAINED)),
    "linear_policy_loss": tuple(("fwd+bwd", x) for x in (FROZEN, TRAINED, HALF, HEAD_KL)),
    "sample": (("fwd", ""),),
    "policy_loss": (("fwd+bwd", ""),),
    "value_loss": (("fwd+bwd", ""),),
    "gae": (("fwd", ""),),
    "whiten": (("fwd", ""),),
    "AdamW8bit": (("step", ""),),
}
"""op -> its modes and their variants"""
LOGITS = ("logprobs", "sample")
HEADS = ("linear_logprobs", "linear_policy_loss")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

CPU_LOGITS_TOKENS = {"SmolLM2-135M": 256, "Qwen2.5-0.5B": 128, "Llama-3-8B": 128}
CPU_HEAD_TOKENS = {
    "SmolLM2-135M": 256, "Qwen2.5-0.5B": 64, "Qwen2.5-1.5B": 64, "Llama-3-8B": 32,
}  # fmt: skip
CPU_LARGE = ("Qwen2.5-1.5B", "Llama-3-8B")
GPU_HEADS = tuple(name for name, shape in SHAPES.items() if shape.vocab)
GPU_LOGITS = tuple(name for name in GPU_HEADS if name != "Qwen2.5-1.5B")
GPU_TOKENS = {"float32": 2048, "bfloat16": 8192}
NO_TRL = frozenset({"trl"})
# Left out where they would cost the most and say the least: the reference is eager torch in
# float32, and the compiler takes its seconds for every shape.
SLOW = frozenset({"reference", "torch.compile"})


class Group(NamedTuple):
    """Candidates that are measured in turns, on the same inputs."""

    op: str
    mode: str
    variant: str
    shape: str
    dtype: str
    tokens: int
    without: frozenset[str] = frozenset()
    """candidates that would take longer than all others together"""

    @property
    def name(self) -> str:
        words = (self.op, self.mode, self.variant, self.shape, self.dtype, f"N{self.tokens}")
        return "-".join(x.replace(", ", " ").replace(" ", "_") for x in words if x)


def _must_show() -> Iterator[Group]:
    qwen = "Qwen2.5-0.5B"
    for dtype in DTYPES:
        yield Group("logprobs", "fwd", "", qwen, dtype, 1024, NO_TRL | {"reference"})
    peers = frozenset({"reference", "eager", "torch.compile", "trl"})
    yield Group("linear_logprobs", "fwd", "", qwen, "float32", 2048, peers)
    for variant in (FROZEN, TRAINED, HALF):
        yield Group("linear_policy_loss", "fwd+bwd", variant, qwen, "float32", 2048, peers)


MUST_SHOW = tuple(_must_show())
"""the shapes that the project's aims name: minutes for a handful of rows"""


def _cpu_groups(op: str, mode: str, variant: str, dtype: str) -> Iterator[Group]:
    if op in LOGITS:
        for shape, tokens in CPU_LOGITS_TOKENS.items():
            without = frozenset() if shape == "SmolLM2-135M" else SLOW
            yield Group(op, mode, variant, shape, dtype, tokens, without)
        return
    for shape, tokens in CPU_HEAD_TOKENS.items():
        if shape in CPU_LARGE and variant not in ("", FROZEN):
            continue
        if shape in CPU_LARGE and op == "linear_logprobs" and mode != "fwd":
            continue
        without = {"SmolLM2-135M": frozenset(), "Qwen2.5-0.5B": frozenset({"reference"})}
        yield Group(op, mode, variant, shape, dtype, tokens, without.get(shape, SLOW))


def all_groups(device: str) -> Iterator[Group]:
    # Shape and dtype vary slowest, so that a large weight is made once.
    found: list[Group] = []
    for dtype in DTYPES:
        for op, variants in VARIANTS.items():
            for mode, variant in variants:
                if op in LOGITS + HEADS:
                    if device == "cpu":
                        found += _cpu_groups(op, mode, variant, dtype)
                        continue
                    tokens = GPU_TOKENS[dtype]
                    heads = GPU_LOGITS if op in LOGITS else GPU_HEADS
                    found += [Group(op, mode, variant, s, dtype, tokens) for s in heads]
                elif op == "AdamW8bit":
                    for shape in CPU_HEAD_TOKENS if device == "cpu" else GPU_HEADS:
                        rows = SHAPES[shape].intermediate
                        assert rows is not None
                        # On a CPU its step on this matrix takes seconds.
                        slow = device == "cpu" and shape == "Llama-3-8B"
                        without = frozenset({"bitsandbytes"} if slow else ())
                        found.append(Group(op, mode, variant, shape, dtype, rows, without))
                elif dtype == "float32":
                    tokens = ROLLOUT[0] * ROLLOUT[1]
                    found.append(Group(op, mode, variant, "64x1024", dtype, tokens))
    if device == "cpu":
        found += [group for group in MUST_SHOW if group.op == "logprobs"]
    order = list(SHAPES)
    return iter(sorted(found, key=lambda g: (order.index(g.shape), list(DTYPES).index(g.dtype))))


def quick(groups: Iterable[Group]) -> Iterator[Group]:
    """The smallest head, few tokens, nothing that has to be compiled first."""
    for group in groups:
        if group.shape not in ("SmolLM2-135M", "64x1024") or group in MUST_SHOW:
            continue
        tokens = group.tokens
        if group.op in LOGITS + HEADS:
            tokens = max(1, tokens // 4)
        yield group._replace(tokens=tokens, without=group.without | {"torch.compile"})


def check_names(kind: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Raises ValueError that names the nearest of what there is."""
    known = list(known)
    for name in given:
        if name not in known:
            near = {x.lower(): x for x in known}
            close = difflib.get_close_matches(name.lower(), near, n=1, cutoff=0)
            raise ValueError(
                f"no {kind} {name!r}: did you mean {near[close[0]]!r}? There are {', '.join(known)}"
            )


def select(
    device: str,
    *,
    ops: Iterable[str] = (),
    shapes: Iterable[str] = (),
    quickly: bool = False,
    must_show: bool = False,
    tokens: int | None = None,
    without: Iterable[str] = (),
) -> list[Group]:
    """The groups to run; empty `ops` and `shapes` mean all.

    Raises ValueError for unknown names, and where nothing is left.
    """
    check_names("op", ops, VARIANTS)
    check_names("shape", shapes, SHAPES)
    groups: Iterable[Group] = MUST_SHOW if must_show else all_groups(device)
    if quickly:
        groups = quick(groups)
    chosen = []
    for group in groups:
        if (ops and group.op not in ops) or (shapes and group.shape not in shapes):
            continue
        if tokens is not None and group.op in LOGITS + HEADS:
            group = group._replace(tokens=tokens)
        chosen.append(group._replace(without=group.without | set(without)))
    if not chosen:
        asked = ", ".join([*ops, *shapes, *(["--quick"] if quickly else [])])
        raise ValueError(f"nothing is measured for {asked} together on {device}")
    return chosen
