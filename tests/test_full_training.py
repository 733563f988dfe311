"""Full training at a real model's shape stays within its bytes, in a process of its own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parent.parent / "bench" / "full_training.py"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("way", ["norm", "per_parameter"])
def test_six_bytes_a_parameter(way):
    command = [sys.executable, str(BENCH), "--one", way, "--checkpointing"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout.splitlines()[-1])
    # Weights and moments are 4: the measure itself must see them.
    assert 4 < row["bytes_a_parameter"] <= 6
