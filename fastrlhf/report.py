"""`fastrlhf report`: a run as one page of HTML, which shows everything without a network.

Figures, curves, what the hacking monitor found, the same prompts' answers at the first, middle and
last evaluation side by side, and the settings. The curves are an image within the page; whatever
the model, the data or a reward wrote is text there, never markup.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from .errors import UserError
from .plot import can_plot, plot_runs
from .run_files import RunRecord, read_run

__all__ = ["write_report"]

PROMPTS = 12  # shown with their answers
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 72rem; margin: 2rem auto;
       padding: 0 1rem; }
h1 { font-size: 1.5rem; margin: 0 } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem }
table { border-collapse: collapse; width: 100% } img { max-width: 100% }
th, td { text-align: left; vertical-align: top; padding: .3rem .7rem .3rem 0;
         border-bottom: 1px solid #ddd; overflow-wrap: anywhere }
th { font-weight: 600 } .number { text-align: right; font-variant-numeric: tabular-nums }
.quiet { color: #666 } .finding { border-left: 4px solid #c8553d; padding: .2rem .8rem;
         margin: .6rem 0; background: #fbf1ee } code { font-size: .85rem }
.samples td { width: 28% } .score { color: #1f6f8b; font-variant-numeric: tabular-nums }
"""


def write_report(folder: str | Path, output: Path | None = None) -> Path:
    """Write the page of the run in ``folder``; returns its path, by default report.html in it.

    Raises:
        UserError: no run there, or a page that cannot be written.
    """
    run = read_run(folder)
    path = run.path / "report.html" if output is None else output
    try:
        path.write_text(page(run), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}); give --output") from error
    return path


def page(run: RunRecord) -> str:
    """The whole page."""
    parts = [
        heading(run),
        section("Figures", figures(run)),
        section("Curves", curves(run)),
        section("Signs of reward hacking", findings(run)),
        section("Held-out prompts along the run", samples(run)),
        section("Settings", table([], [[code(k), str(v)] for k, v in run.settings.items()])),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>{escape(run.name)}</title><style>{STYLE}</style></head><body>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


class Markup(str):
    """Text that is HTML already; any other is escaped."""


def section(title: str, content: str) -> str:
    return f"<h2>{escape(title)}</h2>\n{content}" if content else ""


def code(text: str) -> Markup:
    return Markup(f"<code>{escape(text)}</code>")


def table(head: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "") -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        made = [cell if isinstance(cell, Markup) else escape(cell) for cell in cells]
        return "<tr>" + "".join(f"<{tag}>{cell}</{tag}>" for cell in made) + "</tr>"

    lines = [line(head, "th")] if head else []
    lines += [line(cells, "td") for cells in rows]
    return f'<table class="{kind}">\n' + "\n".join(lines) + "\n</table>"


def heading(run: RunRecord) -> str:
    settings = run.settings
    # What came from Python was trained on, and not what the settings name.
    data, ours = run.given.get("train_dataset"), "a {} given from Python"
    given = {"model": run.given.get("model"), "dataset": data, "reward": run.given.get("reward")}
    named = {k: ours.format(k) if x is True else x for k, x in given.items() if x is not None}
    names = settings | named
    told = [str(names[k]) for k in ("algorithm", "model", "dataset", "reward") if k in names]
    told = list(dict.fromkeys(told))
    last = run.metrics[-1]
    planned = settings.get("total_episodes")
    of = f" of {planned}" if planned else ""
    state = f"{last['step']} steps, {last['episode']}{of} episodes"
    if run.summary is None:
        state += "; the run has not ended"
    line = escape(" · ".join([*told, state]))
    return f'<h1>{escape(run.name)}</h1>\n<p class="quiet">{line}</p>'


def figures(run: RunRecord) -> str:
    """The held-out prompts' figures at each evaluation, then the run's own."""
    names = {"score": "score", "kl": "KL, nats a sequence", "entropy": "entropy, nats a token"}
    names |= {"distinct_2": "distinct-2"}
    keys = [k for k in names if any(line.get(k) is not None for line in run.evaluations)]
    rows = [
        [str(line["step"]), str(run.episode(line["step"])), *(figure(line.get(k)) for k in keys)]
        for line in run.evaluations
    ]
    content = ""
    if rows:
        content += "<p>On the held-out prompts:</p>"
        content += table(["step", "episodes", *(names[k] for k in keys)], rows)
    if run.summary is not None:
        seconds, peak = run.summary.get("seconds"), run.summary.get("peak_memory_mb")
        if seconds is not None and peak is not None:
            content += f'<p class="quiet">{seconds:.0f} seconds, peak memory {peak:.0f} MiB</p>'
    return content


def figure(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, int | float) else "n/a"


def curves(run: RunRecord) -> str:
    if not can_plot():
        return '<p class="quiet">No curves: pip install matplotlib</p>'
    image = io.BytesIO()
    plot_runs([run], image, format="png")
    data = base64.b64encode(image.getvalue()).decode("ascii")
    content = f'<img alt="curves of {escape(run.name)}" src="data:image/png;base64,{data}">'
    watched = sorted({k for line in run.metrics for k in line if k.startswith("monitor/")})
    if watched:
        content += "<p>What the monitor watches, at the first, middle and last rollout:</p>"
        chosen = spread(run.metrics)
        rows = [[code(k), *(figure(line.get(k)) for line in chosen)] for k in watched]
        content += table(["figure", *(f"step {line['step']}" for line in chosen)], rows)
    return content


def findings(run: RunRecord) -> str:
    """What the monitor found; that it found nothing is said only of runs that it watched."""
    parts = []
    for line in run.findings:
        sentence = line.get("finding") or line.get("sentence") or ""
        example = line.get("example")
        shown = f'<br><span class="quiet">{escape(str(example))}</span>' if example else ""
        said = f"<b>Step {escape(str(line.get('step', '?')))}</b> {escape(str(sentence))}"
        parts.append(f'<div class="finding">{said}{shown}</div>')
    if not parts and any(key.startswith("monitor/") for line in run.metrics for key in line):
        return "<p>None was seen.</p>"
    return "\n".join(parts)


def of_task(line: Mapping[str, Any]) -> str:
    """A sample's prompt, and for which task it was answered."""
    task = line.get("task")
    return line["prompt"] if task is None else f"{task}: {line['prompt']}"


def samples(run: RunRecord) -> str:
    """A row a prompt: its answer at the first, the middle and the last evaluation."""
    # A run that went on from a checkpoint wrote some twice: the later counts.
    # Of a meta-training a prompt is there for each task.
    said = {(line["step"], of_task(line)): line for line in run.samples}
    steps = [step[0] for step in spread([[s] for s in sorted({step for step, _ in said})])]
    prompts = list(dict.fromkeys(prompt for _, prompt in said))[:PROMPTS]
    if not prompts:
        return ""

    def cell(step: int, prompt: str) -> Markup:
        line = said.get((step, prompt))
        if line is None:
            return Markup("")
        judged = "n/a" if line["score"] is None else f"{line['score']:+.2f}"
        text = escape(" ".join(line["completion"].split()))
        return Markup(f'<span class="score">{judged}</span> {text}')

    rows = [[prompt, *(cell(step, prompt) for step in steps)] for prompt in prompts]
    return table(["prompt", *(f"step {step}" for step in steps)], rows, kind="samples")


def spread(lines: Sequence[Any]) -> list[Any]:
    """The first, the middle and the last of ``lines``, each once."""
    chosen = sorted({0, (len(lines) - 1) // 2, len(lines) - 1}) if lines else []
    return [lines[i] for i in chosen]
