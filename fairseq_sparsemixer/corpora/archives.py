"""Members of a tar archive, copied out by name: nothing else in it reaches the disk."""

import posixpath
import shutil
import tarfile
import zlib
from pathlib import Path
from typing import Dict

from fairseq_sparsemixer.errors import UserError


def extract_members(archive: Path, members: Dict[str, Path]) -> None:
    """Copy members of ``archive`` (tar, compressed or not) to files of our own naming.

    The archive is read once, as a stream. Names in it decide nothing: members are never unpacked
    to where they say.

    Args:
        archive: the file.
        members: for each name in the archive, where its content goes.

    Raises:
        UserError: a member is missing, is a link or a folder, some member points out of the
            archive, or the archive is damaged.
    """
    missing = dict(members)
    try:
        with tarfile.open(archive, mode="r|*") as tar:
            for member in tar:
                name = posixpath.normpath(member.name)
                if name.startswith(("/", "../")) or name == "..":
                    raise UserError(
                        f"{archive} holds the member {member.name}, which points out of the "
                        "folder: this is not the published archive, remove it"
                    )
                target = missing.pop(name, None)
                if target is None:
                    continue
                content = tar.extractfile(member) if member.isreg() else None
                if content is None:
                    raise UserError(
                        f"{archive}: {name} is not a file but a link or a folder: this is not the "
                        "published archive, remove it"
                    )
                target.parent.mkdir(parents=True, exist_ok=True)
                with content, target.open("wb") as file:
                    shutil.copyfileobj(content, file, 1 << 20)
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise UserError(
            f"{archive} is damaged ({error}): remove it and run the command again"
        ) from error
    if missing:
        raise UserError(
            f"{archive} has no member {', '.join(sorted(missing))}: this is not the published "
            "archive, remove it and run the command again"
        )
