"""Debian packages, read as archives."""

import pytest
from support.debian import ar, tar, write_deb, write_program

from fairseq_sparsemixer.corpora.debian import deb_archives
from fairseq_sparsemixer.errors import UserError

CONTENT = {
    "usr": None,
    "usr/a": b"text of a",
    "usr/b": b"text of b",
    "usr/link": "a",
    "usr/c": b"text of c",
}


@pytest.mark.parametrize("compression", ["xz", "gz", "bz2", ""])
def test_files_of_a_package(tmp_path, compression):
    path = write_deb(tmp_path / "x.deb", CONTENT, compression)
    found = deb_archives.read_files(path, lambda name: name not in ("usr/b",))
    assert list(found) == [("usr/a", b"text of a"), ("usr/c", b"text of c")]


def test_names_of_members_may_end_in_a_slash(tmp_path):
    path = tmp_path / "x.deb"
    path.write_bytes(ar({"debian-binary/": b"2.0\n", "data.tar/": tar({"usr/a": b"x"})}))
    assert list(deb_archives.read_files(path, lambda name: True)) == [("usr/a", b"x")]


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"?" + data[1:],
        lambda data: data[:200],
        lambda data: data[: data.index(b"data.tar")],
        lambda data: data[:-60] + bytes(60),
        lambda data: data.replace(b"`\n", b"`\n", 1)[:56] + b"size      " + data[66:],
    ],
)
def test_damaged_packages(tmp_path, damage):
    path = write_deb(tmp_path / "x.deb", CONTENT)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=r"x\.deb is damaged or not a Debian package"):
        list(deb_archives.read_files(path, lambda name: True))


def test_truncated_package(tmp_path):
    # What is cut off is but the zeros that end a tar archive.
    path = write_deb(tmp_path / "x.deb", CONTENT, "")
    path.write_bytes(path.read_bytes()[:-600])
    with pytest.raises(UserError, match=r"damaged.*it ends too early"):
        list(deb_archives.read_files(path, lambda name: True))


def test_zstandard_takes_dpkg(tmp_path, programs):
    path = write_deb(tmp_path / "x.deb", {}, "zst", data=tar(CONTENT))
    with pytest.raises(UserError, match=r"data.tar.zst, which takes dpkg-deb to read: build"):
        list(deb_archives.read_files(path, lambda name: True))
    # In place of dpkg-deb what gives back the data as it is, with much more than a pipe holds.
    code = "import sys; assert sys.argv[1] == '--fsys-tarfile'; sys.stdout.buffer.write("
    code += "open(sys.argv[2], 'rb').read().split(b'`\\n', 3)[3] + bytes(10**6))"
    write_program(programs / "dpkg-deb", code)
    found = deb_archives.read_files(path, lambda name: name == "usr/b")
    assert list(found) == [("usr/b", b"text of b")]
    write_program(programs / "dpkg-deb", f"{code}; sys.exit('the disk is on fire')")
    with pytest.raises(UserError, match="the disk is on fire"):
        list(deb_archives.read_files(path, lambda name: True))
