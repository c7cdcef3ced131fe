"""Package descriptions in several languages: no package in different splits, whatever language."""

import itertools
import shutil
from pathlib import Path

import pytest
from support import debian
from support.commands import command
from support.corpora import contents, lines_of, read_record, split_interrupted
from support.debian import LANGUAGES, VOCAB_SIZE

from fairseq_sparsemixer import files
from fairseq_sparsemixer.corpora import splitting
from fairseq_sparsemixer.corpora.debian import apt, extraction, preparation
from fairseq_sparsemixer.corpora.folder import SPLITS, read_pairs, sides_of
from fairseq_sparsemixer.corpora.summary import summary
from fairseq_sparsemixer.errors import UserError

PAIRS = [f"en-{language}" for language in LANGUAGES]


@pytest.fixture(scope="session")
def texts(shared):
    """Downloads, not to be written to."""
    return shared.directory(
        "debian_texts",
        lambda folder: debian.write_downloads(folder, indices=debian.several_index_texts()),
    )


@pytest.fixture(scope="session")
def several(shared, texts):
    """A finished corpus, not to be written to."""
    return shared.directory("debian_several", lambda folder: debian.build_several(folder, texts))


@pytest.fixture(autouse=True)
def small_split(monkeypatch):
    monkeypatch.setattr(extraction, "LANGUAGES_SPLIT", debian.LANGUAGES_SPLIT)


def prepare(output, downloads, languages=LANGUAGES):
    return preparation.prepare_debian(
        output, vocab_size=VOCAB_SIZE, downloads=downloads, languages=languages
    )


def parts_of(folder):
    """By split and pair of languages, its pairs as they stand in ``raw/``."""
    return {
        (split, pair): list(zip(*(lines_of(folder, split, side) for side in sides_of(pair))))
        for split in SPLITS
        for pair in PAIRS
    }


def test_a_package_is_in_one_split_for_all_languages(several):
    known = {(pair.source, pair.target): pair for pair in read_pairs(several / "raw" / "all.tsv")}
    documents = {split: set() for split in SPLITS}
    for (split, pair), lines in parts_of(several).items():
        assert lines and {known[line].domain for line in lines} == {pair}
        documents[split] |= {known[line].document for line in lines}
    for one, other in itertools.combinations(SPLITS, 2):
        assert not documents[one] & documents[other]


def test_no_training_text_gives_away_what_is_held_out_of_another_language(several):
    parts = parts_of(several)
    train = [source for pair in PAIRS for source, _ in parts["train", pair]]
    held_out = {
        source for split in SPLITS[1:] for pair in PAIRS for source, _ in parts[split, pair]
    }
    _, cosines = splitting.nearest_neighbours(train, sorted(held_out))
    assert 0 < cosines.max() < debian.LANGUAGES_SPLIT.max_cosine


def test_languages_share_sources_and_have_as_many_pairs(several):
    sources = {key: {source for source, _ in lines} for key, lines in parts_of(several).items()}
    for pair in PAIRS:
        assert len(parts_of(several)["train", pair]) == debian.LANGUAGES_SPLIT.max_train
    # As far as both are translated: German always is, Italian in four of five packages.
    shared = len(sources["train", "en-de"] & sources["train", "en-it"])
    assert shared > 0.6 * debian.LANGUAGES_SPLIT.max_train
    assert sources["test", "en-de"] & sources["test", "en-it"]


def test_the_record_tells_each_pair(several):
    record = read_record(several)
    assert (record["corpus"], record["pairs"]) == ("debian-languages", PAIRS)
    assert record["languages"] == ["en", *LANGUAGES]
    assert record["split"]["train_dropped"]["near_duplicate"] > 0
    assert record["extraction"]["pairs"] == {"en-de": 240, "en-it": 192}
    assert not record["splits"]["train"]["en-it.it"]["unknown"]
    copied = files.read_lines(several / "copy" / "test.en-it.it")
    score = splitting.score_copies(
        splitting.Copies(copied, []),
        [splitting.SentencePair(*line, "") for line in parts_of(several)["test", "en-it"]],
        "13a",
    )
    assert record["copy_score"]["test.en-it"]["bleu"] == score.bleu > 0
    rows = [line.split() for line in summary(record).split("\n")]
    assert ["test.en-it", "12", "353", "404", "0", f"{score.bleu:.1f}"] in rows


@pytest.mark.parametrize("written", [0, 5])
def test_resumed_it_is_the_same(several, texts, tmp_path, monkeypatch, no_binary, written):
    output = tmp_path / "out"
    with split_interrupted(monkeypatch, written):
        prepare(output, texts)
    assert not (output / "record.json").exists()
    prepare(output, texts)
    for folder in ("raw", "spm", "copy"):
        assert contents(output / folder) == contents(several / folder)


def test_other_languages_take_the_place_of_the_former(several, texts, tmp_path, no_binary):
    output = Path(shutil.copytree(several, tmp_path / "corpus"))
    assert prepare(output, texts)["pairs"] == PAIRS
    assert not no_binary, "all was done already"
    with pytest.raises(UserError, match="holds the corpus debian-languages, which the corpus deb"):
        preparation.prepare_debian(output, downloads=texts)
    prepare(output, texts, ["it"])
    assert not list(output.rglob("*en-de*"))


def test_a_language_without_text(texts, tmp_path, no_binary, monkeypatch):
    indices = {**debian.several_index_texts(), "fr": "Package: x\n"}
    folder = debian.write_downloads(tmp_path / "downloads", indices=indices)
    with pytest.raises(UserError, match=r"hold no text for en-fr: build the corpus"):
        prepare(tmp_path / "one", folder, ["de", "fr"])
    fr = debian.several_index_texts()["it"].replace("Description-it", "Description-fr")
    little = {**indices, "fr": "\n\n".join(fr.split("\n\n")[:2])}
    shutil.rmtree(folder)
    debian.write_downloads(folder, indices=little)
    with pytest.raises(UserError, match=r"^--languages fr: too few descriptions .*; leave it out$"):
        prepare(tmp_path / "two", folder, ["de", "fr"])


@pytest.mark.parametrize(
    "languages", ["de", "de,de", "en,de", "de,,it", "de,Italian", "de,it/../x"]
)
def test_a_list_of_languages_that_is_none(languages, tmp_path, capsys):
    with pytest.raises(SystemExit):
        command("prepare", "debian", "--languages", languages, "--output", tmp_path / "out")
    assert "is no list of languages that English is translated into" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_downloads_without_a_language_are_fetched_anew(texts, programs, tmp_path):
    found = apt.obtain(texts, (), (), LANGUAGES)
    assert [index.language for index in found.indices] == ["en", *LANGUAGES]
    folder = Path(shutil.copytree(texts, tmp_path / "downloads"))
    with pytest.raises(UserError, match="has no apt to fetch"):
        apt.obtain(folder, (), (), ["de", "fr"])
    assert apt.read_record(folder) == apt.read_record(texts)
