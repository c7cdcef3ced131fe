"""Archives that are damaged, incomplete or malicious."""

import tarfile
from pathlib import Path

import pytest
from support import statmt

from fairseq_sparsemixer.corpora import archives
from fairseq_sparsemixer.errors import UserError


def member(name, kind=tarfile.REGTYPE, target=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    info.size = 1 if kind == tarfile.REGTYPE else 0
    return info


@pytest.mark.parametrize(
    ("evil", "message"),
    [
        (member("../evil"), r"its member \.\./evil points out of the folder; it was removed"),
        (member("/evil"), r"its member /evil points out"),
        (member("training/../../evil"), "points out of the folder"),
        (member("training/europarl-v7.de-en.en", tarfile.SYMTYPE, "/etc/passwd"), "but a link"),
        (member("training/europarl-v7.de-en.en", tarfile.LNKTYPE, "/etc/passwd"), "but a link"),
        (member("training/europarl-v7.de-en.de", tarfile.DIRTYPE), "but a link or a folder"),
    ],
)
def test_malicious_member(quick, tmp_path, evil, message):
    good = quick.files[statmt.EUROPARL]
    quick.files[statmt.EUROPARL] = statmt.tgz(statmt.members()[statmt.EUROPARL], extra=[evil])
    outside = set(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=message):
        statmt.prepare(quick, tmp_path / "out")
    inside = tmp_path / "out"
    assert not Path("/evil").exists()
    new = {path for path in tmp_path.rglob("*") if inside not in (path, *path.parents)} - outside
    assert new <= {tmp_path / "pins.json"}
    assert not (inside / "raw").exists()
    # The bad archive is gone and was not recorded.
    quick.files[statmt.EUROPARL] = good
    assert statmt.prepare(quick, tmp_path / "out")["raw"]["pairs"]["europarl"] == 504


def test_a_link_that_nobody_asked_for_is_not_unpacked(quick, tmp_path):
    link = member("training/latest", tarfile.SYMTYPE, "/etc")
    quick.files[statmt.EUROPARL] = statmt.tgz(statmt.members()[statmt.EUROPARL], extra=[link])
    statmt.prepare(quick, tmp_path / "out")
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_symlink()]


def test_missing_test_set(quick, tmp_path):
    made = statmt.members()[statmt.TEST]
    del made["test-full/newstest2014-deen-ref.de.sgm"]
    quick.files[statmt.TEST] = statmt.tgz(made)
    with pytest.raises(UserError, match=r"has no member test-full/newstest2014-deen-ref.de.sgm"):
        statmt.prepare(quick, tmp_path / "out")
    assert not (tmp_path / "out" / "download" / "test-full.tgz").exists()
    quick.files[statmt.TEST] = statmt.tgz(statmt.members()[statmt.TEST])
    statmt.write_pins(tmp_path / "pins.json", quick)
    statmt.prepare(quick, tmp_path / "out")


def test_flipped_bits_are_noticed(tmp_path):
    """gzip has a checksum, which tarfile alone does not look at."""
    good = statmt.tgz(statmt.members()[statmt.EUROPARL])
    archive = tmp_path / "archive.tgz"
    names = ["training/europarl-v7.de-en.en", "training/europarl-v7.de-en.de"]
    targets = {name: tmp_path / name.rsplit(".")[-1] for name in names}
    archive.write_bytes(good)
    archives.extract_members(archive, targets)
    places = [*range(len(good) // 40, len(good) - 8, len(good) // 40), len(good) - 5, -1]
    for place in places:
        damaged = bytearray(good)
        damaged[place] ^= 1
        archive.write_bytes(damaged)
        with pytest.raises(UserError, match="is damaged"):
            archives.extract_members(archive, targets)
    archive.write_bytes(b"<html>Not found</html>")
    with pytest.raises(UserError, match="is damaged"):
        archives.extract_members(archive, targets)


def test_an_archive_that_the_user_put_there_is_left(quick, tmp_path):
    archive = tmp_path / "out" / "download" / "training-parallel-commoncrawl.tgz"
    archive.parent.mkdir(parents=True)
    archive.write_bytes(b"mine")
    with pytest.raises(UserError, match=r"commoncrawl.tgz is damaged .*; remove it and run"):
        statmt.prepare(quick, tmp_path / "out")
    assert archive.read_bytes() == b"mine"


def test_truncated_archive(quick, tmp_path):
    good = quick.files[statmt.COMMON_CRAWL]
    quick.files[statmt.COMMON_CRAWL] = good[: len(good) // 2]
    with pytest.raises(
        UserError, match=r"commoncrawl.tgz is damaged .* removed: run the command again"
    ):
        statmt.prepare(quick, tmp_path / "out")
    quick.files[statmt.COMMON_CRAWL] = good
    statmt.prepare(quick, tmp_path / "out")
