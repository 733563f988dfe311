"""The tables and the plot of docs/kernels.md, made from bench/results/ops-*.jsonl and xray.json."""

import json
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from plan import DTYPES, MUST_SHOW, SHAPES, VARIANTS
from results import GROUP, NOT_MEASURED, RESULTS, ROOT, read_path

Row = dict[str, Any]
PLOT = ROOT / "docs" / "kernels.png"

OURS = ("triton", "cpu", "reference")
PEERS = {
    "eager": "eager", "eager fused": "eager fused", "torch.compile": "torch.compile",
    "trl": "TRL", "liger": "Liger", "bitsandbytes": "bitsandbytes",
    "reference": "our reference", "in place": "ours in place",
}  # fmt: skip
VERSIONS = ("torch", "triton", "trl", "liger-kernel", "bitsandbytes")
ABSENT = "–"
MUST_SHOW_KEYS = {(g.op, g.mode, g.variant, g.shape, g.dtype, g.tokens) for g in MUST_SHOW}


def all_rows() -> list[Row]:
    return [row for path in sorted(RESULTS.glob("ops-*.jsonl")) for row in read_path(path)]


def grouped(rows: Iterable[Row]) -> dict[tuple, dict[str, Row]]:
    """What was measured in turns with each other: (device, op, ...) -> candidate -> row."""
    groups: dict[tuple, dict[str, Row]] = {}
    order = [list(VARIANTS), list(SHAPES), list(DTYPES)]

    def place(row: Row) -> list[int]:
        return [x.index(row[f]) for x, f in zip(order, ("op", "shape", "dtype"), strict=True)]

    for row in sorted(rows, key=place):
        key = (row["device"], *(row[field] for field in GROUP))
        groups.setdefault(key, {})[row["provider"]] = row
    return groups


def ours(group: dict[str, Row]) -> Row | None:
    return next((group[name] for name in OURS if name in group), None)


def number(value: float | None) -> str:
    """Three digits, without an exponent."""
    if value is None:
        return ABSENT
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def lines(head: Sequence[str], body: Iterable[Sequence[str]]) -> list[str]:
    rule = "|".join(["---"] * len(head))
    return [f"| {' | '.join(x)} |" if x else f"|{rule}|" for x in (head, (), *body)]


def measured_on(rows: Iterable[Row]) -> str:
    """Device, threads, versions and commits of the rows of one device."""
    rows = list(rows)
    packages = [
        f"{name} {' and '.join(versions)}"
        for name in VERSIONS
        if (versions := sorted({row[name] for row in rows if name in row}))
    ]
    threads = " or ".join(str(x) for x in sorted({row["threads"] for row in rows}))
    commits = ", ".join(sorted({row["commit"] for row in rows}))
    device = f"{rows[0]['device']} ({threads} used by torch)"
    return f"{device}; {', '.join(packages)}; commit {commits}."


def op_table(op: str) -> str:
    """One table a device: our time, its ratio to the floor, and the peers' as multiples of it."""
    groups = {key: found for key, found in grouped(all_rows()).items() if key[1] == op}
    parts = []
    for device in dict.fromkeys(key[0] for key in groups):
        here = {key: x for key, x in groups.items() if key[0] == device and ours(x)}
        if not here:
            continue
        peers = [p for p in PEERS if any(p in x and ours(x) is not x[p] for x in here.values())]
        head = ["shape", "mode", "dtype", "N", "backend", "ms", "× floor", "floor"]
        head += [PEERS[p] for p in peers] + ["extra MB", "eager's", "gradients"]
        body = []
        for key, group in here.items():
            body.append(_line(key, group, peers))
        rows = [row for group in here.values() for row in group.values()]
        parts.append("\n".join([*lines(head, body), "", f"Measured on {measured_on(rows)}"]))
    return "\n\n".join(parts) or NOT_MEASURED


def _line(key: tuple, group: dict[str, Row], peers: Sequence[str]) -> list[str]:
    _, _, mode, variant, shape, dtype, count = key
    row = ours(group)
    assert row is not None
    named = f"**{shape}**" if key[1:] in MUST_SHOW_KEYS else shape
    times = [
        number(group[p]["median"] / row["median"]) if p in group and group[p] is not row else ABSENT
        for p in peers
    ]
    eager = group.get("eager")
    return [
        named, f"{mode}, {variant}" if variant else mode, dtype, str(count), row["provider"],
        number(1e3 * row["median"]), number(row["ratio_to_floor"]), row["floor_is"], *times,
        number(row["peak_extra_mb"]), number(eager["peak_extra_mb"] if eager else None),
        number(row["gradient_mb"] or None),
    ]  # fmt: skip


XRAY_LARGEST = ("registers", "spills", "shared_bytes")
XRAY_SMALLEST = ("matrix_instructions", "occupancy")


def xray_table() -> str:
    """Each kernel and target once: the worst over its configurations and dtypes."""
    path = RESULTS / "xray.json"
    if not path.exists():
        return NOT_MEASURED
    found: dict[tuple[str, str], list[Row]] = {}
    for row in json.loads(path.read_text())["kernels"]:
        found.setdefault((row["kernel"], row["target"]), []).append(row)

    def worst(rows: list[Row], field: str, of: Callable) -> str:
        values = [row[field] for row in rows if row[field] is not None]
        return number(of(values)) if values else ABSENT

    body = []
    for (kernel, target), rows in found.items():
        most = [worst(rows, field, max) for field in XRAY_LARGEST]
        least = [worst(rows, field, min) for field in XRAY_SMALLEST]
        dtypes = ", ".join(sorted({row["dtype"] for row in rows}))
        versions = ", ".join(sorted({row["triton"] for row in rows}))
        body.append([kernel, str(len(rows)), dtypes, target, versions, *most, *least])
    head = ["kernel", "configs", "dtypes", "target", "Triton", "registers", "spills"]
    head += ["shared bytes", "matrix instructions", "occupancy"]
    return "\n".join(lines(head, body))


def plot_line() -> str:
    if not all_rows() or not PLOT.exists():
        return NOT_MEASURED
    return f"![each candidate's time over the floor, op by op and head by head]({PLOT.name})"


def draw() -> None:
    """docs/kernels.png: time over floor of every candidate of the ops that see the vocabulary."""
    shown = {
        key: group
        for key, group in grouped(all_rows()).items()
        if key[1].endswith(("logprobs", "policy_loss")) and key[4] != "64x1024"
    }
    if not shown:
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    devices = {key[0]: [x for x in shown if x[0] == key[0]] for key in shown}
    heights = [len(keys) + 6 for keys in devices.values()]
    figure, panels = pyplot.subplots(
        len(devices), 1, figsize=(9, 0.2 * sum(heights)), height_ratios=heights, squeeze=False
    )
    for axes, (device, keys) in zip(panels[:, 0], devices.items(), strict=True):
        _panel(axes, [shown[key] for key in keys])
        labels = [" ".join(str(x) for x in (*key[1:6], f"N {key[6]}") if x) for key in keys]
        axes.set_yticks(range(len(labels)), labels, fontsize=6)
        axes.set_title(device, fontsize=8)
    figure.tight_layout()
    figure.savefig(PLOT, dpi=120, metadata={"Software": None})
    pyplot.close(figure)


def _panel(axes: Any, groups: Sequence[dict[str, Row]]) -> None:
    marks = {
        "cpu": "o", "triton": "o", "eager": "s", "torch.compile": "^", "trl": "D", "liger": "v",
    }  # fmt: skip
    for name, mark in marks.items():
        points = [(g[name]["ratio_to_floor"], i) for i, g in enumerate(groups) if name in g]
        if points:
            axes.scatter(*zip(*points, strict=True), marker=mark, s=18, label=name)
    axes.set_xscale("log")
    axes.axvline(1.0, color="gray", linewidth=0.8)
    axes.set_xlabel("time over the floor")
    axes.invert_yaxis()
    axes.legend(fontsize=7)


TABLES: dict[str, Callable[[], str]] = {
    **{op: partial(op_table, op) for op in VARIANTS},
    "ops_plot": plot_line,
    "xray": xray_table,
}
