"""The table of the comparison with TRL, from bench/results/peers.jsonl."""

import statistics
from collections.abc import Sequence
from typing import Any

from results import NOT_MEASURED, read

Row = dict[str, Any]
OURS = "fastrlhf"
WEIGHTS = {"lora": "LoRA", "all": "all weights"}
LAST = 2
"""steps at a curve's end that are averaged"""


def table() -> str:
    """Speed and memory of each side beside TRL's, then the rewards that the curves reach."""
    rows = read("peers")
    speed = [row for row in rows if row["part"] == "speed"]
    if not speed:
        return NOT_MEASURED
    lines = [
        "| | samples/s | × TRL | tokens/s | rollout, score, update (s) | peak MB | of TRL's |",
        "|---|---|---|---|---|---|---|",
    ]
    for group in grouped(speed):
        peer = next(row for row in group if "phases" in row and not row["side"].startswith(OURS))
        for row in group:
            lines.append(speed_line(row, peer))
    lines += [
        "",
        f"{speed[0]['samples']} responses of {speed[0]['response_tokens']} tokens, a 12M-parameter "
        f"model with 32000 tokens, float32. Measured on {speed[0]['device']}, torch "
        f"{speed[0]['torch']}, {speed[0]['threads']} threads. Matrix products alone: what a step "
        "multiplies with the base's weights, at the rate of one such product between the turns.",
    ]
    curves = [row for row in rows if row["part"] == "curves"]
    return "\n".join([*lines, *(["", *curve_lines(curves)] if curves else [])])


def grouped(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows of one algorithm and one kind of weights together, in the order of the file."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["algorithm"], row["weights"]), []).append(row)
    return list(groups.values())


def name(row: Row) -> str:
    return f"{row['algorithm'].upper()}, {WEIGHTS[row['weights']]}: {row['side']}"


def speed_line(row: Row, peer: Row) -> str:
    phases = peak = share = ""
    if "phases" in row:  # the floor has none
        phases = ", ".join(f"{row['phases'][x]:.2f}" for x in ("rollout", "score", "update"))
        peak, share = f"{row['peak_mb']:.0f}", f"{row['peak_mb'] / peer['peak_mb']:.2f}"
    faster = row["samples_per_second"] / peer["samples_per_second"]
    return (
        f"| {name(row)} | {row['samples_per_second']:.2f} | {faster:.1f} "
        f"| {row['tokens_per_second']:.0f} | {phases} | {peak} | {share} |"
    )


def curve_lines(rows: Sequence[Row]) -> list[str]:
    steps = max(len(row["scores"]) for row in rows)
    lines = [
        f"| | seeds | reward, first step | mean of all {steps} steps | last {LAST} steps "
        "| mean of all, ours less TRL's ± standard error |",
        "|---|---|---|---|---|---|",
    ]
    for group in grouped(rows):
        sides = list(dict.fromkeys(row["side"] for row in group))
        peer = next(side for side in sides if not side.startswith(OURS))
        for side in sides:
            own = [row for row in group if row["side"] == side]
            means = (
                statistics.mean(statistics.mean(row["scores"][part]) for row in own)
                for part in (slice(1), slice(None), slice(-LAST, None))
            )
            shown = " | ".join(f"{mean:.3f}" for mean in means)
            apart = "" if side == peer else difference(group, side, peer)
            lines.append(f"| {name(own[0])} | {len(own)} | {shown} | {apart} |")
    return [
        *lines,
        "",
        "Means over seeds. A difference below two standard errors is noise.",
    ]


def difference(rows: Sequence[Row], side: str, peer: str) -> str:
    """How far the mean of a seed's whole curve is from the peer's, over seeds."""
    own, other = (
        [statistics.mean(row["scores"]) for row in rows if row["side"] == which]
        for which in (side, peer)
    )
    apart = statistics.mean(own) - statistics.mean(other)
    if min(len(own), len(other)) < 2:
        return f"{apart:+.3f}"
    error = sum(statistics.variance(x) / len(x) for x in (own, other)) ** 0.5
    return f"{apart:+.3f} ± {error:.3f}"
