"""Functions over many lines on several cores: nothing is left running, and nothing hangs."""

import contextlib
import os
import signal
import subprocess
import sys
import time

import pytest
from support import commands

from fairseq_sparsemixer.corpora import workers
from fairseq_sparsemixer.errors import UserError

SLEEPER = f"""
import sys, time
{commands.HEAR_INTERRUPTIONS}
from fairseq_sparsemixer.corpora import workers

def slow(chunk):
    time.sleep(0.2)
    return chunk

if __name__ == "__main__":
    print("begun", flush=True)
    for chunk in workers.map_chunks(slow, range(10**9), 2):
        print("working", flush=True)
"""


def children_of(process):
    """Processes in the group of one that was started in a group of its own."""
    listed = subprocess.run(["ps", "-eo", "pgid=,stat="], capture_output=True, text=True).stdout
    entries = [line.split() for line in listed.splitlines()]
    return [stat for pgid, stat in entries if pgid == str(process.pid) and stat[0] != "Z"]


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGKILL])
@pytest.mark.parametrize("moment", ["begun", "working"])
def test_workers_end_with_the_command(tmp_path, ending, moment):
    """At any moment: while workers start, too. Nothing is left, and nothing hangs."""
    script = tmp_path / "sleeper.py"
    script.write_text(SLEEPER)
    process = subprocess.Popen(
        [sys.executable, script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        while process.stdout.readline().strip() != moment:
            assert process.poll() is None
        if moment == "begun":
            time.sleep(0.5)
        if ending == signal.SIGINT:
            os.killpg(process.pid, ending)  # as Ctrl-C does
        else:
            process.kill()
        process.wait(timeout=30)
        deadline = time.monotonic() + 30
        while children_of(process):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert process.stderr.read().count("Traceback") <= 1
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def fail_at_once(chunk):
    os._exit(9)


def test_a_worker_that_was_killed_is_told():
    with pytest.raises(UserError, match="give fewer --workers"):
        list(workers.map_chunks(fail_at_once, range(10_000), 2))
