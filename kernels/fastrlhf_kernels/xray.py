"""`fastrlhf xray`: what every Triton kernel compiles to, for every target, without a GPU.

Each kernel module lists what its launchers can launch (`variants(target)`). xray compiles those
and reads the machine code:

- registers: of one lane (AMD: accumulation registers included).
- spills: instructions that access local memory (LDL, STL; AMD: scratch_*). Registers that AMD's
  compiler keeps in accumulation registers are not spills.
- shared memory: bytes a block asks for.
- matrix instructions: how many stand in the code (HMMA, HGMMA, UTCHMMA, v_mfma …).
- occupancy: the share of a multiprocessor's warps that this leaves room for (`_occupancy`).

Which arguments are multiples of 16 is for the variants to say (`Variant.divisible`).

`--check` fails on a spill, on more shared memory than the target has, on a matrix product without
matrix instructions (on sm_90: without wgmma), and on one in tiles below 128 × 128 on sm_80 to
sm_100. What has a product in it is one, whatever its variant says. A variant
may name a smaller tile where that one spills (`Variant.smallest_tile`). Refuses to run under
TRITON_INTERPRET, which compiles nothing.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from fnmatch import fnmatch
from functools import cache
from importlib import import_module
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

from ._occupancy import LIMITS, TENSOR_COLUMNS, occupancy

if TYPE_CHECKING:
    from ._triton import Variant

__all__ = ["main"]

TILED = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100")
"""where a matrix product has to use tiles of at least its variant's `smallest_tile`"""
MATRIX = re.compile(r"\b(?:UTC[A-Z]+MMA|[A-Z]G?MMA)\b|\bv_s?mfmac?_")
WARPGROUP = re.compile(r"[A-Z]GMMA")
LOCAL = re.compile(r"\b(?:LDL|STL)\b|\bscratch_(?:load|store)_")
DOT = re.compile(r"\btt\.dot(?:_scaled)?\b.*-> tensor<(\d+)x(\d+)x")


class Task(NamedTuple):
    source: str
    """a module's name, or the path of a file"""
    target: str
    place: int
    """of the variant among those of its module and target"""


class Row(NamedTuple):
    kernel: str
    config: str
    dtype: str
    target: str
    triton: str
    registers: int
    spills: int
    shared_bytes: int
    matrix_instructions: int
    occupancy: float


class Compiled(NamedTuple):
    row: Row
    violations: list[str]


def sources() -> list[str]:
    """The package's kernel modules; others named like them hold what kernels share."""
    paths = sorted(Path(__file__).parent.glob("_triton_*.py"))
    return [f"{__package__}.{x.stem}" for x in paths if "\ndef variants(" in x.read_text()]


@cache
def load(source: str) -> ModuleType:
    if not source.endswith(".py"):
        return import_module(source)
    spec = spec_from_file_location(Path(source).stem, source)
    if spec is None or spec.loader is None or not Path(source).is_file():
        raise FileNotFoundError(f"no file {source!r}")
    module = module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@cache
def variants_of(source: str, target: str) -> "tuple[Variant, ...]":
    return tuple(load(source).variants(target))


def built(variant: "Variant", target: str) -> Any:
    """The compiled kernel, from Triton's cache where it is there."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if target.startswith("gfx"):
        machine = GPUTarget("hip", target, 64)
    else:
        machine = GPUTarget("cuda", int(target.removeprefix("sm_")), 32)
    source = ASTSource(
        fn=variant.kernel, signature=dict(variant.signature),
        constexprs=dict(variant.constexprs), attrs=variant.attrs,
    )  # fmt: skip
    options = dict(num_warps=variant.num_warps, num_stages=variant.num_stages)
    return triton.compile(source, target=machine, options=options)


def tool(name: str, *words: str) -> str:
    """The output of a tool that ships in Triton's wheel."""
    import triton

    command = [getattr(triton.knobs.nvidia, name).path, *words]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise RuntimeError(f"nothing like {pattern} in the compiler's output")
    return int(found[1])


def read_nvidia(kernel: Any) -> tuple[int, int, str]:
    """Registers, warps of a block, and the instructions worth counting."""
    warps = number(r"\.(?:req|max)ntid (\d+)", kernel.asm["ptx"]) // 32
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = tool("cuobjdump", "-res-usage", file.name)
        # Disassembling takes longer than compiling. Without a product in the source and without
        # a stack there is nothing to count.
        needless = "tt.dot" not in kernel.asm["ttir"] and number(r"STACK:(\d+)", usage) == 0
        code = "" if needless else tool("nvdisasm", "-c", file.name)
    return number(r"REG:(\d+)", usage), warps, code


def read_amd(kernel: Any) -> tuple[int, int, str]:
    code = kernel.asm["amdgcn"]
    threads = number(r"\.max_flat_workgroup_size:\s+(\d+)", code)
    return number(r"\.vgpr_count:\s+(\d+)", code), threads // 64, code


def xray(task: Task) -> Compiled | str:
    """Compiles one variant; the error as a sentence if it does not compile."""
    import triton

    # What a later Triton will do by default is not for who reads this table.
    warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION")
    variant = variants_of(task.source, task.target)[task.place]
    name = f"{variant.name} [{variant.config}, {variant.dtype}] on {task.target}"
    try:
        kernel = built(variant, task.target)
    except Exception as error:
        said = str(error).strip() or type(error).__name__
        return f"{name} does not compile: {said.splitlines()[-1]}"
    read = read_amd if task.target.startswith("gfx") else read_nvidia
    registers, warps, code = read(kernel)
    instructions = Counter(MATRIX.findall(code))
    columns = getattr(kernel.metadata, "tmem_size", None) or 0
    shared = kernel.metadata.shared
    row = Row(
        variant.name, variant.config, variant.dtype, task.target, triton.__version__,
        registers, len(LOCAL.findall(code)), shared, instructions.total(),
        occupancy(
            task.target, warps=warps, registers=registers, shared_bytes=shared,
            tensor_columns=columns,
        ),
    )  # fmt: skip
    ttir = kernel.asm["ttir"]
    tiles = [(int(m), int(n)) for m, n in DOT.findall(ttir)]
    variant = variant._replace(matrix=variant.matrix or "tt.dot" in ttir)
    broken = list(violations(row, variant, instructions, tiles, columns))
    return Compiled(row, [f"{name} {what}" for what in broken])


def violations(
    row: Row,
    variant: "Variant",
    instructions: Counter[str],
    tiles: list[tuple[int, int]],
    columns: int,
) -> Iterator[str]:
    """What `--check` fails on, each as the end of a sentence."""
    limit = LIMITS[row.target].shared_block
    if row.spills:
        yield f"spills: {row.spills} accesses to local memory with {row.registers} registers"
    if row.shared_bytes > limit:
        yield f"asks for {row.shared_bytes} bytes of shared memory; a block has {limit} there"
    if columns > TENSOR_COLUMNS:
        yield f"asks for {columns} columns of tensor memory; a block has {TENSOR_COLUMNS}"
    if not variant.matrix:
        return
    if not instructions:
        yield "is a matrix product without matrix instructions"
    elif row.target == "sm_90" and not any(WARPGROUP.fullmatch(name) for name in instructions):
        yield f"is a matrix product without wgmma; it has {', '.join(instructions)}"
    if not tiles:
        yield "is a matrix product without a tile that could be read from Triton's code"
    rows, cols = variant.smallest_tile
    small = [f"{m} × {n}" for m, n in tiles if m < rows or n < cols]
    if small and row.target in TILED:
        yield f"multiplies in tiles of {small[0]}; at least {rows} × {cols} is asked for"


def every(tasks: Sequence[Task], jobs: int) -> Iterator[Compiled | str]:
    """Results in order, with a progress bar on standard error."""
    from rich.console import Console
    from rich.progress import track

    bar = dict(console=Console(stderr=True), transient=True, total=len(tasks))
    if jobs == 1:
        yield from track(map(xray, tasks), "compiling", **bar)  # type: ignore[arg-type]
        return
    # Forked, so that torch and Triton are imported once.
    # Ctrl-C is for this process, which cancels what waits: no worker prints a traceback.
    deaf = dict(initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN))
    with ProcessPoolExecutor(jobs, mp_context=get_context("fork"), **deaf) as pool:  # type: ignore[call-overload]
        yield from track(pool.map(xray, tasks), "compiling", **bar)  # type: ignore[arg-type]


def table(rows: Sequence[Row]) -> None:
    from rich.console import Console
    from rich.table import Table

    grid = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("kernel", "config", "dtype", "target"):
        grid.add_column(name, overflow="fold")
    for name in ("registers", "spills", "shared bytes", "matrix instr.", "occupancy"):
        grid.add_column(name, justify="right")
    for row in rows:
        spills = f"[red]{row.spills}[/red]" if row.spills else "0"
        over = row.shared_bytes > LIMITS[row.target].shared_block
        shared = f"[red]{row.shared_bytes}[/red]" if over else str(row.shared_bytes)
        grid.add_row(
            row.kernel, row.config, row.dtype, row.target, str(row.registers), spills, shared,
            str(row.matrix_instructions), f"{row.occupancy:.0%}",
        )  # fmt: skip
    # Into a file or a pipe, a line stays a line.
    console = Console() if sys.stdout.isatty() else Console(width=160)
    console.print(grid)
    if rows:
        console.print(f"\n{len(rows)} kernels, Triton {rows[0].triton}", highlight=False)


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="fastrlhf xray",
        description="Compile every Triton kernel, without a GPU, and show registers, spills, "
        "shared memory, matrix instructions and the occupancy that they allow.",
    )
    parser.add_argument(
        "files", nargs="*", metavar="FILE.py",
        help="files with a variants(target); default: the package's kernels",
    )  # fmt: skip
    parser.add_argument(
        "--target", action="append", choices=list(LIMITS), help="repeatable; default: all"
    )
    parser.add_argument(
        "--kernel", action="append", metavar="NAME", help="only these; repeatable, * is allowed"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, metavar="N")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON only")
    parser.add_argument("--check", action="store_true", help="exit 1 if a rule is broken")
    return parser.parse_args(argv)


def refuse(sentence: str) -> int:
    print(f"fastrlhf xray: error: {sentence}", file=sys.stderr)
    return 2


def main(argv: Sequence[str] | None = None) -> int:
    """The command line of `fastrlhf xray`; returns the exit status.

    0, or 1 where a kernel does not compile or (with --check) breaks a rule, or 2 where nothing
    can be compiled at all.
    """
    arguments = parsed(argv)
    if os.environ.get("TRITON_INTERPRET", "0").lower() not in ("", "0", "false", "off", "n", "no"):
        return refuse("TRITON_INTERPRET is set, under which nothing is compiled; unset it")
    if find_spec("triton") is None:
        return refuse("Triton is not installed; pip install 'triton>=3.6' (Linux)")
    targets = arguments.target or list(LIMITS)
    tasks = []
    for source in arguments.files or sources():
        try:
            if not hasattr(load(source), "variants"):
                return refuse(f"{source} has no variants(target)")
        except FileNotFoundError as error:
            return refuse(str(error))
        for target in targets:
            for place, variant in enumerate(variants_of(source, target)):
                if any(fnmatch(variant.name, name) for name in arguments.kernel or "*"):
                    tasks.append(Task(source, target, place))
    if not tasks:
        return refuse("there is no such kernel")
    results = list(every(tasks, max(1, min(arguments.jobs, len(tasks)))))
    rows = [result.row for result in results if isinstance(result, Compiled)]
    if arguments.json:
        print(json.dumps({"kernels": [row._asdict() for row in rows]}))
    else:
        table(rows)
    failures = [result for result in results if isinstance(result, str)]
    if arguments.check:
        failures += [v for result in results if isinstance(result, Compiled) for v in result[1]]
    for sentence in failures:
        print(f"fastrlhf xray: {sentence}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
