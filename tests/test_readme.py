"""The pages' tables are those that the results make."""

import importlib
import inspect
from pathlib import Path

import pytest

from fastrlhf import PPOConfig

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    ("page", "module", "tables"),
    [
        ("README.md", "results", "TABLES"),
        ("docs/kernels.md", "tables", "TABLES"),
        ("docs/memory.md", "results", "MEMORY_TABLES"),
        ("docs/rewards.md", "results", "REWARD_TABLES"),
        ("docs/meta.md", "meta_figure", "TABLES"),
        ("docs/multi_agent.md", "multi_agent_figure", "TABLES"),
        ("docs/reward_hacking.md", "reward_ppo", "TABLES"),
    ],
)
def test_tables_are_generated(page, module, tables, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "bench")
    results = importlib.import_module("results")
    text = (ROOT / page).read_text()
    made = results.with_tables(text, getattr(importlib.import_module(module), tables))
    assert made == text, "run python bench/results.py"


def test_the_files_of_every_setting_are_named():
    text = (ROOT / "README.md").read_text()
    for kind in PPOConfig.__mro__[:-1]:
        assert f"(fastrlhf/{Path(inspect.getfile(kind)).name})" in text


def test_every_linked_file_exists():
    for page in [ROOT / "README.md", *ROOT.glob("docs/*.md")]:
        for target in page.read_text().split("](")[1:]:
            path = target.split(")")[0].split("#")[0]
            assert (page.parent / path).exists(), f"{page.name}: {path}"
