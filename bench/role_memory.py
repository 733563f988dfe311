"""Memory of policy, reference, adapter critic and reward on one SmolLM2-135M, against the model's.

Weights: bytes over every storage, each once. Resident: VmRSS after loading less before, each in a
process of its own, of the bare model and of the four roles; Linux only. Rank 16 in the top quarter
of the layers (8 of 30, rounded up).

    python bench/role_memory.py            rewrites bench/results/role_memory.jsonl
    python bench/role_memory.py --print    only prints the rows
"""

import ctypes
import gc
import itertools
import json
import subprocess
import sys
from typing import Any

import torch
from peak import status_mb
from results import write

from fastrlhf.backbone import LoraSettings, SharedBackbone
from fastrlhf.pretrained import find_pretrained
from fastrlhf.quantization import check_quantization

STORED: dict[str, dict[str, Any]] = {
    "float32": {"dtype": torch.float32},
    "bfloat16": {"dtype": torch.bfloat16},
    "int8": {"dtype": torch.bfloat16, "quantization": "int8"},
    "nf4": {"dtype": torch.bfloat16, "quantization": "nf4"},
}


def weights_mb(module: torch.nn.Module) -> float:
    tensors = itertools.chain(module.parameters(), module.buffers())
    storages = {s._cdata: s.nbytes() for s in (t.untyped_storage() for t in tensors)}
    return sum(storages.values()) / 2**20


def load(stored: str, roles: bool) -> torch.nn.Module:
    found = find_pretrained("smollm2-135m")
    if not roles:
        return found.load(**STORED[stored])
    return SharedBackbone.load(
        found, **STORED[stored], lora=LoraSettings(16), train_layers=8, critic="adapter",
        reward=True,
    )  # fmt: skip


def child(stored: str, roles: bool) -> dict[str, float]:
    """What one load adds to the process."""
    trim = ctypes.CDLL("libc.so.6").malloc_trim
    # Imports and bitsandbytes' tables are not the model's.
    for kind in ("int8", "nf4"):
        check_quantization(kind, device="cpu", dtype=torch.bfloat16)
    trim(0)
    before = status_mb("VmRSS")
    module = load(stored, roles)
    # What was read from a mapped file is only resident once it was touched.
    for parameter in module.parameters():
        parameter.detach().flatten()[::512].sum()
    gc.collect()
    trim(0)
    return {"weights_mb": weights_mb(module), "resident_mb": status_mb("VmRSS") - before}


def measure(stored: str) -> dict[str, Any]:
    found = {}
    for roles in (False, True):
        command = [sys.executable, __file__, "--child", stored, str(int(roles))]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found[roles] = json.loads(done.stdout.splitlines()[-1])
    base, four = found[False], found[True]
    return {
        "bench": "role_memory",
        "model": "SmolLM2-135M",
        "stored": stored,
        "roles": "policy, reference, critic (adapter), reward",
        "rank": 16,
        "layers": 8,
        **{f"model_{k}": round(v, 1) for k, v in base.items()},
        **{f"roles_{k}": round(v, 1) for k, v in four.items()},
        "weights_ratio": round(four["weights_mb"] / base["weights_mb"], 4),
        "resident_ratio": round(four["resident_mb"] / base["resident_mb"], 4),
    }


if __name__ == "__main__":
    if "--child" in sys.argv:
        print(json.dumps(child(sys.argv[-2], sys.argv[-1] == "1")))
        sys.exit()
    rows = [measure(stored) for stored in STORED]
    for row in rows:
        print(json.dumps(row))
    if "--print" not in sys.argv:
        write("role_memory", rows)
