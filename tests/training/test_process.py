"""Training processes."""

import subprocess
import sys

import pytest
from support.full_disk import room_for

from fairseq_sparsemixer.disk import FullDiskError
from fairseq_sparsemixer.errors import UserError
from fairseq_sparsemixer.training import process


def test_lines_are_shown_when_they_are_whole(tmp_path, monkeypatch):
    """Those of this process alone, to the last one, which may lack its end."""
    log = tmp_path / "log"
    log.write_text("of the start before\n")
    seen = []
    monkeypatch.setattr(process, "progress", lambda line: seen.append(line) or "")
    code = "print('one', end='', flush=True); input(); print(' two\\nthree', end='')"
    monkeypatch.setattr(subprocess, "DEVNULL", subprocess.PIPE)
    started = process.Process([sys.executable, "-c", code], log)
    while not log.read_text().endswith("one"):
        assert started.ended(0.02) is None
        started.show_progress()
    assert seen == []
    started._process.communicate(b"\n")
    started.show_progress()
    assert seen == ["one two", "three"]
    assert (started.ended(), started.last) == (0, "three")


OF_TORCHRUN = "1126 23:44:51.612000 31436 torch/distributed/elastic/multiprocessing/api.py:10"
FAILED = [
    "E: fairseq_sparsemixer.errors.UserError: no such file",
    "Set the environment variable HYDRA_FULL_ERROR=1 for a complete stack trace.",
    "RuntimeError: [/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:537] Read error",
    f"W{OF_TORCHRUN}] Sending process 31441 closing signal SIGTERM",
    f"E{OF_TORCHRUN}] failed (exitcode: 1) local_rank: 0 (pid: 31440) of binary: python",
    "torch.distributed.elastic.multiprocessing.errors.ChildFailedError: ",
    "=====",
]


def test_why_workers_of_torchrun_failed_is_told(tmp_path):
    """Not what torchrun or the other workers say of it."""
    for lines, reason in (
        (FAILED, r"failed: E: fairseq_sparsemixer\.errors\.UserError: no such file \(all its"),
        (
            [line.replace("exitcode: 1)", "exitcode: -9)") for line in FAILED],
            "failed: worker 0 was ended by SIGKILL, as the system does where memory runs out; ",
        ),
        (
            [f"half a line{FAILED[4]}".replace("exitcode: 1)", "exitcode: -9)"), *FAILED[5:]],
            "failed: worker 0 was ended by SIGKILL, ",
        ),
        ([FAILED[0] + FAILED[3], *FAILED[4:]], r"no such file \(all its"),
        (
            [line.replace(" torch/", " .venv/lib/torch/") for line in FAILED],
            r"no such file \(all its",
        ),
    ):
        code = f"import sys; print(*{lines!r}, sep='\\n'); sys.exit(1)"
        with pytest.raises(UserError, match=reason):
            process.run_with_progress([sys.executable, "-c", code], tmp_path / "log")


def test_a_process_that_is_killed(tmp_path):
    code = "import os; print('update 3', flush=True); os.kill(os.getpid(), 9)"
    with pytest.raises(UserError, match="was ended by SIGKILL, as the system does where memory"):
        process.run_with_progress([sys.executable, "-c", code], tmp_path / "log")


TOLD = "open('checkpoint', 'wb').write(bytes(200_000))"
UNTOLD = "for _ in range(20): print('update ' * 1000)"
"""Its log has no room left to tell of it."""


@pytest.mark.parametrize("code", [TOLD, UNTOLD])
def test_a_process_that_runs_out_of_space(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command, log = [sys.executable, "-c", code], tmp_path / "log"
    with room_for(50_000), pytest.raises(FullDiskError, match=r"write .*File too large"):
        process.run_with_progress(command, log)
    process.run_with_progress(command, log)
    # Of the start that failed, not of one before it.
    command[-1] = "import sys; sys.exit('some other fault')"
    with pytest.raises(UserError, match="training failed: some other fault") as caught:
        process.run_with_progress(command, log)
    assert not isinstance(caught.value, FullDiskError)
