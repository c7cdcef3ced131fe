"""One command for a GPU: its plan, and a dry run that is interrupted and goes on."""

import argparse
import itertools
import json
import re
import signal

import pytest
import torch
from support import commands

from benchmarks.gpu import checks, steps, table
from benchmarks.gpu.results import Results

ROOT = commands.PACKAGE.parent
KINDS = ("machine", "checks", "layer")


def start(*arguments):
    return commands.start(
        "benchmarks.gpu", *arguments, prelude=commands.HEAR_INTERRUPTIONS, cwd=ROOT
    )


def table_of(folder):
    return commands.run("benchmarks.gpu", "--table", folder, cwd=ROOT).stdout


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """A dry run that was interrupted while its second step was at work."""
    folder = tmp_path_factory.mktemp("gpu") / "results"
    process = start("--dry-run", "--minutes", 10, "--output", folder, "--only", *KINDS)
    lines = []
    while not lines or not lines[-1].startswith("machine: done"):
        lines.append(process.stdout.readline())
        assert lines[-1], process.stderr.read()
    process.send_signal(signal.SIGINT)
    (ended,) = commands.finish(process)
    assert ended.returncode == 130
    assert "run the same command again to go on" in ended.stderr
    return folder


def test_what_was_found_before_an_interruption_is_kept(interrupted):
    content = json.loads((interrupted / "results.json").read_text())
    found = content["steps"]["machine"]
    assert found["status"] == "done" and found["result"]["copy_bytes_per_second"] > 0
    assert content["steps"].get("checks fp32", {}).get("status") in (None, "interrupted")
    assert "layer fp32 d=16" not in content["steps"]
    printed = table_of(interrupted)
    assert printed == (interrupted / "summary.md").read_text()
    assert re.search(r"\| machine +\| +done \|", printed) and "## Layers" not in printed


def test_a_second_start_does_what_is_missing(interrupted):
    (first,) = commands.finish(
        start("--dry-run", "--minutes", 10, "--output", interrupted, "--only", *KINDS)
    )
    assert first.returncode == 0, first.stderr
    assert first.stdout.startswith("1 of 3 steps were done before\n2 steps, about ")
    found = Results(interrupted)
    assert [found.done(step) for step in found.steps] == [True] * 3
    rows = found.result("checks fp32")["rows"]
    assert {row["backend"] for row in rows} >= {"loop", "sorted"}
    assert all(row["passed"] for row in rows)
    assert checks.AGAIN in {row["check"] for row in rows}
    assert "checks fp32: done in" in first.stdout and f"{len(rows)} of {len(rows)} passed" in (
        first.stdout
    )
    printed = table_of(interrupted)
    assert printed in first.stdout and "switch / dense" in printed
    # Of each step its output, too.
    assert "== layer fp32 d=16: done" in (interrupted / "log.txt").read_text()


@pytest.mark.slow
def test_the_whole_dry_run(tmp_path):
    result = commands.run("benchmarks.gpu", "--dry-run", "--output", tmp_path / "new", cwd=ROOT)
    found = Results(tmp_path / "new")
    assert {name.split()[0] for name in found.steps} == {
        *("machine", "checks", "kernels", "layer", "train", "generate", "operators")
    }
    assert all(map(found.done, found.steps))
    for head in ("Checks", "Layers", "Kernels", "Operators", "Training", "Decoding"):
        assert f"\n## {head}" in result.stdout


def test_timed_steps_have_the_machine_to_themselves(tmp_path):
    plan = steps.plan(steps.GPU, tmp_path)
    assert len({step.name for step in plan}) == len(plan)
    kinds = list(dict.fromkeys(step.name.split()[0] for step in plan))
    assert kinds == [
        *("machine", "checks", "compile", "kernels", "layer"),
        *("train", "generate", "operators", "tests", "study"),
    ]
    (sweep,) = steps.plan(steps.GPU, tmp_path, only=["sweep"])
    assert sweep.timed and sweep.command[-1] == "--settings"
    stages = steps.stages(plan)
    assert [step for stage in stages for step in stage] == plan
    assert all(len(stage) == 1 for stage in stages for step in stage if step.timed)
    assert [len(stage) for stage in stages if not stage[0].timed] == [13, 3]
    # All of it fits into the minutes that it takes by default.
    assert sum(max(step.seconds for step in stage) for stage in stages) < 8 * 60


def test_what_does_not_fit_is_left_out(tmp_path):
    result = commands.run(
        *("benchmarks.gpu", "--dry-run", "--minutes", 0.06, "--output", tmp_path, "--only"),
        *("machine", "checks"),
        cwd=ROOT,
    )
    reason = r": left out, it takes about \d+ s, \d s are left"
    assert re.search(f"machine{reason}\nchecks fp32{reason}\n", result.stdout)
    statuses = [step["status"] for step in Results(tmp_path).steps.values()]
    assert statuses == ["left out", "left out"]


def test_results_of_another_machine_are_not_mixed(tmp_path):
    Results(tmp_path).begin({"gpu": "NVIDIA H100", "driver": "580", "dry_run": False})
    result = start("--dry-run", "--output", tmp_path)
    (ended,) = commands.finish(result)
    assert ended.returncode == 2
    assert "holds results of NVIDIA H100, driver 580, not of a dry run on" in ended.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "say where the results go with --output DIR"),
        (("--table", "nowhere"), "--table nowhere holds no results.json"),
        (("--output", "x", "--minutes", "0"), "--minutes 0.0 does nothing; give more than 0"),
        (("--output", "x", "--dry-run", "--study", "y"), "--study y holds no plan.yaml"),
    ],
)
def test_mistakes(arguments, message, monkeypatch, capsys, tmp_path):
    from benchmarks.gpu import __main__ as command

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["gpu", *arguments])
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    assert command.main() == 2
    assert message in capsys.readouterr().err


def test_other_bits_fail_the_check_of_them(monkeypatch):
    draw = itertools.count()
    sizes = {"embed_dim": 4, "ffn_dim": 8, "num_experts": 3, "tokens": 5}
    args = argparse.Namespace(**sizes, device="cpu", dtype="float32")
    assert checks._again(args, "sorted", 0.1)["passed"]
    results = checks._results
    monkeypatch.setattr(
        checks, "_results", lambda *each: {**results(*each), "x": torch.tensor(next(draw))}
    )
    found = checks._again(args, "sorted", 0.1)
    assert not found["passed"]
    assert {name for name, error in found["errors"].items() if error} == {
        f"{router}: x" for router in checks.SUMS_BY_TOKEN
    }


def test_the_cost_of_determinism_is_measured_once():
    flags = {step.name: "--deterministic" in step.command for step in steps.plan(steps.GPU, None)}
    assert [name for name, found in flags.items() if found] == ["train bf16 4096"]
    rows = [{"arm": arm, "words": [9, 9], "seconds": [1.0, 1.0]} for arm in ("dense", "switch")]
    extra = {**rows[1], "arm": "switch, deterministic", "seconds": [2.0, 2.0]}
    text = table._trainings(
        [("train a 1", {"rows": rows}), ("train b 2", {"rows": [*rows, extra]})]
    )
    assert re.search(r"\n\| a 1 tokens a batch \|[^|]*9 \|[^|]*1.00[^|]*\| +\|\n", text)
    assert re.search(r"\n\| b 2 tokens a batch \|[^|]*9 \|[^|]*1.00[^|]*\|[^|]* 0.50 [^|]*\|", text)


def test_the_summary_of_a_failed_check_says_so():
    row = {"check": "numbers", "backend": "triton", "dtype": "bfloat16", "dropout": 0.0}
    errors = {"errors": {"y": 0.5}, "yardsticks": {"y": 0.001}}
    rows = [{**row, "passed": False, **errors}, {**row, "passed": False, "error": "no\nkernel"}]
    assert table.headline("checks bf16", {"rows": rows}) == "0 of 2 passed"
    text = checks.table(rows)
    assert re.search(r"NO \| +5\.0e-01 \| +y \| +1\.0e-03 \|", text)
    assert re.search(r"NO \| +no \|", text)
