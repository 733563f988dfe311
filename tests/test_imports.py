"""What a run does not use is not imported: PEFT brings bitsandbytes, and that torch's compiler."""

import os
import subprocess
import sys
from pathlib import Path

import tiny

PROGRAM = """
import sys
from fastrlhf import GRPOConfig, GRPOTrainer

settings = dict(
    model=sys.argv[1], output_dir=sys.argv[2], use_peft={peft}, train_layers="all",
    response_length=4, batch_size=8, num_generations=4, total_episodes=8, eval_prompts=4,
    num_samples=0,
)
rows = [{{"prompt": a + b}} for a in "abcdefgh" for b in "ij"]
GRPOTrainer(None, "length_band(1, 3)", GRPOConfig(**settings), rows).train()
print("imported", *(name for name in ("peft", "bitsandbytes") if name in sys.modules))
"""


def imported(folder: Path, peft: bool) -> list[str]:
    command = [sys.executable, "-c", PROGRAM.format(peft=peft), str(tiny.folder(folder / "model"))]
    done = subprocess.run(
        [*command, str(folder / "run")], env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert (folder / "run" / "summary.json").exists()
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("imported"))
    return line.split()[1:]


def test_full_training_needs_neither_peft_nor_bitsandbytes(tmp_path):
    assert imported(tmp_path / "full", peft=False) == []
    assert "peft" in imported(tmp_path / "lora", peft=True)
