"""xray finds what it is there to find: each rule broken on purpose, by a kernel of xray_kernels.py.

The compiler runs in processes of its own, because the tests' own process may have switched Triton
to its interpreter.
"""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

from fastrlhf.cli import main as fastrlhf
from fastrlhf_kernels import xray
from fastrlhf_kernels._occupancy import LIMITS, occupancy

pytest.importorskip("triton")
KERNELS = str(Path(__file__).parent / "xray_kernels.py")
KEYS = [
    "kernel", "config", "dtype", "target", "triton",
    "registers", "spills", "shared_bytes", "matrix_instructions", "occupancy",
]  # fmt: skip


LOOKS = {
    "sound": "--json --kernel product --kernel row* --target sm_90 --target sm_100 --target gfx942",
    "spills": "--json --kernel spilling* --target sm_80",
    "shared": "--json --kernel wide* --target sm_86",
    "narrow": "--kernel narrow* --kernel broken* --target sm_90",
    "exact": "--json --kernel exact* --target sm_120",
    "unsaid": "--json --kernel unsaid* --target sm_80",
}
SCRIPT = """
import contextlib, io, json, sys
from fastrlhf_kernels.xray import main
seen = {}
for name, words in json.loads(sys.argv[1]).items():
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(words)
    seen[name] = (status, out.getvalue(), err.getvalue())
print(json.dumps(seen))
"""


@pytest.fixture(scope="module")
def looks(tmp_path_factory):
    """What xray answers each of LOOKS, from an empty cache: status, output, sentences."""
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    words = {name: [KERNELS, "--check", *line.split()] for name, line in LOOKS.items()}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(words)],
        stdout=subprocess.PIPE, text=True, env=environment, check=True,
    )  # fmt: skip
    seen = {}
    for name, (status, out, err) in json.loads(done.stdout).items():
        said = [line for line in err.splitlines() if line.startswith("fastrlhf xray:")]
        seen[name] = (status, json.loads(out)["kernels"] if "--json" in LOOKS[name] else out, said)
    return seen


def test_sound_kernels_pass_on_both_vendors(looks):
    status, rows, said = looks["sound"]
    assert (status, said) == (0, [])
    assert [list(row) for row in rows] == [KEYS] * 6
    by_name = {(row["kernel"], row["target"]): row for row in rows}
    for target in ("sm_90", "sm_100", "gfx942"):
        row, product = by_name["row_maximum", target], by_name["product", target]
        assert row["matrix_instructions"] == 0 < product["matrix_instructions"]
        assert row["spills"] == product["spills"] == 0
        assert 0 < row["registers"] < product["registers"]
        assert row["occupancy"] == 1 > product["occupancy"] > 0
        # At least two stages of a 128 × 64 and a 64 × 128 tile of two bytes.
        assert product["shared_bytes"] >= 2 * 2 * 128 * 64 * 2


def test_a_spill_is_found(looks):
    status, rows, said = looks["spills"]
    assert status == 1 and rows[0]["spills"] > 100
    assert len(said) == 1 and f"{rows[0]['spills']} accesses to local memory" in said[0]


def test_shared_memory_beyond_the_target_is_found(looks):
    status, rows, said = looks["shared"]
    assert status == 1 and rows[0]["shared_bytes"] > 101376 and rows[0]["occupancy"] == 0
    assert len(said) == 1 and "of shared memory; a block has 101376 there" in said[0]


def test_a_product_without_wgmma_and_one_in_small_tiles_are_found(looks):
    status, table, said = looks["narrow"]
    assert status == 1 and "narrow_product" in table and "64x64x32 w2 s2" in table
    assert len(said) == 3
    assert "without wgmma; it has HMMA" in said[1] and "tiles of 64 × 64" in said[2]
    assert "broken_product [48x64x32 w4 s2, bf16] on sm_90 does not compile" in said[0]


def test_a_product_without_matrix_instructions_is_found(looks):
    status, rows, said = looks["exact"]
    assert status == 1 and rows[0]["matrix_instructions"] == 0
    assert len(said) == 1 and "without matrix instructions" in said[0]


def test_a_product_is_one_whatever_its_variant_says(looks):
    status, rows, said = looks["unsaid"]
    assert status == 1 and rows[0]["matrix_instructions"] > 0
    assert "tiles of 64 × 64" in said[-1]


def test_an_interrupt_is_a_line(monkeypatch, capsys):
    def interrupted(words):
        raise KeyboardInterrupt

    monkeypatch.setattr(xray, "main", interrupted)
    assert fastrlhf(["xray"]) == 130
    assert capsys.readouterr().err == "fastrlhf: interrupted\n"


def row_of(target: str, **changes) -> xray.Row:
    row = xray.Row("product", "", "bf16", target, "3.9.0", 128, 0, 65536, 8, 0.25)
    return row._replace(**changes)


@pytest.mark.parametrize("target", LIMITS)
def test_rules(target):
    def broken(row, *, instructions, tiles=((128, 128),), columns=0, matrix=True, least=128):
        variant = SimpleNamespace(matrix=matrix, smallest_tile=(128, least))
        return list(xray.violations(row, variant, Counter(instructions), list(tiles), columns))

    good = row_of(target)
    assert broken(good, instructions=["HGMMA"]) == []
    assert broken(good, instructions=[], matrix=False) == []
    assert len(broken(good, instructions=["HMMA"])) == (target == "sm_90")
    small = broken(good, instructions=["QGMMA"], tiles=[(128, 256), (128, 64)])
    assert len(small) == (target not in ("sm_120", "gfx942"))
    assert broken(good, instructions=["QGMMA"], tiles=[(128, 64)], least=64) == []
    (unread,) = broken(good, instructions=["HGMMA"], tiles=[])
    assert "without a tile that could be read" in unread
    assert broken(good, instructions=[], tiles=[], matrix=False) == []
    assert len(broken(good, instructions=["HGMMA"], columns=513)) == 1
    limit = LIMITS[target].shared_block
    assert broken(row_of(target, shared_bytes=limit), instructions=["HGMMA"]) == []
    assert len(broken(row_of(target, shared_bytes=limit + 1), instructions=["HGMMA"])) == 1


def test_instructions_are_told_apart():
    code = """
        HMMA.16816.F32.BF16 R4, R8, R12, R4 ;  HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4] ;
        UTCHMMA gdesc[UR8], gdesc[UR10], tmem[UR4] ;  UTCBAR [UR4] ;  WARPGROUP.ARRIVE ;
        QMMA.16832 ;  STL [R1], R3 ;  LDL.LU R36, [R1+0x4] ;  LDSM.16.M88.4 R4 ;  STS [R2], R4 ;
        v_mfma_f32_16x16x16_bf16 a[0:3], v[0:1] ;  scratch_load_dword v1 ;  v_accvgpr_write_b32 a1
    """
    found = ["HMMA", "HGMMA", "UTCHMMA", "QMMA", "v_mfma_"]
    assert xray.MATRIX.findall(code) == found
    assert xray.LOCAL.findall(code) == ["STL", "LDL", "scratch_load_"]


def test_occupancy():
    # The last factor in each case is what limits; figures of NVIDIA's occupancy calculator.
    assert occupancy("sm_80", warps=8, registers=64, shared_bytes=0) == 32 / 64
    assert occupancy("sm_80", warps=8, registers=65, shared_bytes=0) == 24 / 64
    assert occupancy("sm_86", warps=32, registers=32, shared_bytes=0) == 32 / 48
    assert occupancy("sm_86", warps=1, registers=32, shared_bytes=0) == 16 / 48
    assert occupancy("sm_80", warps=4, registers=32, shared_bytes=163 * 1024) == 4 / 64
    assert occupancy("sm_80", warps=4, registers=32, shared_bytes=81 * 1024) == 8 / 64
    assert occupancy("sm_80", warps=4, registers=32, shared_bytes=81 * 1024 + 1) == 4 / 64
    tensor = dict(warps=4, registers=32, shared_bytes=0)
    assert occupancy("sm_100", tensor_columns=256, **tensor) == 8 / 64
    assert occupancy("sm_100", tensor_columns=1024, **tensor) == 0
    # Waves of a SIMD, of 8, as LLVM notes them in the assembly for these register counts.
    for registers, waves in ((14, 8), (94, 5), (126, 4), (128, 4), (256, 2), (457, 1), (512, 1)):
        assert occupancy("gfx942", warps=4, registers=registers, shared_bytes=0) == waves / 8


@pytest.mark.parametrize("source", [KERNELS, *xray.sources()], ids=lambda name: Path(name).name)
def test_variants_fit_their_kernels(source):
    for target in LIMITS:
        seen = set()
        for variant in xray.variants_of(source, target):
            typed = {name for name, kind in variant.signature.items() if kind != "constexpr"}
            assert not typed & set(variant.constexprs), variant.name
            assert typed | set(variant.constexprs) == set(variant.kernel.arg_names), variant.name
            assert set(variant.divisible) <= typed, variant.name
            key = (variant.name, variant.config, variant.dtype)
            assert key not in seen, f"two rows named {key}"
            seen.add(key)


def test_what_xray_refuses(monkeypatch, capsys, tmp_path):
    def refused(*words: str) -> str:
        assert fastrlhf(["xray", *words]) == 2
        captured = capsys.readouterr()
        assert captured.out == "" and "Traceback" not in captured.err
        return captured.err

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "TRITON_INTERPRET is set" in refused()
    monkeypatch.delenv("TRITON_INTERPRET")
    empty = tmp_path / "nothing.py"
    empty.write_text("")
    assert "has no variants(target)" in refused(str(empty))
    assert "no file 'nowhere.py'" in refused("nowhere.py")
    assert "no such kernel" in refused(KERNELS, "--kernel", "nothing")
    monkeypatch.setattr(xray, "find_spec", lambda name: None)
    assert "pip install 'triton>=3.6'" in refused()
