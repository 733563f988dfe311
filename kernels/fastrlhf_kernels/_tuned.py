"""The tile sizes that the matrix kernels run with, one file of `tuned/` for each kernel module.

target -> kernel -> width of the operands -> reference -> [BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M,
num_warps, num_stages]. They are chosen by compiling, not by timing: of the tiles that fit the
target's shared memory without a spill, the largest and then the deepest.
"""

import json
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch


class Tiles(NamedTuple):
    block_m: int
    block_n: int
    block_k: int
    group_m: int
    """tiles of rows that pass over the vocabulary together"""
    num_warps: int
    num_stages: int

    def describe(self, *words: str) -> str:
        """As in the listings of `xray`: "128x256x64 w8 s3 shared"."""
        size = f"{self.block_m}x{self.block_n}x{self.block_k}"
        return " ".join([size, f"w{self.num_warps}", f"s{self.num_stages}", *words])


@cache
def _table(name: str) -> dict[str, dict[str, dict[str, dict[str, list[int]]]]]:
    path = Path(__file__).parent / "tuned" / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8"))


@cache
def tiles(name: str, kernel: str, target: str, dtype: torch.dtype, reference: str) -> Tiles:
    """The entry of tuned/`name`.json; KeyError where there is none."""
    return Tiles(*_table(name)[target][kernel][f"{8 * dtype.itemsize}-bit"][reference])
