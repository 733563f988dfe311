"""How many warps a multiprocessor can hold at once, from what one block takes.

The limits are those of NVIDIA's CUDA C++ Programming Guide ("Compute Capabilities", tables of
technical specifications) and, for gfx942, of AMD's CDNA3 instruction set manual and LLVM's
AMDGPU back end (`AMDGPU::IsaInfo`). A "multiprocessor" is AMD's compute unit, a "warp" its
wavefront of 64.

    warps by registers = 4 · ⌊512 / ⌈registers⌉₈⌋     four partitions of 512 registers a lane
    blocks             = min(blocks, ⌊warps by registers / w⌋, ⌊warps / w⌋,
                             ⌊shared / ⌈shared of a block + reserved⌉⌋, ⌊512 / tensor columns⌋)
    occupancy          = blocks · w / warps                  with w warps a block

Not modelled: scalar registers (AMD), barriers, clusters.
"""

from typing import NamedTuple

KIB = 1024


class Limits(NamedTuple):
    warps: int
    """resident at once on a multiprocessor"""
    blocks: int
    """resident at once on a multiprocessor"""
    shared: int
    """bytes of shared memory a multiprocessor has for its blocks"""
    shared_block: int
    """bytes of it that one block can be given"""
    shared_reserved: int
    """bytes that the system takes for each block"""
    shared_unit: int
    """bytes; a block's share is rounded up to a multiple"""


LIMITS = {
    "sm_80": Limits(64, 32, 164 * KIB, 163 * KIB, KIB, 128),
    "sm_86": Limits(48, 16, 100 * KIB, 99 * KIB, KIB, 128),
    "sm_89": Limits(48, 24, 100 * KIB, 99 * KIB, KIB, 128),
    "sm_90": Limits(64, 32, 228 * KIB, 227 * KIB, KIB, 128),
    "sm_100": Limits(64, 32, 228 * KIB, 227 * KIB, KIB, 128),
    "sm_120": Limits(48, 24, 100 * KIB, 99 * KIB, KIB, 128),
    "gfx942": Limits(32, 16, 64 * KIB, 64 * KIB, 0, 512),
}
TENSOR_COLUMNS = 512
"""of tensor memory on a multiprocessor of sm_100"""


def up(value: int, unit: int) -> int:
    """`value` rounded up to a multiple of `unit`."""
    return -(-value // unit) * unit


def occupancy(
    target: str, *, warps: int, registers: int, shared_bytes: int, tensor_columns: int = 0
) -> float:
    """Resident warps over the most that a multiprocessor holds; 0 where not one block fits.

    warps: of one block. registers: of one lane, AMD's accumulation registers included.
    shared_bytes: that one block asks for. tensor_columns: of tensor memory, a block (sm_100).
    """
    limits = LIMITS[target]
    if shared_bytes > limits.shared_block or tensor_columns > TENSOR_COLUMNS:
        return 0.0
    # Blocks of one AMD wavefront need no barrier, of which a compute unit has 16.
    alone = target.startswith("gfx") and warps == 1
    by_registers = 4 * (512 // up(max(registers, 1), 8))
    shared = up(shared_bytes + limits.shared_reserved, limits.shared_unit)
    blocks = min(
        limits.warps if alone else limits.blocks,
        by_registers // warps,
        limits.warps // warps,
        limits.shared // shared if shared else limits.warps,
        TENSOR_COLUMNS // tensor_columns if tensor_columns else limits.warps,
    )
    return blocks * warps / limits.warps
