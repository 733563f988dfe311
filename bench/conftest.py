"""`pytest bench/`: which groups run, and rows that are printed and kept as they come."""

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# As the command line sets it; read when torch loads OpenMP.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import plan
import pytest
import results
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    options = parser.getgroup("fastrlhf", "fastrlhf's benchmarks")
    options.addoption("--quick", action="store_true", help="the smallest head, few tokens")
    options.addoption("--must-show", action="store_true", help="the shapes that the aims name")
    options.addoption("--op", action="append", default=[], metavar="NAME", help="only this op")
    options.addoption("--shape", action="append", default=[], metavar="NAME", help="only this head")
    options.addoption("--tokens", type=int, metavar="N", help="instead of the plan's")
    options.addoption(
        "--without", action="append", default=[], metavar="NAME", help="leave a candidate out"
    )
    options.addoption("--device", choices=("cpu", "cuda"), help="default: a GPU where there is one")
    options.addoption("--results", type=Path, metavar="FILE", help="default: bench/results/ops-*")


def pytest_configure(config: pytest.Config) -> None:
    # pytest keeps all that is logged, and the compiler's own trace is much.
    logging.getLogger("torch.__trace").propagate = False
    option = config.option
    option.device = option.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if option.device == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda: torch sees no CUDA device")
    try:
        config.stash[GROUPS] = plan.select(
            option.device, ops=option.op, shapes=option.shape, quickly=option.quick,
            must_show=option.must_show, tokens=option.tokens, without=option.without,
        )  # fmt: skip
    except ValueError as error:
        raise pytest.UsageError(str(error)) from error


GROUPS = pytest.StashKey[list[plan.Group]]()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    groups = metafunc.config.stash[GROUPS]
    metafunc.parametrize("group", groups, ids=[group.name for group in groups])


class Recorder:
    """Keeps each group's rows as soon as they are there, and prints them."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.stamp = results.stamp(config.option.device)
        kind = "quick" if config.option.quick else "ops"
        name = f"{kind}-{results.slug(self.stamp['device'])}.jsonl"
        self.path = config.option.results or results.RESULTS / name

    def keep(self, rows: list[dict[str, Any]], skipped: dict[str, str]) -> None:
        results.merge(self.path, [self.stamp | row for row in rows])
        terminal = self.config.pluginmanager.get_plugin("terminalreporter")
        capture = self.config.pluginmanager.get_plugin("capturemanager")
        with capture.global_and_fixture_disabled():
            for line in results.report(rows, skipped):
                terminal.write_line(line)


@pytest.fixture(scope="session")
def recorder(request: pytest.FixtureRequest) -> Iterator[Recorder]:
    made = Recorder(request.config)
    yield made
    if made.path.exists():
        print(f"\nrows: {made.path}")
