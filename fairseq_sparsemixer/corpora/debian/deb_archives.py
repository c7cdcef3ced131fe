"""Debian binary packages (.deb), read as the archives they are: nothing is unpacked or run.

A .deb is an ``ar`` archive whose member ``data.tar`` (compressed) holds the files.
"""

import contextlib
import io
import lzma
import shutil
import subprocess
import tarfile
import zlib
from pathlib import Path
from typing import IO, Callable, Dict, Iterator, Literal, Tuple

from fairseq_sparsemixer.corpora.subprocesses import last_line
from fairseq_sparsemixer.errors import UserError

_MAGIC = b"!<arch>\n"
_HEADER = 60  # bytes; the name is in the first 16, the size in decimal from 48 to 58
_Mode = Literal["r|", "r|gz", "r|xz", "r|bz2"]
# How tarfile reads what Python's standard library can decompress.
_MODES: Dict[str, _Mode] = {
    "data.tar": "r|",
    "data.tar.gz": "r|gz",
    "data.tar.xz": "r|xz",
    "data.tar.bz2": "r|bz2",
}


def read_files(package: Path, wanted: Callable[[str], bool]) -> Iterator[Tuple[str, bytes]]:
    """Yield the regular files of a package as ``(path, content)``, in the order of the archive.

    Args:
        package: the .deb.
        wanted: whether the file of that path (``usr/share/...``) is to be read.

    Raises:
        UserError: not a .deb, or damaged, or compressed with what neither Python nor ``dpkg-deb``
            (where there is one) can read.
    """
    try:
        with _data(package) as (stream, mode), tarfile.open(fileobj=stream, mode=mode) as tar:
            for member in tar:
                path = member.name[2:] if member.name.startswith("./") else member.name
                content = tar.extractfile(member) if member.isreg() and wanted(path) else None
                if content is not None:
                    yield path, content.read()
    except (tarfile.TarError, lzma.LZMAError, zlib.error, EOFError, ValueError) as error:
        raise UserError(
            f"{package} is damaged or not a Debian package ({error}): remove it and run the "
            "command again"
        ) from error


@contextlib.contextmanager
def _data(package: Path) -> Iterator[Tuple[IO[bytes], _Mode]]:
    """Yield the stream of ``data.tar`` and how :mod:`tarfile` is to read it."""
    with package.open("rb") as file:
        name, content = _data_member(file)
    if name in _MODES:
        yield io.BytesIO(content), _MODES[name]
        return
    if shutil.which("dpkg-deb") is None:
        raise UserError(
            f"{package} holds {name}, which takes dpkg-deb to read: build the corpus on a Debian "
            "or Ubuntu machine, or bring its raw/ folder with --raw-dir"
        )
    command = ["dpkg-deb", "--fsys-tarfile", str(package.resolve())]
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        yield process.stdout, "r|"
        # What follows the end of the archive: the program must not wait for a reader.
        while process.stdout.read(1 << 20):
            pass
        message = process.stderr.read().decode(errors="replace")
        if process.wait() != 0:
            raise ValueError(last_line(message))


def _data_member(file: IO[bytes]) -> Tuple[str, bytes]:
    """The name and content of the first member called ``data.tar`` and whatever follows."""
    if file.read(len(_MAGIC)) != _MAGIC:
        raise ValueError("it does not begin as one")
    while len(header := file.read(_HEADER)) == _HEADER:
        # GNU's ar ends names with a slash.
        name = header[:16].decode("latin-1").strip().rstrip("/")
        size = int(header[48:58])
        if name.startswith("data.tar"):
            content = file.read(size)
            if len(content) < size:
                raise ValueError("it ends too early")
            return name, content
        file.seek(size + size % 2, io.SEEK_CUR)  # members begin at even bytes
    raise ValueError("it has no data.tar")
