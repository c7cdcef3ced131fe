"""The whole corpus ``wmt14`` in both pipelines, from miniature archives or own text."""

import errno
import itertools
import json
import shutil
import subprocess
import sys

import pytest
from support import commands, statmt
from support.corpora import SPLITS
from support.statmt import MERGES, VOCAB_SIZE

from fairseq_sparsemixer import files
from fairseq_sparsemixer.corpora import bpe, downloads, workers
from fairseq_sparsemixer.corpora.wmt14 import extraction, filtering, preparation
from fairseq_sparsemixer.errors import UserError
from fairseq_sparsemixer.text import moses


def test_moses_tokens_in_pieces(built):
    from subword_nmt.apply_bpe import BPE

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
        statmt.prepare(server, again, "--pipeline", pipeline, "--workers", "2")
        for path in folder.rglob("*"):
            place = path.relative_to(folder)
            if path.is_file() and place.parts[0] not in (".steps", "download"):
                assert path.read_bytes() == (again / place).read_bytes(), path
                compared.add(place.as_posix())
    assert {"bpe/codes", "bin/train.en-de.de.bin", "clean/train.en", "tokens/test.de"} <= compared


def test_finished_corpus_needs_no_server(quick, tmp_path, capsys):
    output = tmp_path / "out"
    first = statmt.prepare(quick, output)
    quick.requests.clear()
    for archive in (output / "download").glob("*.tgz"):
        archive.unlink()
    assert statmt.prepare(quick, output) == first
    assert quick.requests == []
    assert capsys.readouterr().err.count("already done") == 4


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
            statmt.prepare(quick, tmp_path / "out", "--pipeline", pipeline)
    assert not (tmp_path / "out" / "record.json").exists()
    assert (
        not list((tmp_path / "out" / "raw").glob(".*")) if (tmp_path / "out/raw").exists() else True
    )
    statmt.prepare(quick, tmp_path / "out", "--pipeline", pipeline)


def test_one_folder_is_not_for_two_pipelines(quick, tmp_path):
    statmt.prepare(quick, tmp_path / "out")
    with pytest.raises(UserError, match=r"made by --pipeline sentencepiece: .* --output"):
        statmt.prepare(quick, tmp_path / "out", "--pipeline", "moses")


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
    assert record["corpus"] == "own text, as wmt14" and record["test"] is None
    with pytest.raises(
        UserError, match="holds the corpus own text, as wmt14, which the corpus own"
    ):
        commands.command("prepare", "--raw-dir", mine, "--output", tmp_path / "out")


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


def test_missing_package_is_told_before_the_download(tmp_path, monkeypatch, quick):
    monkeypatch.setitem(sys.modules, "subword_nmt.learn_bpe", None)
    with pytest.raises(UserError, match=r"needs subword_nmt.*: run `pip install .*\[wmt\]"):
        statmt.prepare(quick, tmp_path / "out", "--pipeline", "moses")
    assert quick.requests == []
