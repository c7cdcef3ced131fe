"""Python programs run beside this one: pip, SentencePiece's trainer, fairseq-preprocess."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Mapping, Optional, Sequence

from fairseq_sparsemixer.disk import full_disk_in


class ProgramError(Exception):
    """A program ended with an error; the text is what it wrote to standard error."""


def run_python(
    arguments: Sequence[str],
    cwd: Optional[Path] = None,
    environment: Optional[Mapping[str, str]] = None,
) -> None:
    """Run ``python ARGUMENTS`` with this interpreter; its standard output goes to our stderr.

    ``environment`` is added to the variables of this process.

    Raises:
        OSError: one of :data:`~fairseq_sparsemixer.disk.NO_SPACE`: there was no room on the disk.
        ProgramError: any other failure.
    """
    process = subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**os.environ, **(environment or {})},
        stdin=subprocess.DEVNULL,
        # The file descriptor, not sys.stderr: a replaced sys.stderr need not have one.
        stdout=2,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        errors="replace",
        check=False,
    )
    if process.returncode == 0:
        return
    raise_full_disk(process.stderr)
    raise ProgramError(process.stderr)


def raise_full_disk(errors: str) -> None:
    """Raise the OSError of a full disk where a program's messages tell of one."""
    error = full_disk_in(errors)
    if error is not None:
        raise error


def last_line(text: str) -> str:
    """The last line of ``text`` that holds anything: where programs put the error itself."""
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    return lines[-1] if lines else "no message"
