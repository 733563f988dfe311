"""The Python environments of the peers, made on demand in the user's cache.

TRL 1.16 lives with fastrlhf (the extra `trl`). TRL 1.10, the last with PPO, gets an environment of
its own from PyPI, with the versions of constraints.txt otherwise: torch's CPU build among them.
"""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
TRL_PPO = "1.10.0"


def trl_ppo_python(cache: Path) -> Path:
    """The Python that has TRL 1.10; the first call installs it, which takes minutes."""
    folder = cache / f"trl-{TRL_PPO}"
    python, installed = folder / "bin" / "python", folder / "installed"
    if installed.exists():
        return python
    print(f"making {folder}", flush=True)
    venv.create(folder, with_pip=True, clear=True)
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    constraints = folder / "constraints.txt"
    constraints.write_text("\n".join(p for p in pins if not p.startswith("trl==")) + "\n")
    subprocess.run(
        [
            python, "-m", "pip", "install", "--quiet", "--constraint", constraints,
            f"trl=={TRL_PPO}", "torch", "peft",
        ],
        check=True,
    )  # fmt: skip
    installed.touch()
    return python


def fastrlhf_python() -> Path:
    """This one: it has fastrlhf and TRL 1.16."""
    return Path(sys.executable)
