"""Text read strictly, and files written whole or not at all."""

import errno
import os
import socket
import subprocess
from pathlib import Path

import pytest
from support.busy import busy

from fairseq_sparsemixer import disk, files
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
    with pytest.raises(UserError, match=message), disk.report_full_disk(tmp_path, 150):
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(PermissionError), disk.report_full_disk(tmp_path, 150):
        raise PermissionError(errno.EACCES, "not the disk")


# Outputs that are no regular file


def test_links_are_followed(tmp_path):
    (tmp_path / "store").mkdir()
    path, target = tmp_path / "link", tmp_path / "store" / "text"
    path.symlink_to("store/text")
    for lines in (["made"], ["made anew"]):
        files.check_writable(path)
        files.write_lines(path, lines)
        assert path.is_symlink() and not target.is_symlink()
        assert files.read_lines(target) == lines
    assert sorted(each.name for each in tmp_path.rglob("*")) == ["link", "store", "text"]


def test_what_is_no_file_is_written_into(tmp_path):
    """A pipe here; a device would be replaced likewise by whoever may, such as root."""
    pipe, link, received = tmp_path / "pipe", tmp_path / "link", tmp_path / "received"
    os.mkfifo(pipe)
    link.symlink_to(pipe)
    for path in (pipe, link):
        with received.open("wb") as file:
            reader = subprocess.Popen(["cat", pipe], stdout=file)
        files.check_writable(path)
        files.write_lines(path, ["a", "b"])
        assert reader.wait(60) == 0
        assert received.read_bytes() == b"a\nb\n"
        assert pipe.is_fifo() and link.is_symlink()


def test_a_device_is_written_into_and_stays(tmp_path, monkeypatch):
    link = tmp_path / "null"
    link.symlink_to("/dev/null")
    full = tmp_path / "full"
    full.symlink_to("/dev/full")
    files.write_json(link, {})
    assert link.is_symlink() and os.path.samefile(link, "/dev/null")
    with pytest.raises(disk.FullDiskError, match=r"cannot write .*full .No space left"):
        files.write_lines(full, ["x" * 100_000])
    with socket.socket(socket.AF_UNIX) as server:
        monkeypatch.chdir(tmp_path)  # names of sockets are short
        server.bind("s")
        with pytest.raises(UserError, match="give --output the name of a file"):
            files.check_writable(Path("s"))


# One at a time


@pytest.mark.parametrize("killed", [False, True])
def test_who_writes_the_same_file_waits(tmp_path, capsys, killed):
    """Not one of both writes into the other's partial file; killed, it holds nobody up."""
    path = tmp_path / "text"
    with busy(lambda: files.atomic_path(path), killed=killed):
        files.write_lines(path, ["ours"])
    assert f"waiting for another process, which is at work on {path}" in capsys.readouterr().err
    assert {found.name: found.read_bytes() for found in tmp_path.iterdir()} == {"text": b"ours\n"}


def test_a_scratch_folder_is_not_cleared_while_it_is_used(tmp_path, capsys):
    scratch = tmp_path / "scratch"
    with busy(lambda: files.scratch_folder(scratch)) as other, files.scratch_folder(scratch):
        pass
    assert f"waiting for process {other} on " in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
