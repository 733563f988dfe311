"""Results as data: where rows are kept, what each says of its machine, and the README's tables.

python bench/results.py            rewrites the tables in README.md from bench/results/
"""

import json
import os
import platform
import statistics
import subprocess
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def stamp() -> dict[str, Any]:
    """What a row was measured on and with."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    return {
        "device": f"{cpu_name()}, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "commit": commit,
    }


def write(name: str, rows: list[dict[str, Any]]) -> Path:
    """Replace the rows of ``bench/results/<name>.jsonl``."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.jsonl"
    path.write_text("".join(json.dumps(stamp() | row) + "\n" for row in rows))
    return path


def read(name: str) -> list[dict[str, Any]]:
    """The rows of a benchmark; empty if it was never run."""
    path = RESULTS / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


NOT_MEASURED = "Not measured yet."


def demo_table() -> str:
    rows = read("demo")
    if not rows:
        return NOT_MEASURED
    lines = [
        "| seed | score before | score after | KL (nats a sequence) | entropy | distinct-2 "
        "| minutes | peak memory (MB) |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['seed']} | {row['score_before']:+.3f} | {row['score_after']:+.3f} "
            f"| {row['kl']:.2f} | {row['entropy']:.2f} | {row['distinct_2']:.2f} "
            f"| {row['seconds'] / 60:.1f} | {row['peak_memory_mb']:.0f} |"
        )
    gain = statistics.mean(row["score_after"] - row["score_before"] for row in rows)
    device, torch_version = rows[0]["device"], rows[0]["torch"]
    lines.append("")
    lines.append(f"Mean gain {gain:+.3f}. Measured on {device}, torch {torch_version}.")
    return "\n".join(lines)


def memory_table() -> str:
    rows = read("update_memory")
    if not rows:
        return NOT_MEASURED
    (row,) = rows
    return "\n".join(
        [
            "| what | peak extra memory (MB) |",
            "|---|---|",
            f"| an update of {row['tokens']} tokens, with head | {row['update_extra_mb']:.0f} |",
            f"| the head alone (exact KL, its gradient) | {row['head_extra_mb']:.0f} |",
            f"| one copy of the logits, had it existed | {row['eager_logits_mb']:.0f} |",
            "",
            f"{row['model']}; measured on {row['device']}, torch {row['torch']}.",
        ]
    )


TABLES = {"demo": demo_table, "update_memory": memory_table}


def with_tables(text: str) -> str:
    """``text`` with what stands between `<!-- NAME -->` and `<!-- /NAME -->` made anew."""
    for name, table in TABLES.items():
        before, rest = text.split(f"<!-- {name} -->", 1)
        after = rest.split(f"<!-- /{name} -->", 1)[1]
        text = f"{before}<!-- {name} -->\n{table()}\n<!-- /{name} -->{after}"
    return text


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(with_tables(readme.read_text()))
