"""A short run of ``scripts/fuzz.py``, and that it sees what it looks for."""

import os
import sys
from pathlib import Path

import pytest
from support import fuzz_kinds, fuzz_runner
from support.fuzz_runner import CANARY, Trial

from fairseq_sparsemixer.errors import UserError


@pytest.fixture(scope="module")
def goods(shared, corpus, run_dir, study, one_thread):
    laid_out = shared.directory("laid_out", lambda made: fuzz_kinds.lay_out(corpus, made))
    return fuzz_kinds.Goods(corpus, run_dir, study, laid_out)


def test_odd_input_ends_well_or_with_one_clear_line(goods, tmp_path):
    results = [fuzz_kinds.try_one(goods, 2, n, tmp_path)[0] for n in range(100)]
    faults = [each for each in results if each["verdict"] not in fuzz_runner.GOOD]
    assert not faults, faults
    assert {each["verdict"] for each in results} == {*fuzz_runner.GOOD}
    assert {each["kind"] for each in results} == fuzz_kinds.KINDS.keys()
    assert not list(tmp_path.iterdir())


def test_a_trial_can_be_repeated(goods, tmp_path):
    def trial():
        result, _ = fuzz_kinds.try_one(goods, "again", 7, tmp_path)
        return {key: result[key] for key in ("kind", "verdict", "status")}

    assert trial() == trial()


def _fail():
    raise UserError("no")


def _told_twice():
    print("error: one", file=sys.stderr)
    _fail()


def _spin():
    while True:
        pass


KEEP = "user/keep"
CALLS = {
    "right": lambda: None,
    "clear error": _fail,
    "unclear error": lambda: sys.exit(3),
    "wrong": lambda: print("odd"),
    "traceback": lambda: 1 / 0,
    "hang": _spin,
    "lost data": lambda: os.unlink(f"../{KEEP}"),
    "code run": lambda: Path(CANARY).touch(),
}
MORE = [
    ("unclear error", _told_twice),
    ("traceback", lambda: os.kill(os.getpid(), 9)),
    ("lost data", lambda: Path("..", KEEP).write_text("changed")),
    ("lost data", lambda: Path("named").write_text("half") and _fail()),
    ("right", lambda: Path("named").write_text("whole") and None),
]


@pytest.mark.parametrize(("verdict", "call"), [*CALLS.items(), *MORE])
def test_each_verdict_is_seen(verdict, call, tmp_path, monkeypatch):
    monkeypatch.setattr(fuzz_runner, "CPU_SECONDS", 1)
    assert set(CALLS) == set(fuzz_runner.VERDICTS)
    for name in (KEEP, "cwd/named"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("good")
    named = (tmp_path / "cwd" / "named",)
    trial = Trial("", call, named=named, wrong=lambda said: "odd" if said else "")
    before = fuzz_runner.contents(tmp_path)
    found, _ = fuzz_runner.judge(trial, tmp_path, before, fuzz_runner.run(trial, tmp_path))
    assert found == verdict
