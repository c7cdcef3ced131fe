"""One trial of the fuzzer: in a fork that is watched, and judged by what it left."""

import contextlib
import hashlib
import os
import re
import resource
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Callable, List, NamedTuple, Tuple, Union

from fairseq_sparsemixer import cli
from fairseq_sparsemixer.corpora import binarise, spm
from fairseq_sparsemixer.corpora.subprocesses import ProgramError
from fairseq_sparsemixer.errors import UserError
from fairseq_sparsemixer.study import demo
from support.forks import status_of, stream
from support.hostile import CANARY

VERDICTS = ("right", "clear error", "unclear error", "wrong", "traceback", "hang", "lost data",
            "code run")  # fmt: skip
"""What a trial may come to; all but the first two are faults."""
GOOD = VERDICTS[:2]
CPU_SECONDS, SECONDS = 60, 240
"""After so much time of its own, or by the clock of a machine that does other things, too, a trial
hangs."""
MEMORY = 6 << 30
_ERROR = re.compile(r"^.{0,300}error: .+")


class Trial(NamedTuple):
    """What is done.

    Attributes:
        what: of the input, in words.
        call: arguments of the command line, or a function.
        given: to stdin.
        named: files and folders that it may write: the name, or one that begins with it.
        wrong: called with stdout where all went well, for what is wrong with the result.
    """

    what: str
    call: Union[List[str], Callable[[], Any]]
    given: bytes = b""
    named: Tuple[Path, ...] = ()
    wrong: Callable[[str], str] = lambda said: ""


class Outcome(NamedTuple):
    """``status`` is negative for signals, None after too long."""

    status: Union[int, None]
    out: str
    err: str


def contents(folder):
    """{path: digest, or what a link points to} of all in a folder but what is behind links."""
    found = {}
    for path, folders, names in os.walk(folder):
        for name in (*folders, *names):
            each = Path(path, name)
            if each.is_symlink():
                found[each] = os.readlink(each)
            elif each.is_file():
                found[each] = hashlib.sha1(each.read_bytes()).hexdigest()
    return found


def run(trial, place):
    """Do it in a fork, in the folder ``place/cwd``."""
    out, err = place / ".stdout", place / ".stderr"
    with tempfile.TemporaryFile() as given:
        given.write(trial.given)
        given.seek(0)
        child = os.fork()
        if not child:
            _in_child(trial, place, given.fileno(), (out, err))
    status = _wait(child)
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in (out, err)]
    out.unlink()
    err.unlink()
    return Outcome(status, *texts)


def _wait(child):
    end = time.monotonic() + SECONDS
    pause = 0.002
    while time.monotonic() < end:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            code = os.waitstatus_to_exitcode(status)
            return None if code == -signal.SIGXCPU else code
        time.sleep(pause)
        pause = min(0.05, 1.5 * pause)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def _in_child(trial, place, given, streams):
    def work():
        os.setsid()
        os.chdir(place / "cwd")
        os.dup2(given, 0)
        for number, path in enumerate(streams, 1):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        sys.stdin, sys.stdout, sys.stderr = map(stream, range(3))
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 5))
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
        _without_starting()
        return _call(trial.call)

    _end_with(work)


def _end_with(work):
    """End this fork with the status of what it is for; every exception shows its traceback."""
    status = 70
    try:
        status = status_of(work, sys.__excepthook__)
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def _call(call):
    if isinstance(call, list):
        sys.argv = ["fairseq-sparsemixer", *call]
        return cli.main(call)
    try:
        call()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _without_starting():
    """Training is where a trial ends; programs of corpora run in forks, which start at once.

    Nothing is downloaded.
    """
    demo.preparation.prepare_homeassistant = lambda folder: None
    os.environ["PIP_NO_INDEX"] = "1"
    popen = subprocess.Popen

    class Popen(popen):
        def __init__(self, command, *arguments, **options):
            if any("fairseq_cli" in str(word) for word in command):
                print("training would begin")
                sys.stdout.flush()
                os._exit(0)
            super().__init__(command, *arguments, **options)

    subprocess.Popen = Popen
    binarise.run_python = spm.run_python = _run_python


def _run_python(arguments, cwd=None, environment=None):
    """As corpora.subprocesses.run_python, of a module or of code."""

    def program():
        os.chdir(cwd or ".")
        os.environ.update(environment or {})
        os.dup2(2, 1)
        os.dup2(errors.fileno(), 2)
        kind, source, *rest = arguments
        sys.argv = [source, *rest]
        if kind == "-m":
            runpy.run_module(source, run_name="__main__")
        else:
            exec(source, {"__name__": "__main__"})

    with tempfile.TemporaryFile() as errors:
        sys.stdout.flush()
        sys.stderr.flush()
        child = os.fork()
        if not child:
            _end_with(program)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status:
            errors.seek(0)
            raise ProgramError(errors.read().decode(errors="replace"))


def judge(trial, place, before, outcome):
    """(one of VERDICTS, why)."""
    after = contents(place)
    if any(path.name == CANARY for path in after):
        return "code run", ""
    lost = [path for path, content in before.items() if after.get(path) != content]
    failed = outcome.status != 0
    lost = [path for path in lost if not _is_named(path, trial.named) or (failed and path in
            trial.named and path.is_relative_to(place / "cwd"))]  # fmt: skip
    if lost:
        return "lost data", ", ".join(str(path.relative_to(place)) for path in lost[:5])
    if outcome.status is None:
        return "hang", ""
    if "Traceback (most recent call last)" in outcome.out + outcome.err:
        return "traceback", ""
    if outcome.status < 0:
        return "traceback", f"ended by signal {-outcome.status}"
    lines = outcome.err.rstrip("\n").split("\n")
    if outcome.status == 2 and _ERROR.match(lines[-1]):
        more = [line for line in lines[:-1] if _ERROR.match(line)]
        return ("unclear error", "two errors") if more else ("clear error", "")
    if failed:
        return "unclear error", f"status {outcome.status}"
    wrong = trial.wrong(outcome.out)
    return ("wrong", wrong) if wrong else ("right", "")


def _is_named(path, named):
    return any(
        path == each
        or each in path.parents
        or (path.parent == each.parent and path.name.startswith(each.stem))
        or (path.is_relative_to(each.parent) and
            path.relative_to(each.parent).parts[0].startswith(f"{each.stem}_figures"))
        for each in named
    )  # fmt: skip
