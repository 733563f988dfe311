"""The benchmarks run, say what they should, and turn into tables."""

import importlib.util
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastrlhf import bench_command
from fastrlhf.cli import main

ROOT = Path(__file__).parent.parent
BENCH = ROOT / "bench"


@pytest.fixture(autouse=True)
def bench_modules(monkeypatch):
    monkeypatch.syspath_prepend(BENCH)


def load(name):
    return importlib.import_module(name)


class Benchmark:
    """As much of pytest-benchmark's fixture as a group uses."""

    def pedantic(self, turn, rounds):
        for _ in range(rounds):
            turn()


def sleeping(seconds, value=1.0):
    def call():
        time.sleep(seconds)
        return (torch.tensor([value]),)

    return lambda: call


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Two groups, end to end, in a process of their own; then one of them again."""
    path = tmp_path_factory.mktemp("bench") / "rows.jsonl"
    variables = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [
        sys.executable, "-P", "-m", "pytest", str(BENCH), "--device", "cpu", "--quick", "--tokens",
        "2", "--op", "logprobs", "--op", "whiten", "--without", "trl", "--results", str(path),
        "--benchmark-quiet",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, env=variables)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "logprobs · fwd+bwd · SmolLM2-135M · N 2 V 49152 · bfloat16 · floor" in done.stdout
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rows_have_their_fields(rows):
    groups = {(row["op"], row["mode"], row["variant"], row["dtype"]) for row in rows}
    both = ("float32", "bfloat16")
    assert groups == {
        *(("logprobs", "fwd", "", dtype) for dtype in both),
        *(("logprobs", "fwd", "exact KL", dtype) for dtype in both),
        *(("logprobs", "fwd+bwd", "", dtype) for dtype in both),
        ("whiten", "fwd", "", "float32"),
    }
    providers = {row["provider"] for row in rows if row["op"] == "logprobs"}
    assert providers >= {"eager", "reference", "read", "copy"}
    for row in rows:
        assert 0 < row["p20"] <= row["median"] <= row["p80"]
        assert row["floor"] > 0 and row["rounds"] >= 3
        assert row["ratio_to_floor"] == pytest.approx(row["median"] / row["floor"])
        assert {"device", "torch", "threads", "commit", "peak_extra_mb", "error"} <= row.keys()
        if row["op"] == "logprobs":
            assert (row["N"], row["D"], row["V"]) == (2, None, 49152)
    eager = {tuple(r[x] for x in ("op", "mode", "variant", "dtype")): r["median"] for r in rows
             if r["provider"] == "eager"}  # fmt: skip
    for row in rows:
        key = tuple(row[x] for x in ("op", "mode", "variant", "dtype"))
        assert row["ratio_to_eager"] == pytest.approx(row["median"] / eager[key])


def test_rows_become_tables_and_a_plot(rows, tmp_path, monkeypatch):
    tables = load("tables")
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    monkeypatch.setattr(tables, "PLOT", tmp_path / "kernels.png")
    for table in tables.TABLES.values():
        assert table() == "Not measured yet."
    load("results").merge(tmp_path / "ops-here.jsonl", rows)
    table = tables.TABLES["logprobs"]()
    assert "| SmolLM2-135M | fwd, exact KL | float32 | 2 |" in table
    assert f"Measured on {rows[0]['device']}" in table
    tables.draw()
    assert (tmp_path / "kernels.png").stat().st_size > 1000
    assert "kernels.png" in tables.TABLES["ops_plot"]()


def test_a_group_measured_again_takes_the_place_of_its_rows(tmp_path):
    results = load("results")
    path = tmp_path / "rows.jsonl"
    row = dict.fromkeys(results.GROUP, "x") | {"provider": "cpu", "median": 1.0}
    other = row | {"shape": "y"}
    results.merge(path, [row, row | {"provider": "eager"}])
    results.merge(path, [other])
    results.merge(path, [row | {"median": 2.0}])
    assert results.read_path(path) == [other, row | {"median": 2.0}]


def test_xray_table_shows_the_worst_configuration(tmp_path, monkeypatch):
    tables = load("tables")
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    row = {
        "kernel": "statistics", "config": "a", "dtype": "bf16", "target": "sm_90",
        "triton": "3.9.0", "registers": 120, "spills": 0, "shared_bytes": 65536,
        "matrix_instructions": 8, "occupancy": 2,
    }  # fmt: skip
    worse = {"config": "b", "registers": 255, "matrix_instructions": 4, "occupancy": None}
    (tmp_path / "xray.json").write_text(json.dumps({"kernels": [row, row | worse]}))
    line = tables.TABLES["xray"]().splitlines()[-1]
    assert line == "| statistics | 2 | bf16 | sm_90 | 3.9.0 | 255 | 0 | 65536 | 4 | 2 |"


def test_medians_floors_and_ratios():
    measure = load("measure")
    problem = measure.Problem(
        {"eager": sleeping(0.02), "cpu": sleeping(0.004), "read": sleeping(0.001, 5.0)},
        {"read": 2},
        sizes={"N": 1, "D": None, "V": None},
    )
    group = load("plan").Group("logprobs", "fwd", "", "SmolLM2-135M", "float32", 1)
    measured = measure.measure(Benchmark(), problem, frozenset(), "cpu", 0.1)
    made = {row["provider"]: row for row in measure.rows(group, problem, measured)}
    assert made["read"]["ratio_to_floor"] == pytest.approx(0.5)
    assert made["cpu"]["ratio_to_eager"] == made["cpu"]["median"] / made["eager"]["median"]
    assert made["cpu"]["ratio_to_eager"] < 0.9
    assert made["cpu"]["floor_is"] == "2 × read" and made["cpu"]["error"] == 0.0
    assert measure.percentile([4.0, 1.0, 2.0, 3.0], 0.5) == 2.5


def test_no_time_for_a_wrong_result_and_a_name_for_what_is_missing():
    measure = load("measure")

    def absent():
        raise measure.Missing("trl is not installed")

    def broken():
        raise RuntimeError("a bug of ours")

    right = measure.Problem({"eager": sleeping(0), "trl": absent, "read": sleeping(0)}, {"read": 1})
    measured = measure.measure(Benchmark(), right, frozenset(), "cpu", 0.1)
    assert measured.skipped == {"trl": "trl is not installed"}
    assert min(len(times) for times in measured.seconds.values()) >= 5

    def run(name, make):
        problem = replace(right, calls={**right.calls, name: make})
        return measure.measure(Benchmark(), problem, frozenset(), "cpu", 0.1)

    def exhausted():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    for value in (1.1, float("nan")):
        peer = run("trl", sleeping(0, value))
        assert "from eager, allowed is 1e-03" in peer.skipped["trl"]
        assert set(peer.seconds) == {"eager", "read"} == set(peer.error)
        with pytest.raises(AssertionError, match=r"cpu is .* from eager"):
            run("cpu", sleeping(0, value))
    with pytest.raises(RuntimeError, match="a bug of ours"):
        run("cpu", broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        run("triton", exhausted)
    assert "out of memory" in run("reference", exhausted).skipped["reference"]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_sees_what_a_call_takes():
    extra_mb = load("peak").extra_mb
    taken = extra_mb(lambda: torch.ones(16 * 2**20))
    assert taken is not None and 60 < taken < 90
    assert extra_mb(lambda: None) < 8


def test_the_plan_covers_every_op_head_and_dtype():
    plan = load("plan")
    for device in ("cpu", "cuda"):
        groups = plan.select(device)
        assert len({group.name for group in groups}) == len(groups)
        assert {group.op for group in groups} == set(plan.VARIANTS)
        measured = set(plan.SHAPES) - ({"Qwen3-8B"} if device == "cpu" else set())
        assert {group.shape for group in groups} == measured
        for op in plan.HEADS:
            shapes = {(g.shape, g.dtype) for g in groups if g.op == op}
            assert len(shapes) == 2 * (len(measured) - 1)
        of_logits = {g.shape for g in groups if g.op in plan.LOGITS}
        assert "Qwen2.5-0.5B" in of_logits and "Qwen2.5-1.5B" not in of_logits
    assert load("gpu").PARTS[:2] == ("tests", "Qwen3-8B")
    quick = plan.select("cpu", quickly=True)
    assert {group.op for group in quick} == set(plan.VARIANTS)
    assert {(g.op, g.variant, g.tokens) for g in plan.MUST_SHOW if g.op != "logprobs"} == {
        ("linear_logprobs", "", 2048),
        *(("linear_policy_loss", x, 2048) for x in (plan.FROZEN, plan.TRAINED, plan.HALF)),
    }


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--op", "logprob"], "no op 'logprob': did you mean 'logprobs'?"),
        (["--shape", "llama-3"], "no shape 'llama-3': did you mean 'Llama-3-8B'?"),
        (["--op", "gae", "--shape", "Llama-3-8B"], "nothing is measured for gae, Llama-3-8B"),
    ],
)
def test_names_that_do_not_exist(words, message):
    plan = load("plan")
    given = dict(zip(words[::2], words[1::2], strict=True))
    ops = [given["--op"]] if "--op" in given else []
    shapes = [given["--shape"]] if "--shape" in given else []
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        plan.select("cpu", ops=ops, shapes=shapes)


def test_the_command_line(capfd, tmp_path, monkeypatch):
    assert main(["bench", "--op", "logprob"]) == 2
    assert "did you mean 'logprobs'" in capfd.readouterr().err
    assert main(["bench", "--checkout", str(tmp_path)]) == 2
    said = capfd.readouterr().err
    assert "they are in the source, not in the installed package" in said
    assert "Get the source of fastrlhf and name its folder: fastrlhf bench --checkout PATH" in said
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        bench_command,
        "find_spec",
        lambda name: None if name == "pytest_benchmark" else find_spec(name),
    )
    assert main(["bench", "--quick"]) == 2
    assert "run: pip install pytest pytest-benchmark" in capfd.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="would run everything")
def test_make_gpu_without_a_gpu(capsys, monkeypatch):
    gpu = load("gpu")
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    assert gpu.main() == 3
    assert "make gpu: no CUDA device" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--part", "test"])
    with pytest.raises(SystemExit):
        gpu.main()
    assert "did you mean 'tests'?" in capsys.readouterr().err
    dry = ["make", "-n", "gpu", "PART=tests", "WHEELS=folder", "PYTHON=python3"]
    done = subprocess.run(dry, cwd=ROOT, capture_output=True, text=True)
    assert "python3 bench/gpu.py --part tests --wheels folder" in done.stdout


def test_a_report_of_tests_is_counted(tmp_path):
    (tmp_path / "report.xml").write_text(
        '<testsuites><testsuite><testcase classname="a" name="x"/>'
        '<testcase classname="a" name="y"><failure message="no"/></testcase>'
        '<testcase classname="a" name="z"><skipped message="why"/></testcase>'
        "</testsuite></testsuites>"
    )
    assert load("gpu").read_report(tmp_path / "report.xml") == {
        "passed": 1, "failed": ["a::y"], "skipped": {"a::z": "why"},
    }  # fmt: skip


def test_a_row_names_its_commit(monkeypatch, tmp_path):
    results = load("results")
    monkeypatch.setenv("FASTRLHF_COMMIT", "1a2b3c4")
    assert results.stamp()["commit"] == "1a2b3c4"
    monkeypatch.delenv("FASTRLHF_COMMIT")
    monkeypatch.setattr(results, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert results.commit() == "unknown"
    (tmp_path / "bench").mkdir()
    source, page = tmp_path / "bench" / "plan.py", tmp_path / "README.md"

    def git(*words):
        who = ["-c", "user.name=x", "-c", "user.email=x"]
        subprocess.run(["git", *who, *words], cwd=tmp_path, check=True, capture_output=True)

    for path in (source, page):
        path.write_text("before")
    for words in ("init", "add .", "commit -m x"):
        git(*words.split())
    page.write_text("after")
    clean = results.commit()
    assert clean != "unknown" and "dirty" not in clean
    source.write_text("after")
    assert results.commit() == f"{clean}-dirty"


def test_the_build_is_looked_at(monkeypatch, tmp_path):
    gpu = load("gpu")
    monkeypatch.setattr(gpu, "environment", lambda: {"PYTHONPATH": str(tmp_path)})
    (tmp_path / "torch.py").write_text("raise ImportError('no torch here')")
    assert "no torch here" in gpu.not_compiled()
