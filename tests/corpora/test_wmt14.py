"""WMT14 English-German from miniature archives of a local server: downloads, text, pieces."""

import contextlib
import errno
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
from support import commands, statmt

from fairseq_sparsemixer import files
from fairseq_sparsemixer.corpora import binarise, bpe, spm, workers
from fairseq_sparsemixer.corpora.wmt14 import (
    archives,
    downloads,
    extraction,
    filtering,
    preparation,
)
from fairseq_sparsemixer.errors import UserError

VOCAB_SIZE = 300
MERGES = 250
SPLITS = ("train", "valid", "test")


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(downloads.time, "sleep", lambda seconds: None)
    with statmt.serving() as running:
        yield running


@pytest.fixture
def quick(server, monkeypatch):
    """The server, where fairseq-preprocess (seconds each time) is left out."""

    def build_binary(folder, *_, **__):
        (folder / "bin").mkdir(exist_ok=True)
        (folder / "bin" / "made").write_text("")
        return [folder / "bin" / "made"], {}

    monkeypatch.setattr(binarise, "build_binary", build_binary)
    return server


def command(server, output, *arguments):
    pins = output.parent / "pins.json"
    if not pins.is_file():
        output.parent.mkdir(parents=True, exist_ok=True)
        statmt.write_pins(pins, server)
    arguments = [
        "wmt14",
        "--mirror",
        server.url,
        "--checksums",
        pins,
        "--output",
        output,
        *arguments,
    ]
    if "moses" in arguments:
        arguments += ["--merges", MERGES]
    else:
        arguments += ["--vocab-size", VOCAB_SIZE]
    commands.command("prepare", *arguments)
    return json.loads((output / "record.json").read_text())


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Both pipelines from the same archives: (record, folder) by name."""
    folder = tmp_path_factory.mktemp("wmt14")
    made = {}
    with statmt.serving() as server:
        for pipeline in preparation.PIPELINES:
            output = folder / pipeline
            record = command(server, output, "--pipeline", pipeline, "--workers", "1")
            made[pipeline] = (record, output)
    return made


def test_raw_text_is_that_of_the_archives(built):
    record, folder = built["sentencepiece"]
    expected = statmt.sentences(500, 1) + statmt.DIRT + statmt.sentences(200, 2)
    expected += [*statmt.sentences(100, 3), statmt.sentences(30, 5)[0]]
    expected += [("10\u00a0% of\u2028it.", "10\u00a0% davon.")]
    splits = {
        "train": expected,
        "valid": statmt.sentences(24, 4),
        "test": statmt.sentences(30, 5),
    }
    for (split, pairs), (side, language) in itertools.product(
        splits.items(), enumerate(("en", "de"))
    ):
        lines = files.read_lines(folder / "raw" / f"{split}.{language}")
        assert lines == [pair[side] for pair in pairs]
    pairs = {"europarl": 504, "common_crawl": 200, "news_commentary": 102}
    assert record["raw"]["pairs"] == pairs
    assert record["raw"]["dropped"] == {"not_utf8": 1}
    assert record["raw"]["held_out_sources"] >= 1
    assert record["test"] is None  # these are not the published archives


def test_both_pipelines_have_the_same_raw_text(built):
    for split, language in itertools.product(SPLITS, ("en", "de")):
        texts = [
            (folder / "raw" / f"{split}.{language}").read_bytes() for _, folder in built.values()
        ]
        assert texts[0] == texts[1]


@pytest.mark.parametrize("pipeline", preparation.PIPELINES)
def test_what_is_cleaned_away(built, pipeline):
    record, folder = built[pipeline]
    assert record["cleaning"]["dropped"] == {"empty": 2, "length_ratio": 1, "too_long": 1}
    kept = 504 + 200 + 102 - 4
    assert record["cleaning"]["pairs"] == kept
    assert record["splits"]["train"]["en"]["sentences"] == kept
    # Nothing is cleaned away from what is scored.
    assert record["splits"]["valid"]["de"]["sentences"] == 24
    assert record["splits"]["test"]["de"]["sentences"] == 30
    assert not list(folder.rglob("*.partial"))


def test_sacrebleu_reads_the_test_set_alike(built, tmp_path):
    """Our reading of the SGM files against sacreBLEU's own."""
    from sacrebleu.dataset.fake_sgml import FakeSGMLDataset

    hard = [(" two  spaces\tand a tab ", "&amp; &quot;entities&quot; <b>bold</b> „Anführung“"),
            ("a </seg> inside", "10 < 11 > 9")]  # fmt: skip
    for side in (0, 1):
        sgm = tmp_path / "newstest.sgm"
        sgm.write_bytes(statmt.sgm(hard + statmt.sentences(5, 9), side))
        dataset = FakeSGMLDataset("x", data=[], langpairs={})
        dataset._convert_format(str(sgm), str(tmp_path / "theirs"))
        ours = extraction._plain_text(sgm)
        assert files.read_lines(ours) == files.read_lines(tmp_path / "theirs")


def test_moses_tokens_in_pieces(built):
    from subword_nmt.apply_bpe import BPE

    from fairseq_sparsemixer.text import moses

    record, folder = built["moses"]
    with (folder / "bin" / "bpecodes").open(encoding="utf-8") as file:
        bpe = BPE(file)
    assert len((folder / "bin" / "bpecodes").read_text().splitlines()) == 1 + MERGES
    for split, language in itertools.product(SPLITS, ("en", "de")):
        raw = files.read_lines(folder / "raw" / f"{split}.{language}")
        tokenise = moses.test_tokens if split == "test" else moses.training_tokens
        expected = [bpe.process_line(tokenise(line, language)) for line in raw]
        pieces = files.read_lines(folder / "bpe" / f"{split}.{language}")
        if split == "train":
            assert set(pieces) <= set(expected)
        else:
            assert pieces == expected
    assert record["splits"]["train"]["en"]["unknown"] == 0
    valid = "\n".join(files.read_lines(folder / "tokens" / "valid.en"))
    test = "\n".join(files.read_lines(folder / "tokens" / "test.de"))
    assert "@-@" in valid and "&quot;" in valid and "„" in test


def test_moses_codes_are_those_of_the_command_line(built, tmp_path):
    """One learning over the text of both languages, as the reference recipe runs it."""
    _, folder = built["moses"]
    text = b"".join((folder / "tokens" / f"train.{name}").read_bytes() for name in ("en", "de"))
    command = [sys.executable, "-m", "subword_nmt.learn_bpe", "-s", str(MERGES)]
    result = subprocess.run(command, input=text, capture_output=True, check=True)
    assert result.stdout == (folder / "bin" / "bpecodes").read_bytes()


@pytest.mark.parametrize("pipeline", preparation.PIPELINES)
def test_fairseq_reads_back_the_pieces(built, pipeline):
    from fairseq.data import Dictionary, data_utils

    record, folder = built[pipeline]
    dictionary = Dictionary.load(str(folder / "bin" / "dict.de.txt"))
    if pipeline == "sentencepiece":
        assert len(dictionary) == record["vocabulary"]
    else:
        # fairseq fills up to a multiple of 8 with words that do not occur.
        made_up = sum(symbol.startswith("madeupword") for symbol in dictionary.symbols)
        assert len(dictionary) - made_up == record["vocabulary"]
    pieces = "spm" if pipeline == "sentencepiece" else "bpe"
    for split, language in itertools.product(SPLITS, ("en", "de")):
        dataset = data_utils.load_indexed_dataset(
            str(folder / "bin" / f"{split}.en-de.{language}"), dictionary
        )
        lines = files.read_lines(folder / pieces / f"{split}.{language}")
        assert len(dataset) == len(lines)
        if split == "train":
            read = [dictionary.string(sentence) for sentence in dataset]
            wrong = [line for line, mine in zip(lines, read) if line != mine]
            assert len(wrong) <= record["splits"]["train"][language]["unknown"]
            assert all("<unk>" in mine for line, mine in zip(lines, read) if line != mine)


def test_two_workers_do_what_one_does(built, server, tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "_LINES_PER_WORKER", 400)
    monkeypatch.setattr(workers, "CHUNK", 50)
    compared = set()
    for pipeline in preparation.PIPELINES:
        _, folder = built[pipeline]
        again = tmp_path / pipeline
        command(server, again, "--pipeline", pipeline, "--workers", "2")
        for path in folder.rglob("*"):
            place = path.relative_to(folder)
            if path.is_file() and place.parts[0] not in (".steps", "download"):
                assert path.read_bytes() == (again / place).read_bytes(), path
                compared.add(place.as_posix())
    assert {"bpe/codes", "bin/train.en-de.de.bin", "clean/train.en", "tokens/test.de"} <= compared


def test_news_commentary_of_2014(quick, tmp_path):
    record = command(quick, tmp_path / "out", "--news-commentary", "v9")
    assert record["raw"]["pairs"]["news_commentary"] == 50
    assert "training-parallel-nc-v9.tgz" in record["source"]


def test_finished_corpus_needs_no_server(quick, tmp_path, capsys):
    output = tmp_path / "out"
    first = command(quick, output)
    quick.requests.clear()
    for archive in (output / "download").glob("*.tgz"):
        archive.unlink()
    assert command(quick, output) == first
    assert quick.requests == []
    assert capsys.readouterr().err.count("already done") == 4


# --- downloads -----------------------------------------------------------------------------------


def test_a_broken_download_goes_on_where_it_broke(quick, tmp_path):
    size = len(quick.files[statmt.EUROPARL])
    quick.break_after[statmt.EUROPARL] = [1000, 2000]
    command(quick, tmp_path / "out")
    asked = [start for path, start in quick.requests if path == statmt.EUROPARL]
    assert asked == [0, 1000, 3000] and size > 3000
    archive = tmp_path / "out" / "download" / "training-parallel-europarl-v7.tgz"
    assert archive.read_bytes() == quick.files[statmt.EUROPARL]


def test_a_download_that_stays_broken_goes_on_at_the_next_start(quick, tmp_path):
    quick.break_after[statmt.EUROPARL] = [1000] + [0] * downloads.ATTEMPTS
    with pytest.raises(UserError, match="goes on at byte 1000"):
        command(quick, tmp_path / "out")
    quick.requests.clear()
    record = command(quick, tmp_path / "out")
    assert (statmt.EUROPARL, 1000) in quick.requests
    entry = record["source"]["training-parallel-europarl-v7.tgz"]
    assert entry["bytes"] == len(quick.files[statmt.EUROPARL])


def test_two_versions_of_a_file_are_never_mixed(quick, tmp_path):
    quick.break_after[statmt.EUROPARL] = [1000] + [0] * downloads.ATTEMPTS
    with pytest.raises(UserError, match="goes on at byte 1000"):
        command(quick, tmp_path / "out")
    pairs = statmt.sentences(400, 77)
    newer = statmt.tgz(statmt.parallel("training/europarl-v7.de-en", pairs))
    quick.files[statmt.EUROPARL] = newer
    record = command(quick, tmp_path / "out")
    assert record["raw"]["pairs"]["europarl"] == 400


def test_a_server_that_sends_the_rest_of_another_version(quick, tmp_path):
    quick.break_after[statmt.EUROPARL] = [1000] + [0] * downloads.ATTEMPTS
    with pytest.raises(UserError, match="goes on at byte 1000"):
        command(quick, tmp_path / "out")
    pairs = statmt.sentences(400, 77)
    quick.files[statmt.EUROPARL] = statmt.tgz(statmt.parallel("training/europarl-v7.de-en", pairs))
    quick.careless = True
    assert command(quick, tmp_path / "out")["raw"]["pairs"]["europarl"] == 400


def test_a_server_that_neither_resumes_nor_holds_out(quick, tmp_path):
    quick.ranges = False
    quick.break_after[statmt.EUROPARL] = [1000, 2000] * 50
    with pytest.raises(UserError, match="cannot be downloaded"):
        command(quick, tmp_path / "out")
    assert len(quick.break_after[statmt.EUROPARL]) > 80


def test_a_server_that_cannot_resume(quick, tmp_path):
    quick.ranges = False
    quick.break_after[statmt.EUROPARL] = [1000, 2000]
    command(quick, tmp_path / "out")
    archive = tmp_path / "out" / "download" / "training-parallel-europarl-v7.tgz"
    assert archive.read_bytes() == quick.files[statmt.EUROPARL]


def test_first_download_is_recorded_and_can_be_pinned(quick, tmp_path):
    command(quick, tmp_path / "a" / "out")
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
        command(quick, tmp_path / "b" / "out")
    assert not (tmp_path / "b" / "out" / "raw").exists()
    # The right file again: the same command succeeds.
    quick.files[statmt.COMMON_CRAWL] = statmt.tgz(statmt.members()[statmt.COMMON_CRAWL])
    archive = tmp_path / "a" / "out" / "download" / "training-parallel-commoncrawl.tgz"
    quick.files[statmt.COMMON_CRAWL] = archive.read_bytes()
    assert command(quick, tmp_path / "b" / "out")["raw"]["pairs"]["common_crawl"] == 200


def test_published_checksums_are_sacrebleus(quick, tmp_path):
    """Without a pin the test set must be the published one; the miniature is not."""
    from sacrebleu.dataset import DATASETS

    assert extraction.TEST.remote.md5 == DATASETS["wmt14/full"].md5[0]
    assert extraction.VALID.remote.md5 == DATASETS["wmt17/dev"].md5[0]
    assert extraction.EUROPARL.remote.md5 is None
    (tmp_path / "pins.json").write_text("{}")
    with pytest.raises(UserError, match=r"test-full.tgz is not the file .* MD5 .* sacreBLEU"):
        command(quick, tmp_path / "out")


def test_a_corpus_made_from_other_archives_than_the_pinned(quick, tmp_path):
    command(quick, tmp_path / "out")
    pins = json.loads((tmp_path / "pins.json").read_text())
    pins["dev.tgz"]["sha256"] = "0" * 64
    (tmp_path / "pins.json").write_text(json.dumps(pins))
    with pytest.raises(UserError, match=r"made from another dev.tgz .* --output"):
        command(quick, tmp_path / "out")


def test_a_damaged_copy_is_named(quick, tmp_path):
    command(quick, tmp_path / "out")
    archive = tmp_path / "out" / "download" / "dev.tgz"
    archive.write_bytes(archive.read_bytes()[:-1] + b"?")
    (tmp_path / "out" / "raw" / "train.en").unlink()
    with pytest.raises(UserError, match=r"dev.tgz is damaged .* Remove it"):
        command(quick, tmp_path / "out")
    archive.unlink()
    command(quick, tmp_path / "out")


def test_no_such_file_and_no_server(quick, tmp_path):
    statmt.write_pins(tmp_path / "pins.json", quick)
    test_set = quick.files.pop(statmt.TEST)
    with pytest.raises(UserError, match=r"404.*--mirror, or put the file at .*test-full.tgz"):
        command(quick, tmp_path / "out")
    quick.files[statmt.TEST] = test_set
    command(quick, tmp_path / "out")
    quick.url = "http://127.0.0.1:9"
    with pytest.raises(UserError, match=r"cannot be downloaded .* check the network"):
        command(quick, tmp_path / "elsewhere")


def test_a_record_that_is_none(quick, tmp_path):
    (tmp_path / "pins.json").write_text("[1, 2]")
    with pytest.raises(UserError, match="not a record of checksums"):
        command(quick, tmp_path / "out")


# --- archives ------------------------------------------------------------------------------------


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
        command(quick, tmp_path / "out")
    inside = tmp_path / "out"
    assert not Path("/evil").exists()
    new = {path for path in tmp_path.rglob("*") if inside not in (path, *path.parents)} - outside
    assert new <= {tmp_path / "pins.json"}
    assert not (inside / "raw").exists()
    # The bad archive is gone and was not recorded.
    quick.files[statmt.EUROPARL] = good
    assert command(quick, tmp_path / "out")["raw"]["pairs"]["europarl"] == 504


def test_a_link_that_nobody_asked_for_is_not_unpacked(quick, tmp_path):
    link = member("training/latest", tarfile.SYMTYPE, "/etc")
    quick.files[statmt.EUROPARL] = statmt.tgz(statmt.members()[statmt.EUROPARL], extra=[link])
    command(quick, tmp_path / "out")
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_symlink()]


def test_missing_test_set(quick, tmp_path):
    made = statmt.members()[statmt.TEST]
    del made["test-full/newstest2014-deen-ref.de.sgm"]
    quick.files[statmt.TEST] = statmt.tgz(made)
    with pytest.raises(UserError, match=r"has no member test-full/newstest2014-deen-ref.de.sgm"):
        command(quick, tmp_path / "out")
    assert not (tmp_path / "out" / "download" / "test-full.tgz").exists()
    quick.files[statmt.TEST] = statmt.tgz(statmt.members()[statmt.TEST])
    statmt.write_pins(tmp_path / "pins.json", quick)
    command(quick, tmp_path / "out")


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
        command(quick, tmp_path / "out")
    assert archive.read_bytes() == b"mine"


def test_truncated_archive(quick, tmp_path):
    good = quick.files[statmt.COMMON_CRAWL]
    quick.files[statmt.COMMON_CRAWL] = good[: len(good) // 2]
    with pytest.raises(
        UserError, match=r"commoncrawl.tgz is damaged .* removed: run the command again"
    ):
        command(quick, tmp_path / "out")
    quick.files[statmt.COMMON_CRAWL] = good
    command(quick, tmp_path / "out")


def test_languages_of_different_length(quick, tmp_path):
    made = statmt.members()[statmt.NEWS_V12]
    made["training/news-commentary-v12.de-en.de"] += b"Eine Zeile zu viel.\n"
    quick.files[statmt.NEWS_V12] = statmt.tgz(made)
    with pytest.raises(UserError, match=r"v12.de-en.en has 102 lines and .*de has 103"):
        command(quick, tmp_path / "out")
    assert not (tmp_path / "out" / "raw" / "train.en").exists()


# --- interruptions -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "function", "pipeline"),
    [
        (downloads, "_fetch_rest", "sentencepiece"),
        (extraction, "write_parallel", "sentencepiece"),
        (filtering, "clean_text", "sentencepiece"),
        (filtering, "tokenise", "moses"),
        (bpe, "build_pieces", "moses"),
    ],
)
def test_full_disk_then_room(quick, tmp_path, monkeypatch, module, function, pipeline):
    def fail(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(module, function, fail)
        with pytest.raises(
            UserError, match=r"no space left .* MB are needed.* --(output|downloads)"
        ):
            command(quick, tmp_path / "out", "--pipeline", pipeline)
    assert not (tmp_path / "out" / "record.json").exists()
    assert (
        not list((tmp_path / "out" / "raw").glob(".*")) if (tmp_path / "out/raw").exists() else True
    )
    command(quick, tmp_path / "out", "--pipeline", pipeline)


def test_one_folder_is_not_for_two_pipelines(quick, tmp_path):
    command(quick, tmp_path / "out")
    with pytest.raises(UserError, match=r"made by --pipeline sentencepiece: .* --output"):
        command(quick, tmp_path / "out", "--pipeline", "moses")


def test_what_a_killed_step_made_before_is_still_removed(tmp_path):
    from fairseq_sparsemixer.corpora.resumable import Steps

    steps = Steps(tmp_path, tmp_path / "record.json")
    old, new = tmp_path / "old", tmp_path / "new"

    def make(path):
        path.write_text("made")
        return [path], {}

    steps.run("step", {"kind": 1}, [], lambda: make(old))

    def killed():
        raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            steps.run("step", {"kind": 2}, [], killed)
    assert old.exists()
    steps.run("step", {"kind": 2}, [], lambda: make(new))
    assert new.exists() and not old.exists()


SLEEPER = f"""
import sys, time
{commands.HEAR_INTERRUPTIONS}
from fairseq_sparsemixer.corpora import workers

def slow(chunk):
    time.sleep(0.2)
    return chunk

if __name__ == "__main__":
    print("begun", flush=True)
    for chunk in workers.map_chunks(slow, range(10**9), 2):
        print("working", flush=True)
"""


def children_of(process):
    """Processes in the group of one that was started in a group of its own."""
    listed = subprocess.run(["ps", "-eo", "pgid=,stat="], capture_output=True, text=True).stdout
    entries = [line.split() for line in listed.splitlines()]
    return [stat for pgid, stat in entries if pgid == str(process.pid) and stat[0] != "Z"]


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGKILL])
@pytest.mark.parametrize("moment", ["begun", "working"])
def test_workers_end_with_the_command(tmp_path, ending, moment):
    """At any moment: while workers start, too. Nothing is left, and nothing hangs."""
    script = tmp_path / "sleeper.py"
    script.write_text(SLEEPER)
    process = subprocess.Popen(
        [sys.executable, script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        while process.stdout.readline().strip() != moment:
            assert process.poll() is None
        if moment == "begun":
            time.sleep(0.5)
        if ending == signal.SIGINT:
            os.killpg(process.pid, ending)  # as Ctrl-C does
        else:
            process.kill()
        process.wait(timeout=30)
        deadline = time.monotonic() + 30
        while children_of(process):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert process.stderr.read().count("Traceback") <= 1
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def fail_at_once(chunk):
    os._exit(9)


def test_a_worker_that_was_killed_is_told():
    with pytest.raises(UserError, match="give fewer --workers"):
        list(workers.map_chunks(fail_at_once, range(10_000), 2))


def test_sentencepiece_gets_the_longest_line(tmp_path):
    """Its limit on lines may not grow with the text: it takes at most a gigabyte."""
    texts = [tmp_path / "a", tmp_path / "b"]
    texts[0].write_text("kurz\nfünf\n", encoding="utf-8")
    texts[1].write_text("a long line\n" * 3, encoding="utf-8")
    assert spm._join(texts, tmp_path / "joined") == len("a long line\n")
    joined = texts[0].read_bytes() + texts[1].read_bytes()
    assert (tmp_path / "joined").read_bytes() == joined


# --- the user's own text -------------------------------------------------------------------------


@pytest.mark.parametrize("pipeline", preparation.PIPELINES)
def test_own_text(built, tmp_path, pipeline):
    _, folder = built[pipeline]
    mine = tmp_path / "mine"
    mine.mkdir()
    for path in (folder / "raw").iterdir():
        (mine / path.name).write_bytes(path.read_bytes())
    size = ["--merges", MERGES] if pipeline == "moses" else ["--vocab-size", VOCAB_SIZE]
    arguments = ["wmt14", "--raw-dir", mine, "--output", tmp_path / "out", "--pipeline", pipeline]
    commands.command("prepare", *arguments, *size)
    for path in (folder / "bin").iterdir():
        assert path.read_bytes() == (tmp_path / "out" / "bin" / path.name).read_bytes(), path
    record = json.loads((tmp_path / "out" / "record.json").read_text())
    assert record["corpus"] == "own text" and record["test"] is None


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("test.en", b"good\nschlecht: \xe4\n", r"test.en, line 2: not UTF-8"),
        ("valid.de", b"\xe4\n", r"valid.de, line 1: not UTF-8"),
        ("train.en", None, "train.en and .*train.de hold no text"),
        ("test.de", None, "test.en and .*test.de hold no text"),
    ],
)
def test_own_text_problems(built, tmp_path, name, content, message):
    """Of validation and test text nothing is left out in silence."""
    _, folder = built["moses"]
    mine = shutil.copytree(folder / "raw", tmp_path / "mine")
    split = name.split(".")[0]
    for language in ("en", "de"):
        path = mine / f"{split}.{language}"
        if content is None:
            path.write_bytes(b"")
        else:
            lines = content.count(b"\n")
            path.write_bytes(content if path.name == name else b"line\n" * lines)
    with pytest.raises(UserError, match=message):
        preparation.prepare_wmt14(tmp_path / "out", raw_dir=mine, pipeline="moses", merges=MERGES)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--wheel", "x"], "--wheel: such flags go with the corpus homeassistant only"),
        (["--source-lang", "fr"], "wmt14 is English-German"),
        (["--workers", "0"], "--workers 0 does nothing"),
        (["--pipeline", "moses", "--vocab-size", "10"], "--vocab-size: such flags belong to"),
        (["--merges", "10"], "--merges: such flags belong to --pipeline moses"),
        (["--vocab-size", "0"], "--vocab-size 0 makes no vocabulary"),
        (["--mirror", "foo"], "--mirror foo is no address"),
        (["--downloads", __file__], "is not a folder"),
        (["--checksums", "/"], "--checksums / is a folder"),
        (["--raw-dir", "x", "--mirror", "http://x"], "--mirror: such flags belong to the archives"),
        (["--raw-dir", "nowhere"], "--raw-dir nowhere: there is no file train.en"),
    ],
)
def test_flags_that_do_not_go_together(tmp_path, arguments, message):
    with pytest.raises(UserError, match=message):
        commands.command("prepare", "wmt14", "--output", tmp_path / "out", *arguments)


def test_missing_package_is_told_before_the_download(tmp_path, monkeypatch, quick):
    monkeypatch.setitem(sys.modules, "subword_nmt.learn_bpe", None)
    with pytest.raises(UserError, match="pip install subword-nmt"):
        command(quick, tmp_path / "out", "--pipeline", "moses")
    assert quick.requests == []


def test_moses_drop_reason_is_clean_corpus_n():
    """The rules of clean-corpus-n.perl, read from its source."""
    assert filtering.moses_drop_reason("a", "") == "empty"
    assert filtering.moses_drop_reason("a " * 80, "b " * 80) is None
    assert filtering.moses_drop_reason("a " * 81, "b " * 80) == "too_long"
    assert filtering.moses_drop_reason("a " * 9, "b") is None
    assert filtering.moses_drop_reason("a " * 10, "b") == "length_ratio"
    assert filtering.moses_drop_reason("a" * 1000, "b") is None
    assert filtering.moses_drop_reason("a" * 1001, "b") == "long_word"
