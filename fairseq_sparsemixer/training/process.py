"""A training process: started, shown on the terminal, and stopped with its parent."""

import contextlib
import fcntl
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Dict, Iterator, List, Mapping, Optional, Sequence

import torch

from fairseq_sparsemixer.errors import UserError
from fairseq_sparsemixer.files import atomic_path
from fairseq_sparsemixer.runs.logs import line_stats

STOP_SECONDS = 10
"""How long an interrupted training may take to end by itself."""
SUBWORD_FILES = ("sentencepiece.bpe.model", "bpecodes")
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**34)}
"""Tells the C library to keep memory that was released (docs/performance.md): on a CPU each update
otherwise asks the system for the same gigabytes anew, page by page."""
_HYDRA_HINT = "Set the environment variable HYDRA_FULL_ERROR"
"""Begins the line that hydra prints after the reason of a failure."""


def model_files(binary: Path) -> List[Path]:
    """Dictionaries and subword model in a folder that ``fairseq-preprocess`` wrote."""
    subwords = [binary / name for name in SUBWORD_FILES]
    return [*sorted(binary.glob("dict.*.txt")), *(path for path in subwords if path.is_file())]


def copy_model_files(binary: Path, folder: Path) -> None:
    """Copy :func:`model_files`, so that a run folder is all one needs to translate."""
    for path in model_files(binary):
        with atomic_path(folder / path.name) as partial:
            shutil.copyfile(path, partial)


def progress(line: str) -> str:
    """What to show on the terminal for a line of fairseq's log; empty for most."""
    stats = line_stats(line, "train_inner")
    if stats is not None:
        text = f"update {stats['num_updates']:.0f}  train loss {stats['loss']:.2f}"
        if "balance_loss" in stats:
            text += (
                f"  balance {stats['balance_loss']:.2f}"
                f"  smallest share of an expert {100 * stats['min_expert_share']:.0f} %"
            )
        return f"{text}  {stats['wps']:.0f} words/s"
    stats = line_stats(line, "valid")
    if stats is not None:
        return f"update {stats['valid_num_updates']:.0f}  validation loss {stats['valid_loss']:.2f}"
    return ""


def training_environment(environment: Mapping[str, str]) -> Dict[str, str]:
    """``environment`` and what a training process needs besides: :data:`KEEP_MEMORY` on a CPU."""
    memory = {} if torch.cuda.is_available() else KEEP_MEMORY
    return {**memory, **environment, "PYTHONUNBUFFERED": "1"}


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
        UserError: the process failed; names its last line and the log.
        KeyboardInterrupt: as it came, once the process has ended.
    """
    environment = training_environment(os.environ if env is None else env)
    width = 0
    with (
        log_path.open("a", encoding="utf-8") as log,
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=environment,
            pass_fds=tuple(keep_open),
        ) as process,
    ):
        assert process.stdout is not None
        last = ""
        try:
            for line in process.stdout:
                log.write(line)
                log.flush()
                if line.strip() and not line.startswith(_HYDRA_HINT):
                    last = line.strip()
                text = progress(line)
                if text:
                    # One line on a terminal, many in a file.
                    end = "\r" if sys.stdout.isatty() else "\n"
                    print(f"   {text}".ljust(width), end=end, flush=True)
                    width = len(text) + 3
        except KeyboardInterrupt:
            process.send_signal(signal.SIGINT)
            try:
                # Reads on: a process that nobody reads from cannot end.
                process.communicate(timeout=STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()  # started in the background it ignores SIGINT
            raise
    print(flush=True)
    if process.returncode:
        raise UserError(f"training failed: {last} (all its output: {log_path})")


@contextlib.contextmanager
def sole_user(folder: Path, flag: str = "--runs") -> Iterator[List[int]]:
    """Keep others out of a folder for as long as this process or its heir lives.

    Args:
        folder: that is written to.
        flag: that names it.

    Yields:
        The file descriptors to hand to the heir (``keep_open``): a training process that outlives
        this one, because this one was killed, still keeps others out.

    Raises:
        UserError: another process is in it.
    """
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another process is training in {folder}: wait for it or end it, or name another "
                f"folder with {flag}"
            ) from None
        except OSError:
            pass  # a file system without locks
        yield [file.fileno()]
