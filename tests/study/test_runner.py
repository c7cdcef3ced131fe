"""Studies that are stopped, moved, changed and gone on with. Real runs on a toy corpus."""

import json
import shutil
import signal
import time

import pytest
from support.small_study import PLAN, TINY, lines_of, start, study, write_plan

from fairseq_sparsemixer import cli
from fairseq_sparsemixer.files import read_json, write_json
from fairseq_sparsemixer.runs.folder import find_runs, read_run
from fairseq_sparsemixer.runs.grouping import group_runs
from fairseq_sparsemixer.runs.record import RECORD
from fairseq_sparsemixer.study import runner
from fairseq_sparsemixer.study.layout import lay_out
from fairseq_sparsemixer.study.machine import Choice


def told(capsys, *arguments):
    assert cli.main(["study", *map(str, arguments)]) == 2
    return capsys.readouterr().err


def strip_times(point):
    timed = ("seconds", "cpu_seconds", "words_per_second")
    return {key: value for key, value in point.items() if key not in timed}


def test_what_the_runs_leave_can_be_compared(finished):
    """By `fairseq-sparsemixer table`: finished, scored, told apart."""
    arms = group_runs(map(read_run, find_runs([finished])))
    assert [(arm.name, [run.note for run in arm.runs]) for arm in arms] == [
        ("dense", [""]),
        ("switch-2", [""]),
    ]
    assert all(arm.runs[0].parameters["active"] for arm in arms)
    names = sorted(path.name for path in (finished / "dense-seed1").glob("*.pt"))
    assert names == ["checkpoint_last.pt"]


def test_the_same_command_does_nothing_more(finished, prepared, tmp_path):
    before = {p: p.stat().st_mtime_ns for p in finished.rglob("points.jsonl")}
    assert "2 runs, 2 of them finished before" in study(finished)
    assert {p: p.stat().st_mtime_ns for p in finished.rglob("points.jsonl")} == before


def test_killed_it_goes_on_and_loses_no_point(finished, prepared, tmp_path):
    """Killed in training, twice, moved, and gone on with from elsewhere: the points of a study that
    nothing disturbed."""
    arms = {"switch-2": PLAN["arms"]["switch-2"]}
    plan = write_plan(tmp_path / "plan.yaml", prepared, arms=arms)
    folder = tmp_path / "study"
    kept = []
    for number, ending in enumerate((signal.SIGKILL, signal.SIGTERM), 1):
        process = start(plan, "--output", folder)
        limit = time.monotonic() + 120
        while len(lines_of(folder / "switch-2-seed1")) < number:
            assert process.poll() is None and time.monotonic() < limit
            time.sleep(0.01)
        process.send_signal(ending)
        process.communicate(timeout=30)
        assert process.returncode != 0
        before, kept = kept, lines_of(folder / "switch-2-seed1")
        assert len(kept) >= number and kept[: len(before)] == before
    moved = folder.rename(tmp_path / "moved")
    assert "all 1 runs are finished" in study(moved, cwd=tmp_path)
    found = lines_of(moved / "switch-2-seed1")
    assert found[: len(kept)] == kept
    undisturbed = lines_of(finished / "switch-2-seed1")
    assert [strip_times(point) for point in found] == [strip_times(p) for p in undisturbed]
    seconds = [point["seconds"] for point in found]
    assert None not in seconds and seconds == sorted(seconds)


@pytest.mark.slow
def test_a_time_budget_ends_it_in_order(prepared, tmp_path):
    plan = write_plan(tmp_path / "plan.yaml", prepared, updates=4000, evaluate_every=20)
    folder = tmp_path / "study"
    began = time.monotonic()
    output = study(plan, "--output", folder, "--minutes", 0.6, "--jobs", 2)
    assert time.monotonic() - began < 36 + 15
    assert "time is up: 2 of 2 runs are left; the same command goes on" in output
    assert "nothing was gained" not in output
    assert all(len(lines_of(folder / f"{arm}-seed1")) >= 1 for arm in ("switch-2", "dense"))
    assert not list(folder.rglob("*.partial"))


def test_a_run_that_is_left_alone_is_trained_with_as_many_threads(finished, tmp_path, monkeypatch):
    folder = shutil.copytree(finished, tmp_path / "study")
    (folder / "dense-seed1" / "study.json").unlink()
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    plan, _ = lay_out(folder / "plan.yaml", folder)
    left = runner._Study(folder, plan, Choice([], ""), {}, 3, [])
    assert [run.name for run in left.waiting] == ["dense-seed1"]
    assert left._environment(0)["OMP_NUM_THREADS"] == "4"  # of two runs in all


@pytest.mark.slow
@pytest.mark.parametrize("updates", [0, 90])
def test_without_scores_it_trains_no_further(updates, finished, tmp_path):
    """Killed in scoring, or where the scores were removed."""
    folder = shutil.copytree(finished, tmp_path / "study")
    state = json.loads((folder / "dense-seed1" / "study.json").read_text())
    write_json(folder / "dense-seed1" / "study.json", {**state, "finished_updates": updates})
    record = {"gpus": ["another machine's"]}
    write_json(folder / "dense-seed1" / RECORD, record)
    (folder / "dense-seed1" / runner.SCORES).unlink()
    output = study(folder)
    assert "training" not in output and "dense-seed1: finished" in output
    scores = json.loads((folder / "dense-seed1" / runner.SCORES).read_text())
    assert scores["checkpoints"][0]["updates"] == 90
    assert read_json(folder / "dense-seed1" / RECORD, dict, "") == record  # of who trained


def test_a_plan_may_grow_but_not_change(finished, prepared, tmp_path, capsys):
    folder = shutil.copytree(finished, tmp_path / "study")
    shutil.rmtree(folder / "switch-2-seed1")
    before = lines_of(folder / "dense-seed1")
    own = folder / "dense-seed1" / "checkpoint_average.pt"
    own.touch()
    dense = {"dense": {"router": "dense"}}
    # The corpus that it began with need not be there any more.
    grown = write_plan(tmp_path / "grown.yaml", tmp_path / "gone", updates=120, arms=dense)
    text = next((folder / "data" / "bin").glob("train.*.bin"))
    away = text.rename(text.with_suffix(".away"))
    assert "1 of 1 runs failed" in study(grown, "--output", folder, status=2)
    away.rename(text)
    state = json.loads((folder / "dense-seed1" / "study.json").read_text())
    assert state["finished_updates"] == 0  # so that nothing is fine-tuned from it meanwhile
    assert "1 runs, 0 of them finished before" in study(grown, "--output", folder)
    after = lines_of(folder / "dense-seed1")
    assert after[:3] == before and [p["updates"] for p in after] == [30, 60, 90, 120]
    checkpoints = {path.name for path in own.parent.glob("checkpoint*.pt")}
    assert checkpoints == {own.name, "checkpoint_last.pt"}
    (run,) = (r for r in map(read_run, find_runs([folder])) if r.name == "dense")
    assert run.note == "" and run.evaluation["checkpoints"][0]["updates"] == 120
    kept = (folder / "plan.yaml").read_bytes()
    for change in (
        {"overrides": [*TINY, "model.jitter_eps=0"]},
        {"evaluate_every": 10},
        {"score": "best"},
        {"beam": 2},
        {"config": "demo"},
    ):
        changed = write_plan(tmp_path / "changed.yaml", prepared, arms=dense, **change)
        errors = told(capsys, changed, "--output", folder)
        assert f"was trained with other {next(iter(change))}" in errors
        assert "give the arm another name" in errors
    assert (folder / "plan.yaml").read_bytes() == kept


@pytest.mark.slow
def test_a_run_that_fails_does_not_keep_the_others_from_work(prepared, tmp_path):
    arms = {
        "bad": {"router": "dense", "overrides": ["dataset.train_subset=lost"]},
        "good": {"router": "dense"},
    }
    plan = write_plan(tmp_path / "plan.yaml", prepared, updates=30, arms=arms)
    errors = study(plan, "--output", tmp_path / "study", status=2)
    assert "1 of 2 runs failed: bad-seed1 (train: see " in errors
    assert len(lines_of(tmp_path / "study" / "good-seed1")) == 1


def test_a_damaged_run_does_not_keep_the_others_from_work(finished, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "study")
    for name in ("switch-2-seed1", "dense-seed1"):
        (folder / name / "study.json").unlink()
    (folder / "switch-2-seed1" / "checkpoint_last.pt").write_bytes(b"half")
    errors = study(folder, status=2)
    assert "1 of 2 runs failed: switch-2-seed1 (start: " in errors
    assert "remove it to begin anew" in errors
    assert json.loads((folder / "dense-seed1" / "study.json").read_text())["finished_updates"] == 90


def test_a_folder_that_was_only_prepared_needs_nothing_else(prepared, tmp_path):
    """Wherever it is carried to."""
    corpus = shutil.copytree(prepared, tmp_path / "corpus")
    arms = {"d": {"router": "dense"}}
    plan = write_plan(tmp_path / "plan.yaml", corpus, updates=30, arms=arms, score="best")
    folder = tmp_path / "study"
    assert "1 runs to do" in study(plan, "--output", folder, "--prepare-only")
    shutil.rmtree(corpus)
    plan.unlink()
    carried = shutil.move(folder, tmp_path / "für a=b, (c) 'd' $e:f")
    assert "all 1 runs are finished" in study(carried, cwd="/")
    (run,) = map(read_run, find_runs([carried]))
    (scored,) = run.evaluation["checkpoints"]
    assert scored["path"] == "d-seed1/checkpoint_best.pt"
    names = {path.name for path in carried.glob("d-seed1/*.pt")}
    assert names == {"checkpoint_best.pt", "checkpoint_last.pt"}


def test_wrong_use_is_told(prepared, tmp_path, capsys):
    plan = write_plan(tmp_path / "plan.yaml", tmp_path / "nothing")
    assert "say where to with --output" in told(capsys, plan)
    assert f"there is no prepared corpus with a test set in {tmp_path / 'nothing'}" in told(
        capsys, plan, "--output", tmp_path / "s"
    )
    (tmp_path / "file").touch()
    assert "is not a folder" in told(capsys, plan, "--output", tmp_path / "file")
    assert "holds no plan.yaml" in told(capsys, tmp_path / "s")
    assert f"there is no plan and no study {tmp_path / 'tyop'}" in told(capsys, tmp_path / "tyop")
    assert "--minutes 0.0 does nothing" in told(capsys, plan, "--minutes", 0)
    typo = write_plan(tmp_path / "typo.yaml", prepared, overrides=["model.droput=0.2"])
    errors = told(capsys, typo, "--output", tmp_path / "t")
    assert "arm switch-2" in errors and "droput" in errors
    lost = write_plan(tmp_path / "lost.yaml", prepared, config="nothing")
    assert "check config in" in told(capsys, lost, "--output", tmp_path / "u")
