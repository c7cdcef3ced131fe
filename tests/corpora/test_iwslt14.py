"""The corpus ``iwslt14``, from a miniature of its archive."""

import json
import sys
from collections import Counter

import pytest
import sacremoses
from support import commands, iwslt14, statmt
from support.corpora import SPLITS

from fairseq_sparsemixer.errors import UserError
from fairseq_sparsemixer.files import read_lines
from fairseq_sparsemixer.text.subwords import find_subwords

MERGES = 200
PAIR = ("de", "en")


@pytest.fixture
def archive(quick):
    """The server, with the archive on it."""
    quick.files[iwslt14.PATH] = statmt.tgz(iwslt14.members())
    return quick


def prepare(server, output, *arguments):
    flags = ["--mirror", server.url, "--output", output, "--merges", MERGES, *arguments]
    commands.command("prepare", "iwslt14", *flags)
    return json.loads((output / "record.json").read_text())


def tokens(line, language):
    """What ``tokenizer.perl -l LANGUAGE | lowercase.perl`` makes of a line."""
    return sacremoses.MosesTokenizer(language).tokenize(line, return_str=True).lower()


def test_cleaning_and_split_are_those_of_fairseqs_example(archive, tmp_path):
    record = prepare(archive, tmp_path / "out")
    kept, dropped = [], Counter()
    for pair in iwslt14.talks():
        lengths = [len(tokens(line, language).split()) for line, language in zip(pair, PAIR)]
        fits = all(1 <= n <= 175 for n in lengths) and max(lengths) <= 1.5 * min(lengths)
        kept += [pair] * fits
        dropped[fits] += 1
    assert dropped[False] > len(iwslt14.DROPPED) and not set(kept) & set(iwslt14.DROPPED)
    expected = {
        "train": [pair for number, pair in enumerate(kept, 1) if number % 23],
        "valid": kept[22::23],
        "test": [pair for pairs in iwslt14.test_pairs().values() for pair in pairs],
    }
    for split in SPLITS:
        for side, language in enumerate(PAIR):
            lines = [pair[side] for pair in expected[split]]
            raw = read_lines(tmp_path / "out" / "raw" / f"{split}.{language}")
            assert raw == [line.lower() for line in lines]
            if split == "test":
                lines = [line.replace("’", "'") for line in lines]
            made = read_lines(tmp_path / "out" / "tokens" / f"{split}.{language}")
            assert made == [tokens(line, language) for line in lines]
    pairs = {split: len(expected[split]) for split in ("train", "valid")}
    assert record["cleaning"]["pairs"] == pairs
    reasons = record["cleaning"]["dropped"]
    assert sum(reasons.values()) == dropped[False]
    assert reasons == {"empty": 1, "length_ratio": dropped[False] - 2, "too_long": 1}
    assert record["languages"] == ["de", "en"] and record["settings"]["merges"] == MERGES
    text = "\n".join(read_lines(tmp_path / "out" / "tokens" / "train.de"))
    assert "alt-bekannt" in text and "@-@" not in text and "&lt; b &gt;" in text


def test_raw_text_is_cut_as_the_corpus_was(archive, tmp_path):
    """By the files that lie beside the dictionaries, as ``translate`` does it."""
    prepare(archive, tmp_path / "out")
    (tmp_path / "bin").mkdir()
    for source, name in (("bpe/codes", "bpecodes"), ("tokens/moses.json", "moses.json")):
        (tmp_path / "bin" / name).write_bytes((tmp_path / "out" / source).read_bytes())
    subwords = find_subwords([tmp_path / "bin"])
    encoder = subwords.encoder()
    raw = [pair[1] for pairs in iwslt14.test_pairs().values() for pair in pairs]
    cut = [encoder.encode(subwords.tokenise(line, "en")) for line in raw]
    assert cut == read_lines(tmp_path / "out" / "bpe" / "test.en")
    assert subwords.tokens == "Moses tokens without -a, small letters"
    (tmp_path / "bin" / "moses.json").write_text("[]")
    with pytest.raises(UserError, match=r"cannot read .*moses.json .* --data"):
        find_subwords([tmp_path / "bin"])


def test_what_is_done_is_not_done_again(archive, tmp_path, capsys):
    record = prepare(archive, tmp_path / "out")
    (tmp_path / "out" / "download" / "de-en.tgz").unlink()
    archive.requests.clear()
    assert prepare(archive, tmp_path / "out") == record
    assert archive.requests == [] and capsys.readouterr().err.count("already done") == 3
    pins = tmp_path / "pins.json"
    pins.write_text(json.dumps({"de-en.tgz": {"sha256": "0" * 64, "bytes": 1}}))
    with pytest.raises(UserError, match=r"was made from another de-en.tgz than .*pins.json"):
        prepare(archive, tmp_path / "out", "--checksums", pins)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"de-en/train.tags.de-en.en": None}, "has no member de-en/train.tags.de-en.en"),
        ({"de-en/train.tags.de-en.en": b"One line.\n"}, "train.tags.de-en.en hold different num"),
        ({"de-en/IWSLT14.TED.tst2011.de-en.en.xml": b""}, "tst2011.de-en.en.xml hold different"),
    ],
)
def test_another_archive(archive, tmp_path, change, message):
    files = {**iwslt14.members(), **change}
    content = {name: text for name, text in files.items() if text is not None}
    archive.files[iwslt14.PATH] = statmt.tgz(content)
    with pytest.raises(UserError, match=message):
        prepare(archive, tmp_path / "out")
    assert not (tmp_path / "out" / "record.json").exists()


def test_missing_package_is_told_before_the_download(archive, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "subword_nmt.learn_bpe", None)
    with pytest.raises(UserError, match=r"needs subword_nmt.*: run `pip install .*\[wmt\]"):
        prepare(archive, tmp_path / "out")
    assert archive.requests == []
