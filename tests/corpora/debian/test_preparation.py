"""The whole corpus ``debian``, from downloads to what fairseq-preprocess takes."""

import itertools
import json
import shutil
from pathlib import Path

import pytest
from support import debian
from support.corpora import SPLITS, contents, lines_of, read_record, split_interrupted
from support.debian import DOMAINS, VOCAB_SIZE, write_downloads

from fairseq_sparsemixer import files
from fairseq_sparsemixer.corpora import splitting
from fairseq_sparsemixer.corpora.debian import apt, ding, extraction, preparation
from fairseq_sparsemixer.corpora.folder import read_pairs
from fairseq_sparsemixer.corpora.summary import summary
from fairseq_sparsemixer.errors import UserError


@pytest.fixture
def corpus(built, tmp_path):
    return Path(shutil.copytree(built, tmp_path / "corpus"))


def held_out_pairs(folder):
    rows = (line.split("\t") for line in files.read_lines(folder / "raw" / "all.tsv"))
    return {(row[0], row[1]): row[2:] for row in rows}


def test_every_line_has_its_domain(built):
    source_of = held_out_pairs(built)
    documents = {}
    for split in SPLITS:
        rows = list(zip(*(lines_of(built, split, suffix) for suffix in ("en", "de", "domain"))))
        assert (
            len(rows) == len(lines_of(built, split, "en")) == len(lines_of(built, split, "domain"))
        )
        for english, german, domain in rows:
            document, true_domain = source_of[english, german]
            assert domain == true_domain == document.split("/")[0]
            documents.setdefault(split, set()).add(document)
        counts = read_record(built)["domains"][split]
        assert counts == {name: [row[2] for row in rows].count(name) for name in DOMAINS}
        assert split == "train" or all(0 < count <= 12 for count in counts.values())
    for one, other in itertools.combinations(SPLITS, 2):
        assert not documents[one] & documents[other]


def test_extraction_reads_all_sources(built):
    extracted = read_record(built)["extraction"]
    assert extracted["segments"] == {
        "descriptions": 60 * 4, "ding": 80 * 2, "help": 40 * 4, "manpages": 40 * 4
    }  # fmt: skip
    everything = sum(extracted["pairs"].values()) + sum(extracted["segments_dropped"].values())
    assert everything == sum(extracted["segments"].values())
    assert sum(extracted["pairs"].values()) == len(files.read_lines(built / "raw" / "all.tsv"))
    text = (built / "raw" / "all.tsv").read_text()
    assert "Not this." not in text and "\ttitle" not in text
    assert "title number 7 of all\tTitel Nummer 7 von allen\tdescriptions/word7\tdesc" in text


def test_record_names_downloads_but_no_address(built, shelf):
    record = read_record(built)
    assert record["corpus"] == "debian"
    assert record["source"] == json.loads((shelf / "downloads.json").read_text())
    assert "://" not in json.dumps(record) and str(shelf) not in json.dumps(record)
    assert record["settings"]["split"]["domain_shares"] == debian.SPLIT.domain_shares
    assert record["vocabulary"] == VOCAB_SIZE


def test_record_says_how_many_documents_are_held_out(built):
    documents = {
        pair.source: (pair.domain, pair.document) for pair in read_pairs(built / "raw" / "all.tsv")
    }
    for split in ("valid", "test"):
        held_out = [documents[line] for line in lines_of(built, split, "en")]
        described = read_record(built)["held_out_documents"][split]
        assert list(described) == sorted(DOMAINS)
        for domain, entry in described.items():
            names = [document for other, document in held_out if other == domain]
            sizes = {name: names.count(name) for name in names}
            assert entry["documents"] == len(sizes)
            assert entry["pairs"] == max(sizes.values()) == sizes[entry["largest"]]


def test_leaks_in_the_record(built):
    import sacrebleu

    leaks = read_record(built)["leaks"]
    assert list(leaks) == ["random", "documents", "documents_and_filter"]
    sides = {
        split: [lines_of(built, split, language) for language in ("en", "de")] for split in SPLITS
    }
    held_out = [valid + test for valid, test in zip(sides["valid"], sides["test"])]
    assert {leak["sentences"] for leak in leaks.values()} == {len(held_out[0])}
    indices, cosines = splitting.nearest_neighbours(sides["train"][0], held_out[0])
    copied = [sides["train"][1][index] for index in indices]
    assert leaks["documents_and_filter"] == {
        "sentences": len(copied),
        "bleu": pytest.approx(sacrebleu.corpus_bleu(copied, [held_out[1]]).score, abs=0.006),
        "near": 0.0,
    }
    assert cosines.max() < 0.70
    # Sentences from a few phrases have near duplicates in every document.
    assert leaks["documents"]["near"] > 0.1 and leaks["random"]["near"] > 0.1
    assert leaks["documents"]["bleu"] > leaks["documents_and_filter"]["bleu"]
    by_domain = read_record(built)["copy_bleu_by_domain"]
    domains = lines_of(built, "test", "domain")
    for name in DOMAINS:
        hypotheses, references = zip(
            *(
                pair
                for pair, domain in zip(
                    zip(files.read_lines(built / "copy" / "test.de"), sides["test"][1]),
                    domains,
                )
                if domain == name
            )
        )
        score = sacrebleu.corpus_bleu(list(hypotheses), [list(references)]).score
        assert by_domain[name] == pytest.approx(score, abs=0.006)


def test_summary_tells_the_leaks(built):
    text = summary(read_record(built))
    near = 100 * read_record(built)["leaks"]["random"]["near"]
    assert "split (random): copy BLEU " in text
    assert f"{near:.1f} % of the held-out text has a near duplicate in training" in text


def test_finished_corpus_needs_nothing(corpus, programs, shelf, capsys):
    before = contents(corpus)
    for downloads in (shelf, corpus / "nowhere"):
        preparation.prepare_debian(corpus, vocab_size=VOCAB_SIZE, downloads=downloads)
        assert capsys.readouterr().err.count("already done") == 4
    assert contents(corpus) == before


def test_downloads_lie_in_the_output_by_default(built, downloads, tmp_path, programs):
    output = tmp_path / "out"
    output.mkdir()
    downloads.rename(output / "download")
    preparation.prepare_debian(output, vocab_size=VOCAB_SIZE)
    for folder in ("raw", "spm", "copy"):
        assert contents(output / folder) == contents(built / folder)


def test_other_downloads_are_for_another_folder(corpus, tmp_path):
    other = write_downloads(tmp_path / "other", indices={"en": "", "de": ""})
    with pytest.raises(UserError, match=r"from other downloads than those in .*other: name"):
        preparation.prepare_debian(corpus, vocab_size=VOCAB_SIZE, downloads=other)


@pytest.mark.parametrize("written", [0, 4, 7])
def test_resume_after_an_interruption(built, shelf, tmp_path, monkeypatch, written):
    output = tmp_path / "out"
    with split_interrupted(monkeypatch, written):
        preparation.prepare_debian(output, vocab_size=VOCAB_SIZE, downloads=shelf)
    assert not (output / "record.json").exists()
    preparation.prepare_debian(output, vocab_size=VOCAB_SIZE, downloads=shelf)
    assert not [path for path in output.rglob("*") if "partial" in path.name]
    for folder in ("raw", "spm", "copy"):
        assert contents(output / folder) == contents(built / folder)


@pytest.mark.parametrize("package", ["trans-de-en", "manpages-de", "libreoffice-help-de"])
def test_a_source_without_text(tmp_path, package):
    folder = write_downloads(tmp_path / "downloads", without=[package])
    with pytest.raises(UserError, match=r"no text for (ding|manpages|help): build the corpus"):
        preparation.prepare_debian(tmp_path / "out", downloads=folder)
    assert not (tmp_path / "out" / "raw").exists()


def test_text_that_is_not_utf8(tmp_path, monkeypatch):
    content = {**debian.package_contents(), "trans-de-en": {ding.PATH: b"K\xe4fig :: cage\n"}}
    monkeypatch.setattr(debian, "package_contents", lambda: content)
    folder = write_downloads(tmp_path / "downloads")
    with pytest.raises(UserError, match=r"share/trans/de-en is not UTF-8: build"):
        extraction.extract(folder, apt.read_record(folder))


@pytest.mark.slow
def test_real_corpus(tmp_path, monkeypatch):
    """The measured counts of the real packages of Debian 12, within 2 %."""
    monkeypatch.undo()
    try:
        downloads = apt.obtain(tmp_path / "download", extraction.REQUIRED, extraction.OPTIONAL)
    except UserError as error:
        pytest.skip(f"the packages cannot be had: {error}")
    if downloads.indices[0].codename != "bookworm":
        pytest.skip("measured on another release")
    record = preparation.prepare_debian(tmp_path)
    assert record["extraction"]["pairs"] == {
        "descriptions": pytest.approx(43_310, rel=0.02),
        "ding": pytest.approx(19_132, rel=0.02),
        "help": pytest.approx(37_628, rel=0.02),
        "manpages": pytest.approx(41_792, rel=0.02),
    }
    for split in ("valid", "test"):
        assert 1_400 <= record["splits"][split]["en"]["sentences"] <= 1_600
    assert record["leaks"]["documents_and_filter"]["near"] == 0.0
