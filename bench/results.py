"""Results as data: where rows are kept, what each says of its machine, and the README's tables.

python bench/results.py   rewrites README.md's and docs/kernels.md's tables from bench/results/
"""

import contextlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
from collections.abc import Callable, Mapping, Sequence
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


PEERS = ("triton", "trl", "liger-kernel", "bitsandbytes")


MEASURED = ("kernels", "csrc", "fastrlhf", "bench/*.py")
"""what a row's commit stands for"""


def commit() -> str:
    """$FASTRLHF_COMMIT, or that of this checkout, "-dirty" where its sources differ from it."""
    given = os.environ.get("FASTRLHF_COMMIT")
    if given or not shutil.which("git"):
        return given or "unknown"

    def git(*words: str) -> subprocess.CompletedProcess:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)

    head = git("rev-parse", "--short", "HEAD").stdout.strip()
    differs = git("diff", "--quiet", "HEAD", "--", *MEASURED).returncode == 1
    return f"{head}{'-dirty' * differs}" if head else "unknown"


def stamp(device: str = "cpu") -> dict[str, Any]:
    """What a row was measured on and with."""
    versions = {}
    for package in PEERS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    on_cpu = f"{cpu_name()}, {os.cpu_count()} cores"
    return {
        "device": on_cpu if device == "cpu" else torch.cuda.get_device_name(),
        "torch": torch.__version__,
        **versions,
        "threads": torch.get_num_threads(),
        "commit": commit(),
    }


def slug(device: str) -> str:
    """A device's name as part of a file's name."""
    return re.sub("[^a-z0-9]+", "-", device.lower()).strip("-")


def write(name: str, rows: list[dict[str, Any]]) -> Path:
    """Replace the rows of ``bench/results/<name>.jsonl``."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.jsonl"
    path.write_text("".join(json.dumps(stamp() | row) + "\n" for row in rows))
    return path


def read(name: str) -> list[dict[str, Any]]:
    """The rows of a benchmark; empty if it was never run."""
    return read_path(RESULTS / f"{name}.jsonl")


def read_path(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


GROUP = ("op", "mode", "variant", "shape", "dtype", "N")
"""the fields that rows measured in turns with each other share"""


def merge(path: Path, rows: list[dict[str, Any]], fields: Sequence[str] = GROUP) -> None:
    """Add rows to a file in place of those with the same ``fields``.

    No interruption leaves half a file.
    """
    new = {tuple(row[field] for field in fields) for row in rows}
    kept = [row for row in read_path(path) if tuple(row[field] for field in fields) not in new]
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".part")
    partial.write_text(as_lines([*kept, *rows]))
    partial.replace(path)


def keep(name: str, rows: list[dict[str, Any]], fields: Sequence[str]) -> None:
    """`merge` into ``bench/results/<name>.jsonl``."""
    merge(RESULTS / f"{name}.jsonl", rows, fields)


def as_lines(rows: Sequence[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def report(rows: list[dict[str, Any]], skipped: dict[str, str]) -> list[str]:
    """A group's rows as lines to read while the next group runs."""
    first = rows[0]
    sizes = " ".join(f"{x} {first[x]}" for x in ("N", "D", "V") if first[x] is not None)
    words = [first["op"], first["mode"], first["variant"], first["shape"], sizes, first["dtype"]]
    lines = [
        "",
        f"{' · '.join(x for x in words if x)} · floor {1e3 * first['floor']:.3g} ms "
        f"({first['floor_is']})",
        f"{'':15}{'ms':>10}{'p20':>10}{'p80':>10}{'× floor':>10}{'× eager':>10}{'extra MB':>10}",
    ]
    for row in rows:
        times = "".join(f"{1e3 * row[x]:10.4g}" for x in ("median", "p20", "p80"))
        ratio, peak = row["ratio_to_eager"], row["peak_extra_mb"]
        to_eager = f"{'':10}" if ratio is None else f"{ratio:10.3g}"
        extra = f"{'':10}" if peak is None else f"{peak:10.1f}"
        lines.append(f"{row['provider']:15}{times}{row['ratio_to_floor']:10.3g}{to_eager}{extra}")
    lines += [f"{name:15}skipped: {why}" for name, why in skipped.items()]
    return lines


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


def plan_check_table() -> str:
    rows = read("plan_check")
    if not rows:
        return NOT_MEASURED
    phases = list(rows[0]["memory_mb"])
    lines = [f"| configuration | {' | '.join(phases)} |", "|---" * (len(phases) + 1) + "|"]
    for row in rows:
        cells = []
        for phase in phases:
            planned, measured = (row["memory_mb"][phase][x] for x in ("planned", "measured"))
            cells.append(f"{planned:.0f} / {measured:.0f} ({planned / measured - 1:+.1%})")
        lines.append(f"| {row['configuration']} | {' | '.join(cells)} |")
    device, torch_version = rows[0]["device"], rows[0]["torch"]
    lines += [
        "",
        f"SmolLM2-135M, planned / measured MB. Measured on {device}, torch {torch_version}.",
    ]
    return "\n".join(lines)


def plans_table() -> str:
    rows = read("plans")
    if not rows:
        return "Not planned yet."
    lines = ["| model | GPU | takes | with |", "|---|---|---|---|"]
    for row in rows:
        if row["needed"] is None:
            lines.append(f"| {row['model']} | {row['budget']} | does not fit | |")
            continue
        changes = ", ".join(f"`{x}`" for x in row["changes"]) or "the settings as they are"
        takes = f"{row['needed'] / 2**30:.1f} GB"
        lines.append(f"| {row['model']} | {row['budget']} | {takes} | {changes} |")
    return "\n".join(lines)


def reward_model_table() -> str:
    rows = read("reward_model")
    if not rows:
        return NOT_MEASURED
    lines = [
        "| step | held-out accuracy | training accuracy | gap | held-out loss "
        "| calibration error |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        bold = "**" * row["kept"]
        lines.append(
            f"| {row['step']} | {bold}{row['held_out/accuracy']:.3f}{bold} "
            f"| {row['train/accuracy']:.3f} | {row['gap']:+.3f} | {row['held_out/loss']:.3f} "
            f"| {row['held_out/calibration_error']:.3f} |"
        )
    row = rows[-1]
    ended = row["step"] == row["steps_planned"]
    broken_off = "" if ended else f", and the run was broken off after step {row['step']}"
    lines += [
        "",
        f"{row['model']}, {row['train_texts']} texts to train on, {row['held_out_texts']} held "
        f"out ({row['held_out_pairs']} pairs whose ratings differ by more than 0.5; VADER orders "
        f"{row['vader_accuracy']:.3f} of them). Step 0 is the head alone; "
        f"{row['steps_planned']} steps are an epoch{broken_off}. Measured on {row['device']}, "
        f"torch {row['torch']}, threads: {row['threads']}.",
    ]
    return "\n".join(lines)


def pareto_table() -> str:
    import pareto  # which imports this module

    return pareto.table()


REWARD_TABLES = {"reward_model": reward_model_table, "pareto": pareto_table}


def decode_table() -> str:
    """Sampling beside transformers' `generate`."""
    rows = read("decode")
    if not rows:
        return NOT_MEASURED
    lines = [
        "| weights | tokens/s | `generate`'s | × | log-probabilities off by, mean (most) |",
        "|---|---|---|---|---|",
    ]
    for ours, theirs in zip(rows[::2], rows[1::2], strict=True):
        weights = ours["dtype"] + (", LoRA in the top 8 layers" if ours["adapters"] else "")
        lines.append(
            f"| {weights} | {ours['tokens_per_second']:.0f} | {theirs['tokens_per_second']:.0f} "
            f"| {ours['times_generate']:.2f} "
            f"| {ours['logprob_gap_mean']:.1e} ({ours['logprob_gap_max']:.1e}) |"
        )
    first = rows[0]
    return "\n".join([
        *lines,
        "",
        f"{first['model']}, {first['sequences']} sequences of at most {first['response_length']} "
        f"tokens; medians of {first['rounds']} rounds in turns with transformers' `generate`. "
        f"Measured on {first['device']}, torch {first['torch']}.",
    ])  # fmt: skip


def beside_trl() -> str:
    import peers_table  # which imports this module

    return peers_table.table()


MEMORY_TABLES = {"plan_check": plan_check_table, "plans": plans_table}
TABLES = {
    "demo": demo_table,
    "update_memory": memory_table,
    "decode": decode_table,
    "peers": beside_trl,
}


def with_tables(text: str, tables: Mapping[str, Callable[[], str]] = TABLES) -> str:
    """``text`` with what stands between `<!-- NAME -->` and `<!-- /NAME -->` made anew."""
    for name, table in tables.items():
        before, rest = text.split(f"<!-- {name} -->", 1)
        after = rest.split(f"<!-- /{name} -->", 1)[1]
        text = f"{before}<!-- {name} -->\n{table()}\n<!-- /{name} -->{after}"
    return text


def main() -> None:
    import tables  # which imports this module

    tables.draw()
    for page, made in (
        ("README.md", TABLES),
        ("docs/kernels.md", tables.TABLES),
        ("docs/memory.md", MEMORY_TABLES),
        ("docs/rewards.md", REWARD_TABLES),
    ):
        path = ROOT / page
        path.write_text(with_tables(path.read_text(), made))


if __name__ == "__main__":
    main()
