"""The README's tables are those that the results make."""

import importlib.util
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_tables_are_generated():
    spec = importlib.util.spec_from_file_location("results", ROOT / "bench" / "results.py")
    assert spec is not None and spec.loader is not None
    results = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(results)
    readme = (ROOT / "README.md").read_text()
    assert results.with_tables(readme) == readme, "run python bench/results.py"


def test_every_linked_file_exists():
    for page in [ROOT / "README.md", *ROOT.glob("docs/*.md")]:
        for target in page.read_text().split("](")[1:]:
            path = target.split(")")[0]
            assert (page.parent / path).exists(), f"{page.name}: {path}"
