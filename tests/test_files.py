"""Text read strictly, and files written whole or not at all."""

import errno

import pytest

from fairseq_sparsemixer import files
from fairseq_sparsemixer.errors import UserError


def test_read_lines_splits_on_newlines_alone(tmp_path):
    path = tmp_path / "text"
    path.write_bytes("\ufeffa\u2028b\r\nc\x85d\re\n\nlast".encode())
    assert files.read_lines(path) == ["a\u2028b", "c\x85d\re", "", "last"]
    files.write_lines(path, ["a\u2028b", ""])
    assert path.read_bytes() == "a\u2028b\n\n".encode()
    assert files.read_lines(path) == ["a\u2028b", ""]


def test_write_lines_keeps_the_old_file_when_interrupted(tmp_path):
    path = tmp_path / "text"
    files.write_lines(path, ["old"])

    def interrupted():
        yield "new"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        files.write_lines(path, interrupted())
    assert {found.name: found.read_bytes() for found in tmp_path.iterdir()} == {"text": b"old\n"}


def test_full_disk_is_a_user_error(tmp_path):
    message = f"no space left on the disk of {tmp_path} .about 150 MB"
    with pytest.raises(UserError, match=message), files.report_full_disk(tmp_path, 150):
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(PermissionError), files.report_full_disk(tmp_path, 150):
        raise PermissionError(errno.EACCES, "not the disk")
