"""A training process: started, shown on the terminal, and stopped with its parent."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Dict, List, Mapping, Optional, Sequence

from fairseq_sparsemixer.disk import FullDiskError, cannot_write, check_room, full_disk_in
from fairseq_sparsemixer.errors import UserError
from fairseq_sparsemixer.files import atomic_path
from fairseq_sparsemixer.runs.logs import line_stats
from fairseq_sparsemixer.text import BPE_CODES, MOSES_TOKENS, SENTENCEPIECE_MODEL
from fairseq_sparsemixer.workers import by_signal, end_with_parent, ended_by

STOP_SECONDS = 10
"""How long an interrupted training may take to end by itself."""
POLL_SECONDS = 0.2
"""Between two looks at a process."""
_LAST_BYTES = 1 << 20
"""Of the log of a process that failed, in which the reason is looked for."""
_NO_REASON = re.compile(r"Set the environment variable HYDRA_FULL_ERROR|.*/gloo/transport/")
"""Matches a line that tells nothing: hydra's hint after the reason of a failure, and of a worker
that another one is gone."""
_TORCHRUN = re.compile(r"[EW]\d{4} \S+ +\d+ \S*torch/distributed/elastic/")
"""Finds torchrun's lines, with which a failure is over; it goes on about how it failed itself. A
virtual environment below the working folder is part of their path."""
_KILLED = re.compile(r".* failed \(exitcode: -(\d+)\) local_rank: (\d+) ")
"""Matches that of the first worker that failed, where a signal ended it: signal, worker."""


def model_files(binary: Path) -> List[Path]:
    """Dictionaries and subword model in a folder that ``fairseq-preprocess`` wrote."""
    subwords = [binary / name for name in (SENTENCEPIECE_MODEL, BPE_CODES, MOSES_TOKENS)]
    return [*sorted(binary.glob("dict.*.txt")), *(path for path in subwords if path.is_file())]


def copy_model_files(binary: Path, folder: Path) -> None:
    """Copy :func:`model_files`, so that a run folder is all one needs to translate."""
    for path in model_files(binary):
        with atomic_path(folder / path.name) as partial:
            shutil.copyfile(path, partial)


def progress(line: str) -> str:
    """What to show on the terminal for a line of fairseq's log; empty for most."""
    stats = line_stats(line, "train_inner", "num_updates", "loss", "wps")
    if stats is not None:
        text = f"update {stats['num_updates']:.0f}  train loss {stats['loss']:.2f}"
        if "balance_loss" in stats and "min_expert_share" in stats:
            text += (
                f"  balance {stats['balance_loss']:.2f}"
                f"  smallest share of an expert {100 * stats['min_expert_share']:.0f} %"
            )
        return f"{text}  {stats['wps']:.0f} words/s"
    stats = line_stats(line, "valid", "valid_num_updates", "valid_loss")
    if stats is not None:
        return f"update {stats['valid_num_updates']:.0f}  validation loss {stats['valid_loss']:.2f}"
    return ""


def training_environment(environment: Mapping[str, str]) -> Dict[str, str]:
    """``environment``, and that what is printed can be followed."""
    return {**environment, "PYTHONUNBUFFERED": "1"}


class Process:
    """A process at work, whose output is added to a log that can be followed.

    Args:
        command: of the process.
        log: added to, with all that it prints; None for the terminal.
        env: its environment (default: this one's).
        cwd: where it works (default: here).
        keep_open: file descriptors that it inherits.
        with_parent: it is killed with this process, whose restart would else find it at work.
    """

    def __init__(
        self,
        command: Sequence[str],
        log: Optional[Path],
        *,
        env: Optional[Mapping[str, str]] = None,
        cwd: Optional[Path] = None,
        keep_open: Sequence[int] = (),
        with_parent: bool = False,
    ) -> None:
        self.command = command
        self.log = log
        self.last = ""
        """What it printed last, of what was shown."""
        self._failed = False
        self._width = 0
        with contextlib.ExitStack() as files:
            output = None if log is None else files.enter_context(log.open("ab"))
            self._begin = self._shown = output.tell() if output else 0
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT if output else None,
                env=env,
                cwd=cwd,
                pass_fds=tuple(keep_open),
                preexec_fn=end_with_parent if with_parent else None,
            )

    def ended(self, seconds: float = 0) -> Optional[int]:
        """The exit status; None where it is still at work after so long."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self._process.wait(seconds)
        return None

    def show_progress(self) -> None:
        """Show what is new in the log, by :func:`progress`."""
        for line in self._new_lines():
            self._look_for_reason(line)
            text = progress(line)
            if text:
                # One line on a terminal, many in a file.
                end = "\r" if sys.stdout.isatty() else "\n"
                print(f"   {text}".ljust(self._width), end=end, flush=True)
                self._width = len(text) + 3

    def _look_for_reason(self, line: str) -> None:
        of_torchrun = _TORCHRUN.search(line)
        # It may stand behind what a worker had no time to end with a new line.
        text = line[: of_torchrun.start()] if of_torchrun else line
        if not self._failed and text.strip() and not _NO_REASON.match(text):
            self.last = text.strip()
        if of_torchrun:
            self._failed = True
            killed = _KILLED.match(line)
            if killed:
                self.last = ended_by(int(killed[2]), int(killed[1]))

    def _new_lines(self) -> List[str]:
        """The lines with text since the last call; half a line only where no more can come."""
        if self.log is None:
            return []
        complete = self._process.returncode is not None
        with self.log.open("rb") as file:
            file.seek(self._shown)
            text = file.read()
        if not complete:
            text = text[: text.rfind(b"\n") + 1]
        self._shown += len(text)
        lines = text.decode("utf-8", errors="replace").split("\n")
        return [line for line in lines if line.strip()]

    def stop(self, number: int = signal.SIGTERM) -> None:
        """Ask it to end."""
        self._process.send_signal(number)

    def wait(self) -> None:
        """Until it has ended; it is killed where it takes too long."""
        if self.ended(STOP_SECONDS) is None:
            self._process.kill()  # started in the background it ignores SIGINT
            self._process.wait()

    def check_disk(self) -> None:
        """Of a process that failed, find out whether that is for want of room.

        Raises:
            FullDiskError: its log tells so, or has no room to tell.
        """
        if self.log is None:
            return
        with self.log.open("rb") as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(max(self._begin, end - _LAST_BYTES))
            text = file.read().decode("utf-8", errors="replace")
        reason = full_disk_in(text)
        if reason is not None:
            raise FullDiskError(cannot_write(reason, self.log.parent))
        check_room(self.log.parent)

    def killed_by(self) -> str:
        """What ended it, where that is a signal; else empty."""
        status = self._process.returncode
        return f"the process was {by_signal(-status)}" if status is not None and status < 0 else ""

    def failure(self) -> UserError:
        """Why training ended early: a signal or the last line, and where the others are."""
        reason = self.killed_by() or self.last
        return UserError(f"training failed: {reason} (all its output: {self.log})")


def run_with_progress(
    command: Sequence[str],
    log_path: Path,
    *,
    env: Optional[Mapping[str, str]] = None,
    keep_open: Sequence[int] = (),
) -> None:
    """Run a training command; its output goes to the log, a summary to the terminal.

    Args:
        command: of the process.
        log_path: appended to, with all that the process prints.
        env: its environment (default: this one's), to which :func:`training_environment` adds.
        keep_open: file descriptors that it inherits.

    Raises:
        FullDiskError: the process failed for want of room on the disk.
        UserError: it failed otherwise; names its last line and the log.
        KeyboardInterrupt: as it came, once the process has ended.
    """
    environment = training_environment(os.environ if env is None else env)
    process = Process(command, log_path, env=environment, keep_open=keep_open)
    try:
        while process.ended(POLL_SECONDS) is None:
            process.show_progress()
        process.show_progress()
    except BaseException:
        process.stop(signal.SIGINT)
        process.wait()
        raise
    print(flush=True)
    if process.ended():
        process.check_disk()
        raise process.failure()
