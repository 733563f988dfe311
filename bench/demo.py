"""The demo on three seeds: what the README says of it.

python bench/demo.py               about half an hour; rewrites bench/results/demo.jsonl
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from results import ROOT, stamp, write

SEEDS = (1, 2, 3)


def main() -> None:
    rows = []
    for seed in SEEDS:
        begun = stamp()
        with tempfile.TemporaryDirectory() as folder:
            run = Path(folder) / "sentiment"
            command = [sys.executable, "-m", "fastrlhf.cli", "ppo", "--config", "sentiment"]
            done = subprocess.run(
                [*command, f"seed={seed}", f"output_dir={run}"], check=True, stdout=subprocess.PIPE
            )
            rows.append({"bench": "demo", "seed": seed} | json.loads(done.stdout) | begun)
            if seed == SEEDS[0]:
                (ROOT / "docs" / "demo.png").write_bytes((run / "plot.png").read_bytes())
    write("demo", rows)


if __name__ == "__main__":
    main()
