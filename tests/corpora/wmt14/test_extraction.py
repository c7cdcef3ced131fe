"""The text of the archives."""

import itertools

import pytest
from support import statmt
from support.corpora import SPLITS

from fairseq_sparsemixer import files
from fairseq_sparsemixer.corpora import parallel_text
from fairseq_sparsemixer.errors import UserError


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
        ours = list(parallel_text.iterate_segments(sgm))
        assert ours == files.read_lines(tmp_path / "theirs")


def test_news_commentary_of_2014(quick, tmp_path):
    record = statmt.prepare(quick, tmp_path / "out", "--news-commentary", "v9")
    assert record["raw"]["pairs"]["news_commentary"] == 50
    assert "training-parallel-nc-v9.tgz" in record["source"]


def test_languages_of_different_length(quick, tmp_path):
    made = statmt.members()[statmt.NEWS_V12]
    made["training/news-commentary-v12.de-en.de"] += b"Eine Zeile zu viel.\n"
    quick.files[statmt.NEWS_V12] = statmt.tgz(made)
    with pytest.raises(UserError, match=r"v12.de-en.en has 102 lines and .*de has 103"):
        statmt.prepare(quick, tmp_path / "out")
    assert not (tmp_path / "out" / "raw" / "train.en").exists()
