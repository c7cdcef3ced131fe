"""Steps that can be interrupted and resumed."""

import pytest

from fairseq_sparsemixer import files
from fairseq_sparsemixer.corpora import resumable


@pytest.fixture
def job(tmp_path):
    """Run two dependent steps; returns the names of those that were really built."""

    def run(letter="a", fail=False):
        done = []
        first, second = tmp_path / "first", tmp_path / f"second-{letter}"

        def build_first():
            done.append("first")
            files.write_lines(first, ["stable"])
            return [first], {"made": "first"}

        def build_second():
            done.append("second")
            files.write_lines(second, [*files.read_lines(first), letter])
            if fail:
                raise KeyboardInterrupt
            return [second], {"letter": letter}

        runner = resumable.Steps(tmp_path, seal=tmp_path / "seal")
        assert runner.run("first", {}, [], build_first) == {"made": "first"}
        assert runner.run("second", {"letter": letter}, [first], build_second) == {"letter": letter}
        return done

    return run


def test_steps_are_skipped_when_done(job):
    assert job() == ["first", "second"]
    assert job() == []


def test_changed_settings_redo_the_step_and_remove_its_old_outputs(job, tmp_path):
    job("a")
    assert job("b") == ["second"]
    assert not (tmp_path / "second-a").exists()
    assert (tmp_path / "second-b").read_text() == "stable\nb\n"


def test_an_interrupted_step_is_not_taken_for_finished(job):
    with pytest.raises(KeyboardInterrupt):
        job(fail=True)
    assert job() == ["second"]
    with pytest.raises(KeyboardInterrupt):
        job("b", fail=True)
    # The first output is still there, but its record went before the step was redone.
    assert job("a") == ["second"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: path.write_bytes(b"X" + path.read_bytes()[1:]),
        lambda path: path.unlink(),
    ],
    ids=["truncated", "same size", "missing"],
)
def test_damaged_outputs_are_made_again(job, tmp_path, capsys, damage):
    job()
    damage(tmp_path / "second-a")
    capsys.readouterr()
    assert job() == ["second"]
    assert "second-a is missing or has changed" in capsys.readouterr().err
    assert (tmp_path / "second-a").read_text() == "stable\na\n"


def test_the_seal_is_broken_as_soon_as_a_step_is_redone(job, tmp_path):
    job("a")
    seal = tmp_path / "seal"
    seal.write_text("all fits together")
    job("a")
    assert seal.exists()
    with pytest.raises(KeyboardInterrupt):
        job("b", fail=True)
    assert not seal.exists()


def test_a_damaged_record_counts_as_none(job, tmp_path):
    job()
    record = tmp_path / ".steps" / "first.json"
    record.write_text(record.read_text()[:20])
    # Made again with the same bytes, so that what depends on it stays.
    assert job() == ["first"]


def test_what_a_killed_step_made_before_is_still_removed(tmp_path):
    steps = resumable.Steps(tmp_path, tmp_path / "record.json")
    old, new = tmp_path / "old", tmp_path / "new"

    def make(path):
        path.write_text("made")
        return [path], {}

    steps.run("step", {"kind": 1}, [], lambda: make(old))

    def killed():
        raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            steps.run("step", {"kind": 2}, [], killed)
    assert old.exists()
    steps.run("step", {"kind": 2}, [], lambda: make(new))
    assert new.exists() and not old.exists()
