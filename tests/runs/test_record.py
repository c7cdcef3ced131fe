"""``run.json``."""

import subprocess

import pytest

from fairseq_sparsemixer.errors import UserError
from fairseq_sparsemixer.runs import record


def test_record_of_a_checkout(tmp_path):
    assert record.git_state(tmp_path) is None
    # Of a package that is installed in the folder of another project.
    subprocess.run(["git", "init", "--quiet", tmp_path], check=True)
    commit = ["-c", "user.name=x", "-c", "user.email=x", "commit", "--quiet", "--allow-empty"]
    subprocess.run(["git", "-C", tmp_path, *commit, "-m", "x"], check=True)
    (tmp_path / "installed").mkdir()
    assert record.git_state(tmp_path / "installed") is None
    assert record.git_state(tmp_path)["dirty"] is False
    assert record.read_record(tmp_path) == {}
    (tmp_path / record.RECORD).write_text("{")
    with pytest.raises(UserError, match=r"cannot read .*run\.json"):
        record.read_record(tmp_path)


def test_how_the_same_is_computed_may_change(tmp_path):
    def started(**model):
        return {"settings": {"model": model}, "tokens_per_update": 1, "data": {}}

    begun = started(expert_parallel_size=2, moe_backend="loop", moe_recompute=False, dropout=0.1)
    now = started(expert_parallel_size=1, moe_backend="auto", moe_recompute=True, dropout=0.1)
    record.check_same(tmp_path, begun, now)
    with pytest.raises(UserError, match=r"trained with model\.dropout=0\.1, not 0\.2"):
        record.check_same(tmp_path, begun, started(dropout=0.2))


def test_a_run_may_be_given_more_hours(tmp_path):
    one, more = (
        {
            "settings": {"optimization": {"stop_time_hours": hours}},
            "tokens_per_update": 1,
            "data": {},
        }
        for hours in (1.0, 2.0)
    )
    record.check_same(tmp_path, one, more)
