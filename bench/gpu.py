"""The project on a machine with a CUDA GPU and no network: its tests, then its benchmarks.

    make gpu                      build, tests, benchmarks
    make gpu PART=tests           one part (see PARTS), each meant to stay under nine minutes
    make gpu PART=tests/test_x.py one file of tests
    make gpu WHEELS=folder        packages that the machine lacks, as wheels
    make gpu RESULTS=folder       where the rows go; bench/results/ without it
    FASTRLHF_COMMIT=1a2b3c4 make gpu   what rows say they were measured at, where git is not there

Builds with the Python that has torch, without isolation and into build/gpu, so that nothing is
installed. Every part keeps its rows; a package that is missing is named and left out. Tests run in
eight processes where pytest-xdist is there.

With RESULTS=folder a part's file holds the rows of that run alone: into one folder the parts come
together; from several, append the files of one device to each other (rows are lines) and put the
whole into bench/results/. A row of the same group that stands further down is the later one.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree
from importlib.util import find_spec
from pathlib import Path
from typing import Any

if find_spec("torch") is None:
    sys.exit(f"make gpu: {sys.executable} has no torch; name the Python that has it: PYTHON=path")

import torch
from plan import SHAPES, check_names
from results import RESULTS, ROOT, slug, stamp

BUILD = ROOT / "build" / "gpu"
WHEELS = ROOT / "build" / "wheels"
PARTS = ("tests", *(shape for shape in SHAPES if shape != "64x1024"), "tokens")
"""the test suite; every op at one model's head; the ops that see no vocabulary"""
BUILD_NEEDS = ("scikit_build_core", "nanobind", "pytest", "pytest_benchmark")
OPTIONAL = {
    "hypothesis": "the property tests",
    "trl": "TRL's rows and adapter tests",
    "liger_kernel": "Liger's rows",
    "bitsandbytes": "8-bit rows, and the tests of quantised weights",
    "peft": "the trainer's tests",
    "transformers": "the trainer's tests",
    "datasets": "the tests of TRL's trainers and of docs/integrations.md",
    "matplotlib": "plots",
}


def environment() -> dict[str, str]:
    """That of the children: this build first, and Triton's kernels compiled, not interpreted."""
    variables = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    paths = [str(BUILD), str(WHEELS), variables.get("PYTHONPATH", "")]
    return variables | {"PYTHONPATH": os.pathsep.join(path for path in paths if path)}


def has(package: str) -> bool:
    """Whether the children will find a package."""
    return find_spec(package) is not None or (WHEELS / package).is_dir()


def pip(*words: str) -> None:
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
    subprocess.run([*command, "--upgrade", *words], check=True, env=environment())


def build(wheels: str | None) -> None:
    if wheels:
        found = [str(path) for path in sorted(Path(wheels).glob("*.whl"))]
        if not found:
            sys.exit(f"make gpu: no wheels in {wheels}")
        pip("--target", str(WHEELS), *found)
    missing = [name for name in BUILD_NEEDS if not has(name)]
    if missing:
        sys.exit(
            f"make gpu: {sys.executable} has no {', '.join(missing)}. Bring them as wheels: on a "
            "machine with a network, pip download --no-deps -d wheels NAME for this one's Python, "
            "then make gpu WHEELS=wheels"
        )
    for name, what in OPTIONAL.items():
        if not has(name):
            print(f"make gpu: skipped: {what} ({name} is not installed)", flush=True)
    pip("--no-build-isolation", "--target", str(BUILD), str(ROOT))
    reason = not_compiled()
    if reason:
        print(f"make gpu: skipped: the C++ kernels ({reason})", flush=True)


def not_compiled() -> str | None:
    """Why the children cannot load the C++ kernels; None where they can."""
    command = [sys.executable, "-P", "-c", "import torch, fastrlhf_kernels._csrc"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
    return said[-1] if done.returncode else None


def pytest(*words: str) -> int:
    # -P: not the sources beside this, which have no compiled module, but the build.
    command = [sys.executable, "-P", "-m", "pytest", *words]
    return subprocess.run(command, cwd=ROOT, env=environment()).returncode


def tests(folder: Path) -> int:
    """The whole suite; what it came to is a row of tests-<device>.jsonl."""
    begun, stamped = time.perf_counter(), stamp("cuda")
    with tempfile.TemporaryDirectory() as place:
        report = Path(place) / "report.xml"
        # A file that cannot be imported for want of a package is an error of its own.
        options = ["--continue-on-collection-errors", "--junitxml", str(report)]
        if has("xdist") and has("execnet"):
            options += ["-n", "8"]
        status = pytest(str(ROOT / "tests"), *options)
        counts = read_report(report) if report.exists() else {}
    row = stamped | {"bench": "tests", "status": status} | counts
    row["seconds"] = round(time.perf_counter() - begun, 1)
    path = folder / f"tests-{slug(stamped['device'])}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(row) + "\n")
    print(f"tests: {json.dumps(row)}", flush=True)
    return status


def read_report(path: Path) -> dict[str, Any]:
    """Counts of a JUnit report, and the names of what failed and what was skipped, with why."""
    cases = list(xml.etree.ElementTree.parse(path).iter("testcase"))
    failed, skipped = [], {}
    for case in cases:
        name = f"{case.get('classname')}::{case.get('name')}"
        if case.find("failure") is not None or case.find("error") is not None:
            failed.append(name)
        skip = case.find("skipped")
        if skip is not None:
            skipped[name] = skip.get("message") or ""
    passed = len(cases) - len(failed) - len(skipped)
    return {"passed": passed, "failed": failed, "skipped": skipped}


def measure(part: str, folder: Path) -> int:
    if not find_spec("triton"):
        print("make gpu: skipped: our Triton kernels (triton is not installed)", flush=True)
    shape = "64x1024" if part == "tokens" else part
    path = folder / f"ops-{slug(torch.cuda.get_device_name())}.jsonl"
    options = ["--device", "cuda", "--shape", shape, "--results", str(path), "--benchmark-quiet"]
    return pytest(str(ROOT / "bench"), *options)


def main() -> int:
    parser = argparse.ArgumentParser(prog="make gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--part", action="append", default=[], help=", ".join(PARTS))
    parser.add_argument("--wheels", metavar="FOLDER")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER")
    arguments = parser.parse_args()
    try:
        check_names("part", (x for x in arguments.part if not x.startswith("tests/")), PARTS)
    except ValueError as error:
        parser.error(str(error))
    if not torch.cuda.is_available():
        print(
            f"make gpu: no CUDA device: torch {torch.__version__} of {sys.executable} sees none. "
            "Run it on a machine with a GPU, with PYTHON= the Python that has its torch.",
            file=sys.stderr,
        )
        return 3
    print(f"make gpu: {torch.cuda.get_device_name()}, torch {torch.__version__}", flush=True)
    build(arguments.wheels)
    status = 0
    for part in arguments.part or PARTS:
        begun = time.perf_counter()
        folder = arguments.results.resolve()
        if part.startswith("tests/"):
            failed = pytest(part)
        else:
            failed = tests(folder) if part == "tests" else measure(part, folder)
        print(f"make gpu: {part}: {time.perf_counter() - begun:.0f} s", flush=True)
        status = status or failed
    return status


if __name__ == "__main__":
    sys.exit(main())
