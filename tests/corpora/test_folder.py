"""Files of a corpus's folder."""

import contextlib

import pytest

from fairseq_sparsemixer.corpora.cleaning import SentencePair
from fairseq_sparsemixer.corpora.folder import read_pairs, steps_in, write_pairs
from fairseq_sparsemixer.errors import UserError


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
    with refused, steps_in(tmp_path, 1):
        pass
    assert (tmp_path / name).read_text() == "mine"


def test_a_preparation_that_was_killed_in_its_first_step_goes_on(tmp_path):
    with contextlib.suppress(KeyboardInterrupt), steps_in(tmp_path, 1):
        (tmp_path / "raw").mkdir()
        (tmp_path / "raw" / "train.en").touch()
        raise KeyboardInterrupt
    with steps_in(tmp_path, 1) as steps:
        assert steps.run("first", {}, [], lambda: ([], {"a": 1})) == {"a": 1}
