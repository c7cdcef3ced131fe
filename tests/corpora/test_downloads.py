"""Downloads: resumed, verified, recorded."""

import json
import urllib.request

import pytest
from support import statmt

from fairseq_sparsemixer.corpora import downloads
from fairseq_sparsemixer.corpora.wmt14 import extraction
from fairseq_sparsemixer.errors import UserError


def test_a_broken_download_goes_on_where_it_broke(quick, tmp_path):
    size = len(quick.files[statmt.EUROPARL])
    quick.break_after[statmt.EUROPARL] = [1000, 2000]
    statmt.prepare(quick, tmp_path / "out")
    asked = [start for path, start in quick.requests if path == statmt.EUROPARL]
    assert asked == [0, 1000, 3000] and size > 3000
    archive = tmp_path / "out" / "download" / "training-parallel-europarl-v7.tgz"
    assert archive.read_bytes() == quick.files[statmt.EUROPARL]


def test_a_download_that_stays_broken_goes_on_at_the_next_start(quick, tmp_path):
    quick.break_after[statmt.EUROPARL] = [1000] + [0] * downloads.ATTEMPTS
    with pytest.raises(UserError, match="goes on at byte 1000"):
        statmt.prepare(quick, tmp_path / "out")
    quick.requests.clear()
    record = statmt.prepare(quick, tmp_path / "out")
    assert (statmt.EUROPARL, 1000) in quick.requests
    entry = record["source"]["training-parallel-europarl-v7.tgz"]
    assert entry["bytes"] == len(quick.files[statmt.EUROPARL])


def test_two_versions_of_a_file_are_never_mixed(quick, tmp_path):
    quick.break_after[statmt.EUROPARL] = [1000] + [0] * downloads.ATTEMPTS
    with pytest.raises(UserError, match="goes on at byte 1000"):
        statmt.prepare(quick, tmp_path / "out")
    pairs = statmt.sentences(400, 77)
    newer = statmt.tgz(statmt.parallel("training/europarl-v7.de-en", pairs))
    quick.files[statmt.EUROPARL] = newer
    record = statmt.prepare(quick, tmp_path / "out")
    assert record["raw"]["pairs"]["europarl"] == 400


def test_a_server_that_sends_the_rest_of_another_version(quick, tmp_path):
    quick.break_after[statmt.EUROPARL] = [1000] + [0] * downloads.ATTEMPTS
    with pytest.raises(UserError, match="goes on at byte 1000"):
        statmt.prepare(quick, tmp_path / "out")
    pairs = statmt.sentences(400, 77)
    quick.files[statmt.EUROPARL] = statmt.tgz(statmt.parallel("training/europarl-v7.de-en", pairs))
    quick.careless = True
    assert statmt.prepare(quick, tmp_path / "out")["raw"]["pairs"]["europarl"] == 400


def test_a_server_that_neither_resumes_nor_holds_out(quick, tmp_path):
    quick.ranges = False
    quick.break_after[statmt.EUROPARL] = [1000, 2000] * 50
    with pytest.raises(UserError, match="cannot be downloaded"):
        statmt.prepare(quick, tmp_path / "out")
    assert len(quick.break_after[statmt.EUROPARL]) > 80


def test_a_server_that_cannot_resume(quick, tmp_path):
    quick.ranges = False
    quick.break_after[statmt.EUROPARL] = [1000, 2000]
    statmt.prepare(quick, tmp_path / "out")
    archive = tmp_path / "out" / "download" / "training-parallel-europarl-v7.tgz"
    assert archive.read_bytes() == quick.files[statmt.EUROPARL]


def test_first_download_is_recorded_and_can_be_pinned(quick, tmp_path):
    statmt.prepare(quick, tmp_path / "a" / "out")
    recorded = json.loads((tmp_path / "a" / "pins.json").read_text())
    assert sorted(recorded) == sorted(
        path.rsplit("/", 1)[1] for path in statmt.PATHS if path != statmt.NEWS_V9
    )
    # Given to somebody whose server has another file.
    quick.files[statmt.COMMON_CRAWL] = statmt.tgz(
        statmt.parallel("commoncrawl.de-en", statmt.sentences(5, 8))
    )
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "pins.json").write_text(json.dumps(recorded))
    with pytest.raises(UserError, match=r"commoncrawl.tgz is not the file .* SHA-256 .* --mirror"):
        statmt.prepare(quick, tmp_path / "b" / "out")
    assert not (tmp_path / "b" / "out" / "raw").exists()
    # The right file again: the same command succeeds.
    quick.files[statmt.COMMON_CRAWL] = statmt.tgz(statmt.members()[statmt.COMMON_CRAWL])
    archive = tmp_path / "a" / "out" / "download" / "training-parallel-commoncrawl.tgz"
    quick.files[statmt.COMMON_CRAWL] = archive.read_bytes()
    assert statmt.prepare(quick, tmp_path / "b" / "out")["raw"]["pairs"]["common_crawl"] == 200


def test_published_checksums_are_sacrebleus(quick, tmp_path):
    """Without a pin the test set must be the published one; the miniature is not."""
    from sacrebleu.dataset import DATASETS

    assert extraction.TEST.remote.md5 == DATASETS["wmt14/full"].md5[0]
    assert extraction.VALID.remote.md5 == DATASETS["wmt17/dev"].md5[0]
    assert extraction.EUROPARL.remote.md5 is None
    (tmp_path / "pins.json").write_text("{}")
    with pytest.raises(UserError, match=r"test-full.tgz is not the file .* MD5 .* sacreBLEU"):
        statmt.prepare(quick, tmp_path / "out")


def test_a_corpus_made_from_other_archives_than_the_pinned(quick, tmp_path):
    statmt.prepare(quick, tmp_path / "out")
    pins = json.loads((tmp_path / "pins.json").read_text())
    pins["dev.tgz"]["sha256"] = "0" * 64
    (tmp_path / "pins.json").write_text(json.dumps(pins))
    with pytest.raises(UserError, match=r"made from another dev.tgz .* --output"):
        statmt.prepare(quick, tmp_path / "out")


def test_a_damaged_copy_is_named(quick, tmp_path):
    statmt.prepare(quick, tmp_path / "out")
    archive = tmp_path / "out" / "download" / "dev.tgz"
    archive.write_bytes(archive.read_bytes()[:-1] + b"?")
    (tmp_path / "out" / "raw" / "train.en").unlink()
    with pytest.raises(UserError, match=r"dev.tgz is damaged .* Remove it"):
        statmt.prepare(quick, tmp_path / "out")
    archive.unlink()
    statmt.prepare(quick, tmp_path / "out")


def test_no_such_file_and_no_server(quick, tmp_path):
    statmt.write_pins(tmp_path / "pins.json", quick)
    test_set = quick.files.pop(statmt.TEST)
    with pytest.raises(UserError, match=r"404.*--mirror, or put the file at .*test-full.tgz"):
        statmt.prepare(quick, tmp_path / "out")
    quick.files[statmt.TEST] = test_set
    statmt.prepare(quick, tmp_path / "out")
    quick.url = "http://127.0.0.1:9"
    with pytest.raises(UserError, match=r"cannot be downloaded .* check the network"):
        statmt.prepare(quick, tmp_path / "elsewhere")


def test_a_record_that_is_none(quick, tmp_path):
    (tmp_path / "pins.json").write_text("[1, 2]")
    with pytest.raises(UserError, match="a record of checksums"):
        statmt.prepare(quick, tmp_path / "out")


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (
            (302, {"Location": "ftp://127.0.0.1/x"}, b""),
            "302 Found, to ftp://127.0.0.1/x, which is",
        ),
        ((301, {"Location": "file:///etc/passwd"}, b""), "says 301"),
        ((302, {"Location": statmt.TEST}, b""), "infinite loop"),  # three lines of urllib
        ((204, {}, b""), "says 204 No Content; name a mirror"),
        ((203, {}, b"a page of a proxy"), "says 203"),
        ((200, {}, b""), "the server sent an empty file"),
        ((206, {"Content-Range": "bytes 5-6/7"}, b"xy"), "the server sent another part"),
    ],
)
def test_an_answer_that_is_no_file(quick, tmp_path, answer, message):
    quick.answers[statmt.TEST] = answer
    with pytest.raises(UserError, match=message) as caught:
        statmt.prepare(quick, tmp_path / "out")
    assert len(str(caught.value).splitlines()) == 1
    assert not (tmp_path / "out" / "download" / "test-full.tgz").exists()
    del quick.answers[statmt.TEST]
    statmt.prepare(quick, tmp_path / "out")


def test_a_redirect_to_another_server_is_followed(quick, tmp_path):
    quick.files["/moved.tgz"] = quick.files[statmt.TEST]
    quick.answers[statmt.TEST] = (302, {"Location": f"{quick.url}/moved.tgz"}, b"")
    record = statmt.prepare(quick, tmp_path / "out")
    assert record["source"]["test-full.tgz"]["bytes"] == len(quick.files[statmt.TEST])


@pytest.mark.parametrize(
    ("start", "target", "followed"),
    [
        ("http://a/x", "http://b/x", True),
        ("http://a/x", "https://b/x", True),
        ("https://a/x", "HTTPS://b/x", True),
        ("https://a/x", "http://b/x", False),
        ("https://a/x", "ftp://b/x", False),
        ("http://a/x", "ftp://b/x", False),
    ],
)
def test_protection_is_never_lost_by_a_redirect(start, target, followed):
    redirects, request = downloads._Redirects(), urllib.request.Request(start)
    if followed:
        new = redirects.redirect_request(request, None, 302, "Found", {}, target)
        assert new.full_url == target
    else:
        with pytest.raises(urllib.error.HTTPError, match="which is not followed"):
            redirects.redirect_request(request, None, 302, "Found", {}, target)


def test_a_server_that_sends_a_part_of_the_rest(quick, tmp_path):
    """Without another request the file would end where that part does."""
    content = quick.files[statmt.EUROPARL]
    quick.break_after[statmt.EUROPARL] = [1000] + [0] * downloads.ATTEMPTS
    with pytest.raises(UserError, match="goes on at byte 1000"):
        statmt.prepare(quick, tmp_path / "out")
    part = {"ETag": f'"{hash(content)}"', "Content-Range": f"bytes 1000-1499/{len(content)}"}
    quick.answers[statmt.EUROPARL] = (206, part, content[1000:1500])
    with pytest.raises(UserError, match="goes on at byte 0"):  # the second part is not the next
        statmt.prepare(quick, tmp_path / "out")
    asked = [start for path, start in quick.requests if path == statmt.EUROPARL]
    assert 1500 in asked
    del quick.answers[statmt.EUROPARL]
    record = statmt.prepare(quick, tmp_path / "out")
    assert record["source"]["training-parallel-europarl-v7.tgz"]["bytes"] == len(content)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ((206, {"Content-Range": "bytes 4-9/10"}, b"456789"), "another part"),
        ((206, {"Content-Range": "bytes 0-9/10"}, b"0123456789"), "another part"),
        ((200, {"Content-Length": "many"}, b"0123"), "a length that is none"),
        ((200, {"Content-Length": "-4"}, b"0123"), "a length that is none"),
        ((200, {"Content-Length": "9" * 5000}, b"0123"), "a length that is none"),
    ],
)
def test_answers_that_nobody_asked_for(answer, reason, quick, tmp_path):
    """To a request for the whole file; what lies there is of an unknown version."""
    quick.answers["/x"] = answer
    partial = tmp_path / ".x.partial"
    for left_over in (None, b"0123"):
        if left_over is not None:
            partial.write_bytes(left_over)
        with pytest.raises(UserError, match=f"cannot be downloaded .*{reason}"):
            downloads._download(f"{quick.url}/x", partial)
        assert not partial.exists() or partial.read_bytes() == left_over
