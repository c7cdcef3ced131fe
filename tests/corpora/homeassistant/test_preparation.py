"""The whole corpus ``homeassistant``, from the wheel to fairseq's data."""

import errno
import itertools
import json
import os

import pytest
from support import commands
from support.corpora import (
    SPLITS,
    contents,
    lines_of,
    partial_files,
    read_record,
    split_interrupted,
)
from support.messages import VOCAB_SIZE

from fairseq_sparsemixer import files
from fairseq_sparsemixer.corpora import binarise, splitting, spm
from fairseq_sparsemixer.corpora.homeassistant import extraction, preparation, wheels
from fairseq_sparsemixer.errors import UserError


def test_layout(built):
    binary = {f"{split}.en-de.{lang}.{kind}" for split in SPLITS for lang in ("en", "de")
              for kind in ("bin", "idx")}  # fmt: skip
    expected = {f"bin/{name}" for name in binary}
    expected |= {"bin/dict.en.txt", "bin/dict.de.txt", "bin/sentencepiece.bpe.model"}
    expected |= {f"{kind}/{s}.{lang}" for kind in ("raw", "spm") for s in SPLITS
                 for lang in ("en", "de")}  # fmt: skip
    expected |= {"raw/all.tsv", "spm/spm.model", "spm/dict.txt", "copy/test.de", "record.json"}
    expected |= {f".steps/{n}.json" for n in ("extract", "split", "sentencepiece", "binarise")}
    expected.add(".steps/corpus")
    assert set(contents(built[0])) == expected


def test_two_builds_are_equal_byte_for_byte(built):
    first, second = built
    # Another folder, another order of the zip, another hash seed; only the checksum of the zip
    # itself differs.
    own = ("record.json", ".steps/extract.json")
    assert contents(first, without=own) == contents(second, without=own)


def test_no_leakage(built):
    folder = built[0]
    rows = [line.split("\t") for line in files.read_lines(folder / "raw" / "all.tsv")]
    documents = {(source, target): document for source, target, document in rows}
    text = {s: [lines_of(folder, s, lang) for lang in ("en", "de")] for s in SPLITS}
    of_split = {s: {documents[pair] for pair in zip(*text[s])} for s in SPLITS}
    for one, other in itertools.combinations(SPLITS, 2):
        assert of_split[one] and not of_split[one] & of_split[other]
        assert not set(text[one][0]) & set(text[other][0])
        assert not set(text[one][1]) & set(text[other][1])
    _, cosines = splitting.nearest_neighbours(text["train"][0], text["valid"][0] + text["test"][0])
    assert 0.3 < cosines.max() < 0.70


def test_record(built, fake):
    folder = built[0]
    record = read_record(folder)
    assert record["source"] == {
        "name": "homeassistant",
        "version": "2026.2.3",
        "file": "homeassistant-2026.2.3-py3-none-any.whl",
        "sha256": extraction.WHEEL.sha256,
        "licence": "Apache-2.0",
    }
    extracted, split = record["extraction"], record["split"]
    dropped = sum(extracted["segments_dropped"].values())
    assert extracted["segments"] == extracted["pairs"] + dropped == 480
    assert split["train_dropped"]["near_duplicate"] > 0
    train = split["train_before_filter"] - sum(split["train_dropped"].values())
    for name, size in [("train", train), ("valid", None), ("test", None)]:
        for language in ("en", "de"):
            counts = record["splits"][name][language]
            lines = lines_of(folder, name, language, "spm")
            assert counts["sentences"] == len(lines) == (size or len(lines))
            assert counts["pieces"] == sum(len(line.split(" ")) for line in lines)
    assert record["settings"]["vocab_size"] == record["vocabulary"] == VOCAB_SIZE
    assert set(record["versions"]) == {
        "fairseq-sparsemixer",
        "sacrebleu",
        "scikit-learn",
        "sentencepiece",
    }


def test_copy_scores_in_the_record(built):
    import sacrebleu

    folder = built[0]
    record = read_record(folder)
    hypotheses = lines_of(folder, "test", "de", "copy")
    bleu = sacrebleu.corpus_bleu(hypotheses, [lines_of(folder, "test", "de")]).score
    score = record["copy_score"]["test"]
    assert score["bleu"] == pytest.approx(bleu, abs=0.005)
    # The filter exists because near duplicates are worth copying.
    for split in ("valid", "test"):
        scores = record["copy_score"][split]
        assert scores["bleu"] < scores["bleu_before_filter"]
    assert set(hypotheses) <= set(lines_of(folder, "train", "de"))


def test_fairseq_reads_back_the_text_exactly(built):
    from fairseq.data import Dictionary, data_utils

    folder = built[0]
    record = read_record(folder)
    binary = folder / "bin"
    assert (binary / "dict.en.txt").read_bytes() == (binary / "dict.de.txt").read_bytes()
    dictionary = Dictionary.load(str(binary / "dict.en.txt"))
    assert len(dictionary) == VOCAB_SIZE
    assert not any(symbol.startswith("madeupword") for symbol in dictionary.symbols)
    for split, language in itertools.product(SPLITS, ("en", "de")):
        dataset = data_utils.load_indexed_dataset(
            str(binary / f"{split}.en-de.{language}"), dictionary
        )
        texts = lines_of(folder, split, language)
        assert len(dataset) == len(texts)
        unknown = sum(int((sentence == dictionary.unk()).sum()) for sentence in dataset)
        assert unknown == record["splits"][split][language]["unknown"]
        # Characters that only held-out text has; the filter removed them from the training text.
        assert (unknown == 0) == (split == "train")
        for sentence, text in zip(dataset, texts):
            assert sentence[-1] == dictionary.eos()
            read = dictionary.string(sentence, "sentencepiece")
            assert read == text or "<unk>" in read


def test_finished_corpus_needs_nothing(fake, corpus, monkeypatch, capsys):
    def unexpected(*args, **kwargs):
        pytest.fail("a finished step ran again")

    monkeypatch.setattr(extraction, "extract", unexpected)
    monkeypatch.setattr(splitting, "hold_out", unexpected)
    monkeypatch.setattr(spm, "build_pieces", unexpected)
    monkeypatch.setattr(binarise, "build_binary", unexpected)
    monkeypatch.setattr(wheels, "run_python", unexpected)
    before = contents(corpus)
    preparation.prepare_homeassistant(corpus, vocab_size=VOCAB_SIZE)
    assert contents(corpus) == before
    assert capsys.readouterr().err.count("already done") == 4


def test_another_vocab_size_redoes_what_depends_on_it(fake, corpus, monkeypatch, no_binary):
    monkeypatch.setattr(splitting, "hold_out", lambda *a: pytest.fail("split again"))
    record = preparation.prepare_homeassistant(corpus, vocab_size=200, wheel=fake)
    assert record["vocabulary"] == 200
    assert len(files.read_lines(corpus / "spm" / "dict.txt")) == 196
    assert len(no_binary) == 1
    assert not (corpus / "bin" / "train.en-de.en.bin").exists()


def test_resume_after_a_kill_in_the_middle(built, fake, tmp_path, monkeypatch, no_binary):
    output = tmp_path / "out"
    with split_interrupted(monkeypatch, 3) as written:
        preparation.prepare_homeassistant(output, vocab_size=VOCAB_SIZE, wheel=fake)
    assert [path.name for path in written] == ["train.en", "train.de", "valid.en"]
    # What a kill without a chance to tidy up leaves behind.
    (output / "raw" / ".test.de.partial").write_text("half a")
    (output / "spm" / ".partial").mkdir(parents=True)
    (output / "spm" / ".partial" / "text").write_text("half")
    preparation.prepare_homeassistant(output, vocab_size=VOCAB_SIZE, wheel=fake)
    assert partial_files(output) == []
    for folder in ("raw", "spm", "copy"):
        assert contents(output / folder) == contents(built[0] / folder)


def test_truncated_output_is_noticed_and_redone(built, fake, corpus, no_binary, capsys):
    path = corpus / "raw" / "train.de"
    path.write_bytes(path.read_bytes()[:-100])
    preparation.prepare_homeassistant(corpus, vocab_size=VOCAB_SIZE, wheel=fake)
    assert "raw/train.de is missing or has changed" in capsys.readouterr().err
    for folder in ("raw", "spm", "copy"):
        assert contents(corpus / folder) == contents(built[0] / folder)
    # The text came out the same: what was made from it is still good.
    assert no_binary == []


@pytest.mark.parametrize("calls", [0, 1, 5])
def test_full_disk_leaves_nothing_half_written(fake, tmp_path, monkeypatch, no_binary, calls):
    output = tmp_path / "out"
    left = [calls]
    really = os.fsync

    def fsync(descriptor):
        if left[0] == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        left[0] -= 1
        really(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(UserError, match="no space left") as caught:
            preparation.prepare_homeassistant(output, vocab_size=VOCAB_SIZE, wheel=fake)
    assert str(output) in str(caught.value)
    assert "150 MB" in str(caught.value)
    assert partial_files(output) == []
    assert len(contents(output)) == calls
    preparation.prepare_homeassistant(output, vocab_size=VOCAB_SIZE, wheel=fake)


@pytest.mark.parametrize(
    ("vocab_size", "message"), [(8000, r"use at most \d+"), (20, r"use at least \d+")]
)
def test_unsuitable_vocab_size(fake, corpus, no_binary, vocab_size, message):
    with pytest.raises(UserError, match=f"--vocab-size {vocab_size} .*{message}") as caught:
        preparation.prepare_homeassistant(corpus, vocab_size=vocab_size, wheel=fake)
    assert "\n" not in str(caught.value)
    assert partial_files(corpus) == []


def test_output_that_is_a_file(fake, tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(UserError, match="not a folder"):
        preparation.prepare_homeassistant(tmp_path / "out", wheel=fake)


def test_command_builds_the_named_corpus(fake, tmp_path, no_binary, capsys):
    arguments = ["--wheel", fake, "--vocab-size", VOCAB_SIZE]
    commands.command("prepare", "homeassistant", "--output", tmp_path / "out", *arguments)
    rows = [line.split() for line in capsys.readouterr().out.split("\n")]
    counts = json.loads((tmp_path / "out" / "record.json").read_text())["splits"]
    assert [row[:2] for row in rows[1:4]] == [
        [split, f"{counts[split]['en']['sentences']:,}"] for split in SPLITS
    ]


@pytest.mark.slow
def test_real_corpus(tmp_path):
    """The published counts of the real wheel, within 2 %."""
    try:
        record = preparation.prepare_homeassistant(tmp_path)
    except UserError as error:
        if "download" not in str(error):
            raise
        pytest.skip(f"the wheel cannot be had: {error}")
    assert record["extraction"]["pairs"] == pytest.approx(15_405, rel=0.02)
    assert record["split"]["documents"] == 873
    assert record["split"]["held_out"] == pytest.approx(823, rel=0.02)
    assert record["splits"]["train"]["en"]["sentences"] == pytest.approx(14_046, rel=0.02)
    for language in ("en", "de"):
        assert record["splits"]["train"][language]["unknown"] == 0
