"""Files of a corpus's folder."""

from fairseq_sparsemixer.corpora.cleaning import SentencePair
from fairseq_sparsemixer.corpora.folder import read_pairs, write_pairs


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
