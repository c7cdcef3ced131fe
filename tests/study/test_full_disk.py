"""Studies that run out of space: one sentence, and the same command goes on."""

import sys

import pytest
from support.full_disk import room_for
from support.small_study import PLAN, study, write_plan

from fairseq_sparsemixer import cli
from fairseq_sparsemixer.study import runner

TOO_MUCH = "open('{run}/checkpoint.pt', 'wb').write(bytes(10**6))"
"""A training whose checkpoint does not fit."""
OTHER = "import sys; sys.exit('some other fault')"


@pytest.fixture
def command(prepared, tmp_path, monkeypatch):
    """A study of two runs at once, and what is its training in place of the real one."""
    plan = write_plan(tmp_path / "plan.yaml", prepared, jobs=2)
    programs = {}

    def training_command(self, run):
        program = programs.get(run.name, "import time; time.sleep(60)")
        return [sys.executable, "-c", program.format(run=self.folder / run.name)]

    monkeypatch.setattr(runner._Study, "_training_command", training_command)
    return ["study", str(plan), "--output", str(tmp_path / "study")], programs


def told(capsys, command):
    assert cli.main(command) == 2
    return capsys.readouterr().err.strip()


def test_a_training_out_of_space_ends_the_study(command, tmp_path, capsys):
    """At once: the other training, which takes a minute, is stopped."""
    arguments, programs = command
    programs["switch-2-seed1"] = TOO_MUCH
    with room_for(500_000):
        errors = told(capsys, arguments)
    folder = tmp_path / "study"
    assert errors == (
        f"fairseq-sparsemixer study: error: cannot write {folder / 'switch-2-seed1'} (File too "
        "large): make room there, or choose another place, and run the same command again"
    )
    programs.update(dict.fromkeys(["switch-2-seed1", "dense-seed1"], OTHER))
    errors = told(capsys, arguments)  # with space; what happened before is forgotten
    assert "2 of 2 runs failed" in errors and f"see {folder / 'dense-seed1'}/train.log" in errors


@pytest.mark.parametrize("size", [0, 3000])
def test_no_space_to_lay_a_study_out(size, command, tmp_path, capsys):
    arguments, _ = command
    folder = tmp_path / "study"
    with room_for(size):
        errors = told(capsys, [*arguments, "--prepare-only"])
    assert errors.startswith(f"fairseq-sparsemixer study: error: cannot write {folder}/")
    assert errors.count("\n") == 0
    assert not list(folder.rglob("*.partial")) and not (folder / "plan.yaml").exists()
    assert cli.main([*arguments, "--prepare-only"]) == 0
    assert (folder / "plan.yaml").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("size", [100_000, 300_000])
def test_a_real_training_out_of_space(size, prepared, tmp_path):
    plan = write_plan(tmp_path / "plan.yaml", prepared, arms={"switch-2": PLAN["arms"]["switch-2"]})
    folder = tmp_path / "study"
    with room_for(size):
        errors = study(plan, "--output", folder, status=2)
    assert "error: cannot write " in errors and errors.count("\n") == 1
    assert not list(folder.rglob("*.partial")) and not list(folder.rglob("checkpoint*"))
    assert "all 1 runs are finished" in study(plan, "--output", folder)
