"""The update's memory at a real model's shape, measured in a process of its own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parent.parent / "bench" / "update_memory.py"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_an_update_over_2048_tokens():
    done = subprocess.run([sys.executable, str(BENCH), "--print"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout)
    assert row["tokens"] == 2048
    assert row["update_extra_mb"] < 400
    assert row["head_extra_mb"] < 64
    # The measure itself must see what it is for.
    assert row["update_extra_mb"] > row["head_extra_mb"] > 20
