"""Two commands in one place: the second waits, or is told who is at work."""

import contextlib
import fcntl
import os
import subprocess

import pytest
from support.busy import busy

from fairseq_sparsemixer import locks
from fairseq_sparsemixer.errors import UserError


@pytest.mark.parametrize("killed", [False, True])
@pytest.mark.parametrize("beside", [False, True])
def test_who_works_in_the_same_place_waits(tmp_path, capsys, beside, killed):
    place = tmp_path / "place"

    def in_turn():
        return locks.in_turn(place, beside=beside)

    with busy(in_turn, killed=killed) as other, in_turn():
        pass
    said = capsys.readouterr().err
    assert said.startswith(f"waiting for process {other} on ") and str(place) in said
    assert not [found for found in tmp_path.rglob("*") if found.is_file()]


def test_only_one_process_trains_in_a_folder(tmp_path):
    """Or what it started, where it was killed itself."""

    def take():
        with locks.sole_user(tmp_path, "--runs"):
            pass

    with locks.sole_user(tmp_path, "--runs") as inherited:
        heir = subprocess.Popen(["sleep", "60"], pass_fds=inherited)
    with pytest.raises(UserError, match=r"another process is at work in .* with --runs"):
        take()
    heir.kill()
    heir.wait()
    take()
    with (
        busy(lambda: locks.sole_user(tmp_path, "--runs")) as other,
        pytest.raises(UserError, match=rf"^process {other} on .* or what it started is at work in"),
    ):
        take()
    with busy(lambda: locks.sole_user(tmp_path, "--runs"), killed=True):
        pass
    take()


def test_a_forked_child_does_not_keep_the_lock(tmp_path):
    """Such as a worker that loads data, which outlives a killed training by seconds."""
    awaited, go = os.pipe()

    @contextlib.contextmanager
    def with_child():
        with locks.in_turn(tmp_path):
            if not os.fork():
                os.close(go)
                os.read(awaited, 1)
                os._exit(0)
            yield

    with busy(with_child, killed=True):
        pass
    with open(tmp_path / ".lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(go)
    os.close(awaited)


def test_a_place_that_cannot_be_written_to(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(UserError, match=r"cannot write into .*file"),
        locks.in_turn(tmp_path / "file" / "x"),
    ):
        pass
