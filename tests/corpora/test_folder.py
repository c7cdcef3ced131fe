"""Files of a corpus's folder."""

import contextlib

import pytest

from fairseq_sparsemixer.corpora.cleaning import SentencePair
from fairseq_sparsemixer.corpora.folder import CORPUS_RECORD, read_pairs, steps_in, write_pairs
from fairseq_sparsemixer.corpora.resumable import STEPS
from fairseq_sparsemixer.errors import UserError
from fairseq_sparsemixer.files import write_json


def test_a_document_of_any_name_shifts_no_field(tmp_path):
    """Some are named after files that others have packed."""
    pairs = [
        SentencePair("One.", "Eins.", "man\tpages/a\nb", "manpages"),
        SentencePair("Two\u2028more.", "Zwei.", "plain"),
    ]
    write_pairs(tmp_path / "all.tsv", pairs)
    assert read_pairs(tmp_path / "all.tsv") == [
        SentencePair("One.", "Eins.", "man pages/a b", "manpages"),
        pairs[1],
    ]


@pytest.mark.parametrize("name", ["raw/train.en", "spm/x", "bin/dict.en.txt"])
def test_files_of_others_are_not_replaced(name, tmp_path):
    """As where the folder of one's own text is named as that of a corpus to be made."""
    (tmp_path / name).parent.mkdir()
    (tmp_path / name).write_text("mine")
    refused = pytest.raises(UserError, match="holds files that were not prepared here")
    with refused, steps_in(tmp_path, 1, "toy"):
        pass
    assert (tmp_path / name).read_text() == "mine"


def test_a_preparation_that_was_killed_in_its_first_step_goes_on(tmp_path):
    with contextlib.suppress(KeyboardInterrupt), steps_in(tmp_path, 1, "toy"):
        (tmp_path / "raw").mkdir()
        (tmp_path / "raw" / "train.en").touch()
        raise KeyboardInterrupt
    with steps_in(tmp_path, 1, "toy") as steps:
        assert steps.run("first", {}, [], lambda: ([], {"a": 1})) == {"a": 1}


@pytest.mark.parametrize("complete", [False, True])
def test_another_corpus_is_not_replaced(complete, tmp_path):
    """As by ``demo --data``, which takes a folder that is not there yet, or its own."""
    with steps_in(tmp_path, 1, "nothing is made of it"):
        pass
    with steps_in(tmp_path, 1, "own text") as steps:
        steps.run("first", {}, [], lambda: ([], {}))
    if complete:  # by a version that wrote no name
        (tmp_path / STEPS / "corpus").unlink()
        write_json(tmp_path / CORPUS_RECORD, {"corpus": "own text"})
    refused = pytest.raises(UserError, match=r"holds the corpus own text.*toy.* another folder")
    with refused, steps_in(tmp_path, 1, "toy"):
        pass
    with steps_in(tmp_path, 1, "own text"):
        pass
