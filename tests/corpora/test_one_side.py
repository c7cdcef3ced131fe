"""One language of a corpus, as fairseq's tasks of one text read it."""

import shutil
import subprocess
import sys

import pytest
from fairseq.data import Dictionary
from fairseq.data.data_utils import load_indexed_dataset

from fairseq_sparsemixer.corpora.one_side import lay_out_side
from fairseq_sparsemixer.errors import UserError
from fairseq_sparsemixer.files import read_lines, write_lines


def test_it_is_the_binary_data_wherever_the_corpus_lies(corpus, tmp_path):
    copy = shutil.copytree(corpus, tmp_path / "before")
    train = read_lines(copy / "raw" / "train.de")
    domains = ["long" if len(line) > 20 else "short" for line in train]
    for split in ("train", "valid", "test"):
        size = len(read_lines(copy / "raw" / f"{split}.de"))
        write_lines(copy / "raw" / f"{split}.domain", (domains * 2)[:size])
    for _ in range(2):
        assert lay_out_side(copy, "de") == copy / "de"
    moved = copy.rename(tmp_path / "after")
    words = Dictionary.load(str(moved / "bin" / "dict.de.txt"))
    for split in ("train", "valid", "test"):
        own, whole = (
            load_indexed_dataset(str(moved / name), words)
            for name in (f"de/input0/{split}", f"bin/{split}.en-de.de")
        )
        assert [line.tolist() for line in own] == [line.tolist() for line in whole]
    labels = Dictionary.load(str(moved / "de" / "label" / "dict.txt"))
    binary = load_indexed_dataset(str(moved / "de" / "label" / "train"), labels)
    assert [labels.string(line) for line in binary] == domains


def test_labels_follow_the_domains_and_are_one_word(corpus, tmp_path):
    copy = shutil.copytree(corpus, tmp_path / "corpus")
    for domains in (["user manual", "legal"], ["legal", "news"]):
        for split in ("train", "valid", "test"):
            size = len(read_lines(copy / "raw" / f"{split}.de"))
            path = copy / "raw" / f"{split}.domain"
            write_lines(path, (domains * size)[:size])
        lay_out_side(copy, "de")
        labels = Dictionary.load(str(copy / "de" / "label" / "dict.txt"))
        binary = load_indexed_dataset(str(copy / "de" / "label" / "train"), labels)
        assert [labels.string(line) for line in binary][:2] == [
            domain.replace(" ", "_") for domain in domains
        ]
        assert len(labels) - labels.nspecial == 2
    assert [path.name for path in (copy / "de").iterdir() if "words" in path.name] == []


def test_a_language_with_several_texts_is_refused(corpus, tmp_path):
    copy = shutil.copytree(corpus, tmp_path / "corpus")
    for path in list((copy / "bin").glob("*.en-de.de.*")):
        shutil.copy(path, path.with_name(path.name.replace("en-de", "fr-de")))
    with pytest.raises(UserError, match=r"has several texts in de \(en-de, fr-de, \.\.\.\)"):
        lay_out_side(copy, "de")


def test_a_language_that_is_not_there_is_told(corpus, tmp_path):
    copy = shutil.copytree(corpus, tmp_path / "corpus")
    with pytest.raises(UserError, match=f"{copy} holds no language fr: choose from de, en of a"):
        lay_out_side(copy, "fr")
    command = [sys.executable, "-m", "fairseq_sparsemixer.corpora.one_side", str(copy), "fr"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (found.returncode, found.stderr.splitlines()[-1][:6]) == (2, "error:")
