"""Precision and batch of a study: by the machine that begins it, and kept."""

import json
import re
import shutil

import pytest
from support.small_study import PLAN, TINY, lines_of, study, write_plan
from support.wmt14 import gpus

from fairseq_sparsemixer.errors import UserError
from fairseq_sparsemixer.files import write_json
from fairseq_sparsemixer.runs.folder import STUDY_STATE as STATE
from fairseq_sparsemixer.runs.folder import read_run
from fairseq_sparsemixer.study import runner
from fairseq_sparsemixer.study.machine import KEY, Choice, choose
from fairseq_sparsemixer.study.plan import read_plan
from fairseq_sparsemixer.training.machine import Machine
from fairseq_sparsemixer.training.settings import CONFIGS

CPU, OLD_GPU = Machine([], False), Machine(["Tesla V100"], False)
BF16 = ["common.bf16=true", "common.fp16=false", "dataset.max_tokens=16384"]
FP16 = ["common.fp16=true", "dataset.max_tokens=16384"]
SIZES = [each for each in TINY if "max_tokens" not in each]


@pytest.fixture
def laid_out(tmp_path):
    """What of a study's folder counts here; its plan says nothing of precision and batch."""

    def lay(**changes):
        plan = write_plan(tmp_path / "plan.yaml", "data", **{"overrides": SIZES, **changes})
        return read_plan(plan)

    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "configs").symlink_to(CONFIGS)
    lay.folder = tmp_path / "study"
    return lay


@pytest.mark.parametrize(
    ("machine", "overrides", "text"),
    [
        (gpus(2), BF16, r"\(NVIDIA A100-SXM4-80GB\), .*: bf16, 16,384 tokens in an update"),
        (OLD_GPU, FP16, r"\(Tesla V100\), .*: fp16, 16,384 tokens in an update"),
        (CPU, ["common.fp16=false"], r"\(CPU\), .*: fp32, 800 tokens in an update"),
    ],
)
def test_the_machine_chooses_for_all_runs_alike(laid_out, machine, overrides, text):
    plan = laid_out()
    choice = choose(laid_out.folder, plan, machine)
    assert [choice.of(run) for run in plan.runs()] == [overrides] * 2
    assert re.search(text, choice.text)


def test_a_config_with_larger_batches_keeps_them(laid_out):
    plan = laid_out(config="wmt14", overrides=[])
    choice = choose(laid_out.folder, plan, gpus(1))
    assert choice.overrides == BF16[:2]
    assert choice.text.endswith(": bf16, 8,192 tokens x 16 in an update")


@pytest.mark.parametrize(
    ("given", "left"),
    [
        ("dataset.max_tokens=800", BF16[:2]),
        ("optimization.update_freq=[4]", BF16[:2]),
        ("common.fp16=true", BF16[2:]),
        ("common.fp16=false", BF16[2:]),
        ("common.cpu=true", []),
    ],
)
def test_the_plan_comes_first(laid_out, given, left):
    arms = {**PLAN["arms"], "own": {"router": "dense", "overrides": [given]}}
    plan = laid_out(arms=arms)
    choice = choose(laid_out.folder, plan, gpus(1))
    assert [choice.of(run) for run in plan.runs()] == [BF16, BF16, left]


@pytest.mark.parametrize("begun", [BF16, FP16, ["common.fp16=false"], []])
def test_a_study_goes_on_as_it_was_begun(laid_out, begun):
    """On any machine; runs of earlier versions, which have no entry, with their config's own."""
    plan = laid_out()
    (run, _) = plan.runs()
    state = {"finished_updates": 0, **({KEY: begun} if begun else {})}
    write_json(laid_out.folder / run.name / STATE, state)
    for machine in (CPU, OLD_GPU, gpus(1)):
        choice = choose(laid_out.folder, plan, machine)
        assert choice.overrides == begun and "(as it was begun)" in choice.text
        assert [choice.of(run) for run in plan.runs()] == [begun] * 2


@pytest.mark.parametrize(
    ("begun", "machine", "missing"),
    [
        (BF16, CPU, "a GPU that computes in bf16"),
        (BF16, OLD_GPU, "a GPU that computes in bf16"),
        (FP16, CPU, "a GPU,"),
        (FP16, gpus(1), None),
        (["common.fp16=false"], gpus(1), None),
    ],
)
def test_a_machine_without_its_precision_is_refused(laid_out, begun, machine, missing):
    (run, _) = laid_out().runs()
    choice = Choice(begun, "")
    if missing is None:
        choice.check(run, laid_out.folder, machine)
        return
    with pytest.raises(UserError, match=f"was begun with common.*: go on on .* with {missing}"):
        choice.check(run, laid_out.folder, machine)


@pytest.mark.slow
def test_a_run_that_is_left_is_refused_and_no_other(finished, tmp_path):
    """A study that was begun in bf16 on a GPU."""
    folder = shutil.copytree(finished, tmp_path / "study")
    paths = [folder / f"{arm}-seed1" / STATE for arm in PLAN["arms"]]
    for path in paths:
        write_json(path, {**json.loads(path.read_text()), KEY: BF16[:2]})
    runner.run(folder)
    write_json(path, {**json.loads(path.read_text()), "finished_updates": 0})
    with pytest.raises(UserError, match="go on on a machine with a GPU that computes in bf16"):
        runner.run(folder)


def test_runs_that_were_begun_differently_are_told(laid_out):
    plan = laid_out()
    for run, begun in zip(plan.runs(), (BF16, [])):
        write_json(laid_out.folder / run.name / STATE, {"finished_updates": 0, KEY: begun})
    with pytest.raises(UserError, match=r"switch-2-seed1 was begun with common\.bf16=true .*dense"):
        choose(laid_out.folder, plan, gpus(1))


def test_the_choice_is_kept_in_the_records(finished):
    for arm in PLAN["arms"]:
        folder = finished / f"{arm}-seed1"
        assert json.loads((folder / STATE).read_text())[KEY] == ["common.fp16=false"]
        # The plan gives a batch, but no precision.
        overrides = read_run(folder).record["overrides"]
        assert "common.fp16=false" in overrides and "dataset.max_tokens=40" in overrides


@pytest.mark.slow
def test_a_study_measures_in_bf16(prepared, tmp_path):
    """As it does on a GPU; here by the plan's wish, on a CPU."""
    arms = {"switch-2": PLAN["arms"]["switch-2"]}
    more = {"overrides": [*TINY, "common.bf16=true"], "updates": 30, "arms": arms}
    plan = write_plan(tmp_path / "plan.yaml", prepared, **more)
    output = study(plan, "--output", tmp_path / "study")
    line = "precision and batch (CPU), where the plan does not say: fp32, 800 tokens in an update"
    assert line in output
    folder = tmp_path / "study" / "switch-2-seed1"
    (point,) = lines_of(folder)
    assert 0 < point["nll_loss"] < 20 and point["layers"]
    run = read_run(folder)
    assert run.record["overrides"] == read_plan(plan).runs()[0].overrides
    assert run.settings["common.bf16"] is True
