"""The user's own text as a corpus, with domains and without."""

import itertools
import json
import shutil

import pytest
from support import commands, debian
from support.corpora import SPLITS, contents, lines_of, read_record
from support.messages import VOCAB_SIZE

from fairseq_sparsemixer import files
from fairseq_sparsemixer.corpora import cleaning
from fairseq_sparsemixer.corpora.own_text import prepare_raw_text
from fairseq_sparsemixer.errors import UserError


def command(*arguments):
    commands.command("prepare", *arguments)


@pytest.fixture
def own_text(messages_corpus, tmp_path):
    """The built corpus' text under other language names, with characters that tear lines."""
    folder = tmp_path / "mine"
    folder.mkdir()
    for split, (old, new) in itertools.product(SPLITS, [("en", "xx"), ("de", "yy")]):
        lines = lines_of(messages_corpus, split, old)
        lines[1] = lines[1].replace(" ", "\u2028", 1).replace(" ", "\u00a0", 1)
        lines[2] = ""
        (folder / f"{split}.{new}").write_bytes("\r\n".join(lines).encode() + b"\r\n")
    return folder


@pytest.mark.parametrize(("language", "tokeniser"), [("zh", "zh"), ("tha_Thai", "char")])
def test_copies_are_scored_as_the_language_asks(language, tokeniser, tmp_path, capsys):
    raw, sentences = (
        tmp_path / "raw",
        ["这个房子是红色的。", "那本旧书在这里。", "一盏灯在房子里。"],
    )
    raw.mkdir()
    for split in SPLITS:
        files.write_lines(raw / f"{split}.en", ["the red house", "that old book", "a lamp"] * 9)
        ending = "吗" if split == "test" else ""
        files.write_lines(raw / f"{split}.{language}", [s + ending for s in sentences] * 9)
    output = tmp_path / "out"
    command("--raw-dir", raw, "--output", output, "--vocab-size", 60, "--target-lang", language)
    score = read_record(output)["copy_score"]["test"]
    assert score["bleu"] > 50
    assert f"tok:{tokeniser}" in score["signature"].split("|")
    assert score["signature"] in capsys.readouterr().out


def test_own_text_to_binary(own_text, tmp_path, capsys):
    from fairseq.data import Dictionary, data_utils

    output = tmp_path / "out"
    languages = ["--source-lang", "xx", "--target-lang", "yy"]
    command("--raw-dir", own_text, "--output", output, "--vocab-size", VOCAB_SIZE, *languages)
    table = capsys.readouterr().out
    assert "pieces xx" in table and "copy BLEU" in table
    dictionary = Dictionary.load(str(output / "bin" / "dict.xx.txt"))
    for split, language in itertools.product(SPLITS, ("xx", "yy")):
        texts = lines_of(output, split, language)
        assert texts == files.read_lines(own_text / f"{split}.{language}")
        dataset = data_utils.load_indexed_dataset(
            str(output / "bin" / f"{split}.xx-yy.{language}"), dictionary
        )
        read = [dictionary.string(sentence, "sentencepiece") for sentence in dataset]
        assert read[2] == ""
        wrong = [
            index
            for index, (mine, text) in enumerate(zip(read, texts))
            if mine != cleaning.normalise(text) and "<unk>" not in mine
        ]
        assert wrong == []
        assert split != "train" or not any("<unk>" in line for line in read)
    record = json.loads((output / "record.json").read_text())
    assert record["languages"] == ["xx", "yy"]
    assert "bleu_before_filter" not in record["copy_score"]["test"]
    assert len(lines_of(output, "test", "yy", "copy")) == len(lines_of(output, "test", "yy"))


def test_own_text_again_after_a_change(own_text, tmp_path, no_binary, capsys):
    arguments = [
        "--raw-dir",
        own_text,
        "--output",
        tmp_path / "out",
        "--vocab-size",
        VOCAB_SIZE,
    ]
    arguments += ["--source-lang", "xx", "--target-lang", "yy"]
    command(*arguments)
    command(*arguments)
    assert capsys.readouterr().err.count("already done") == 4
    path = own_text / "test.yy"
    path.write_bytes(b"Ein neuer Satz." + path.read_bytes())
    command(*arguments)
    assert lines_of(tmp_path / "out", "test", "yy")[0].startswith("Ein neuer Satz.")
    assert "already done" not in capsys.readouterr().err
    arguments[-3::2] = "yy", "xx"  # the other way: the nearest copies are others, too
    command(*arguments)
    arguments[3] = tmp_path / "new"
    command(*arguments)
    scores = [read_record(tmp_path / name)["copy_score"] for name in ("out", "new")]
    assert scores[0] == scores[1] and (tmp_path / "out" / "copy" / "test.xx").is_file()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "valid.yy").unlink(), "there is no file valid.yy"),
        (lambda f: (f / "test.xx").write_text("one line\n"), r"test.xx has 1 lines and .*test.yy"),
        (lambda f: (f / "train.xx").write_text(" \n\n"), r"train.xx holds no text"),
        (lambda f: (f / "valid.xx").write_text(""), r"valid.xx holds no text"),
        (lambda f: (f / "test.yy").write_bytes(b"a\nschl\xe4cht\n"), "test.yy, line 2: not UTF-8"),
    ],
)  # fmt: skip
def test_own_text_problems(own_text, tmp_path, damage, message):
    damage(own_text)
    with pytest.raises(UserError, match=message):
        prepare_raw_text(
            tmp_path / "out",
            own_text,
            source_lang="xx",
            target_lang="yy",
            vocab_size=VOCAB_SIZE,
        )


def test_own_text_is_in_two_languages(tmp_path):
    """Or it would be a corpus of copies."""
    for split in SPLITS:
        files.write_lines(tmp_path / f"{split}.de", ["das rote Haus", "ein Licht"])
    flags = ["--source-lang", "de", "--target-lang", "de", "--output", tmp_path / "out"]
    with pytest.raises(UserError, match="--source-lang and --target-lang are both de"):
        command("--raw-dir", tmp_path, *flags)
    assert not (tmp_path / "out").exists()


def test_own_text_may_not_lie_where_the_copy_goes(own_text, tmp_path):
    raw = tmp_path / "out" / "raw"
    shutil.copytree(own_text, raw)
    before = contents(raw)
    with pytest.raises(UserError, match="move it"):
        prepare_raw_text(tmp_path / "out", raw, source_lang="xx", target_lang="yy")
    assert contents(raw) == before


# --- domains --------------------------------------------------------------------------------------


@pytest.fixture
def text_with_domains(no_binary, debian_built, tmp_path):
    folder = tmp_path / "mine"
    shutil.copytree(debian_built / "raw", folder)
    (folder / "all.tsv").unlink()
    return folder


def blank_first_line(path):
    files.write_lines(path, [" ", *files.read_lines(path)[1:]])


def build_own(text_with_domains, tmp_path):
    prepare_raw_text(tmp_path / "out", text_with_domains, vocab_size=debian.VOCAB_SIZE)
    return tmp_path / "out"


def test_domains_of_own_text_are_copied(debian_built, text_with_domains, tmp_path, capsys):
    output = build_own(text_with_domains, tmp_path)
    assert contents(output / "raw") == contents(text_with_domains)
    assert read_record(output)["domains"] == read_record(debian_built)["domains"]
    build_own(text_with_domains, tmp_path)
    assert capsys.readouterr().err.count("already done") == 4
    # Without them, those of before go.
    for split in SPLITS:
        (text_with_domains / f"{split}.domain").unlink()
    build_own(text_with_domains, tmp_path)
    assert contents(output / "raw") == contents(text_with_domains)
    assert "domains" not in read_record(output)


def test_no_domains_of_another_text_stay_in_the_folder(text_with_domains, tmp_path):
    assert list((build_own(text_with_domains, tmp_path) / "raw").glob("*.domain"))
    for path in text_with_domains.iterdir():
        if path.suffix == ".domain":
            path.unlink()
        else:
            files.write_lines(path, files.read_lines(path)[:-2])
    output = build_own(text_with_domains, tmp_path)
    assert not list((output / "raw").glob("*.domain"))
    assert "domains" not in read_record(output)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: blank_first_line(f / "test.domain"), "test.domain, line 1: .* names no domain"),
        (lambda f: (f / "valid.domain").unlink(), "no file valid.domain; give the domains of all"),
        (lambda f: (f / "test.domain").write_text("a\n"), r"test.domain has 1 lines and .*test.en"),
    ],
)
def test_domains_must_fit_the_text(text_with_domains, tmp_path, damage, message):
    damage(text_with_domains)
    with pytest.raises(UserError, match=message):
        build_own(text_with_domains, tmp_path)
