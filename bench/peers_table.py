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
    lines = [
        f"| | reward, first step | mean of the last {LAST} of equal steps, seeds | deviation |",
        "|---|---|---|---|",
    ]
    for group in grouped(rows):
        for side in dict.fromkeys(row["side"] for row in group):
            own = [row for row in group if row["side"] == side]
            ends = [statistics.mean(row["scores"][-LAST:]) for row in own]
            first = statistics.mean(row["scores"][0] for row in own)
            spread = f"{statistics.stdev(ends):.3f}" if len(ends) > 1 else ""
            lines.append(
                f"| {name(own[0])} | {first:.3f} | {statistics.mean(ends):.3f} "
                f"({', '.join(f'{x:.3f}' for x in ends)}) | {spread} |"
            )
    return lines
