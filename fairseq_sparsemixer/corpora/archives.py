"""Archives of a web server: members are copied out by name, and nothing else reaches the disk."""

import gzip
import posixpath
import shutil
import tarfile
import zipfile
import zlib
from pathlib import Path
from typing import Dict, List

from fairseq_sparsemixer.corpora.downloads import RemoteFile, Shelf, obtain
from fairseq_sparsemixer.disk import report_full_disk
from fairseq_sparsemixer.errors import UserError


def unpack(
    remote: RemoteFile,
    members: Dict[str, Path],
    shelf: Shelf,
    megabytes: int,
) -> None:
    """Download an archive unless it is there, copy members of it out, and record its checksum.

    Args:
        remote, shelf: see :func:`.downloads.obtain`.
        members: see :func:`extract_members`.
        megabytes: that the shelf may need, for the error where the disk is full.

    Raises:
        UserError: see both; an archive that was downloaded just now is then removed.
    """
    was_there = (shelf.folder / remote.name).exists()
    with report_full_disk(shelf.folder, megabytes, "--downloads"):
        path = obtain(remote, shelf)
    try:
        extract_members(path, members)
    except UserError as error:
        if was_there:
            raise UserError(f"{error}; remove it and run the command again") from error
        path.unlink()
        raise UserError(
            f"{error}; it was removed: run the command again to download it anew, or name another "
            "server with --mirror"
        ) from error
    shelf.checksums.record(remote, path)


def extract_members(archive: Path, members: Dict[str, Path]) -> None:
    """Copy members of ``archive`` (tar and gzip, or .zip) to files of our own naming.

    A tar is read once, as a stream, to its end, so that its checksum is verified; of a zip each
    member has its own. Names in it decide nothing: members are never unpacked to where they say.

    Args:
        archive: the file.
        members: for each name in the archive, where its content goes.

    Raises:
        UserError: a member is missing, is a link or a folder, some member points out of the
            archive, or the archive is damaged.
    """
    if archive.suffix == ".zip":
        _extract_zip(archive, members)
        return
    missing = dict(members)
    try:
        with gzip.open(archive) as stream:
            with tarfile.open(fileobj=stream, mode="r|") as tar:
                for member in tar:
                    name = posixpath.normpath(member.name)
                    if name.startswith(("/", "../")) or name == "..":
                        raise UserError(
                            f"{archive} is not the published archive: its member {member.name} "
                            "points out of the folder"
                        )
                    target = missing.pop(name, None)
                    if target is None:
                        continue
                    content = tar.extractfile(member) if member.isreg() else None
                    if content is None:
                        raise UserError(
                            f"{archive} is not the published archive: {name} is not a file but a "
                            "link or a folder"
                        )
                    target.parent.mkdir(parents=True, exist_ok=True)
                    with content, target.open("wb") as file:
                        shutil.copyfileobj(content, file, 1 << 20)
            # tarfile stops at the end of the last member, and at a header that it cannot read.
            while stream.read(1 << 20):
                pass
    except (tarfile.TarError, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{archive} is damaged ({error})") from error
    if missing:
        raise _no_member(archive, sorted(missing))


def _extract_zip(archive: Path, members: Dict[str, Path]) -> None:
    try:
        with zipfile.ZipFile(archive) as zipped:
            missing = sorted(members.keys() - set(zipped.namelist()))
            if missing:
                raise _no_member(archive, missing)
            for name, target in members.items():
                target.parent.mkdir(parents=True, exist_ok=True)
                with zipped.open(name) as content, target.open("wb") as file:
                    shutil.copyfileobj(content, file, 1 << 20)
    # RuntimeError: a member is encrypted.
    except (zipfile.BadZipFile, EOFError, zlib.error, RuntimeError) as error:
        raise UserError(f"{archive} is damaged ({error})") from error


def _no_member(archive: Path, names: List[str]) -> UserError:
    return UserError(f"{archive} is not the published archive: it has no member {', '.join(names)}")
