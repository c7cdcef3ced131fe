"""SentencePiece: pieces of the text itself, and a dictionary by frequency."""

import collections
import errno
import random

import pytest
import sentencepiece
from fairseq.data import Dictionary
from support.corpora import lines_of, partial_files
from support.full_disk import room_for

from fairseq_sparsemixer import files
from fairseq_sparsemixer.corpora import spm
from fairseq_sparsemixer.text.subwords import SentencePiece


def test_model_beside_the_data_encodes_like_the_data(messages_corpus):
    from fairseq.data.encoders.sentencepiece_bpe import SentencepieceBPE, SentencepieceConfig

    encoder = SentencepieceBPE(
        SentencepieceConfig(
            sentencepiece_model=str(messages_corpus / "bin" / "sentencepiece.bpe.model")
        )
    )
    for language in ("en", "de"):
        pieces = lines_of(messages_corpus, "test", language, "spm")
        assert [
            encoder.encode(text) for text in lines_of(messages_corpus, "test", language)
        ] == pieces
    # Text from elsewhere: no white space but the one between pieces, nothing invisible.
    assert encoder.encode("The\u00a0front\u2028door\x07\u00ad ") == encoder.encode("The front door")
    # Nor a path of this machine.
    model = (messages_corpus / "spm" / "spm.model").read_bytes()
    assert str(messages_corpus).encode() not in model and b".partial" not in model


def test_dictionary_is_sorted_by_training_frequency(messages_corpus):
    counted = collections.Counter(
        piece
        for language in ("en", "de")
        for line in lines_of(messages_corpus, "train", language, "spm")
        for piece in line.split(" ")
    )
    entries = [
        line.rsplit(" ", 1) for line in files.read_lines(messages_corpus / "spm" / "dict.txt")
    ]
    counts = [int(count) for _, count in entries]
    assert counts == sorted(counts, reverse=True)
    assert {piece: int(count) for piece, count in entries if int(count)} == counted
    assert not {"<s>", "</s>", "<unk>", "<pad>"} & {piece for piece, _ in entries}


def test_sentencepiece_gets_the_longest_line(tmp_path):
    """Its limit on lines may not grow with the text: it takes at most a gigabyte."""
    texts = [tmp_path / "a", tmp_path / "b"]
    texts[0].write_text("kurz\nfünf\n", encoding="utf-8")
    texts[1].write_text("a long line\n" * 3, encoding="utf-8")
    assert spm._join(texts, tmp_path / "joined") == len("a long line\n")
    joined = texts[0].read_bytes() + texts[1].read_bytes()
    assert (tmp_path / "joined").read_bytes() == joined


def test_a_model_that_does_not_fit_is_not_taken(tmp_path):
    """SentencePiece itself ends as if it had written all of it."""
    letters = random.Random(0)
    words = ["".join(letters.choices("abcdefghijklmnop", k=8)) for _ in range(150)]
    for split in ("train", "valid", "test"):
        for language in ("en", "de"):
            files.write_lines(tmp_path / "raw" / f"{split}.{language}", words)
    with room_for(5000), pytest.raises(OSError) as caught:
        spm.build_pieces(tmp_path, ("en", "de"), 700)
    assert caught.value.errno == errno.EFBIG
    assert not (tmp_path / "spm" / "spm.model").exists() and not partial_files(tmp_path)
    spm.build_pieces(tmp_path, ("en", "de"), 700)
    assert (tmp_path / "spm" / "spm.model").stat().st_size > 5000


def test_whatever_the_training_text_holds_has_pieces(tmp_path):
    """NUL is taken out; the trainer skips lines of U+2585, and cuts out the names of symbols."""
    plain = ["das rote Haus ist hier", "ein altes Licht war dort"] * 20
    odd = ["null\0zeichen", "▅ nur hier: é", "<s>", "</s>", "ein <unk> und ein <pad>", "<s>" * 50]
    for split in ("train", "valid", "test"):
        for language in ("en", "de"):
            files.write_lines(tmp_path / "raw" / f"{split}.{language}", plain + odd)
    _, result = spm.build_pieces(tmp_path, ("en", "de"), 80)
    for sides in result["splits"].values():
        assert [counts["unknown"] for counts in sides.values()] == [0, 0]
    model = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "spm" / "spm.model"))
    written = lines_of(tmp_path, "train", "de", "spm")[len(plain) :]
    assert [model.decode(line.split(" ")) for line in written] == ["nullzeichen", *odd[1:]]
    pieces = {line.rsplit(" ", 1)[0] for line in files.read_lines(tmp_path / "spm" / "dict.txt")}
    assert not {"<s>", "</s>", "<unk>", "<pad>"} & pieces
    assert Dictionary.load(str(tmp_path / "spm" / "dict.txt")).unk_index == 3
    # As is text that comes later.
    subwords = SentencePiece(tmp_path / "spm" / "spm.model")
    assert subwords.encoder().encode(subwords.tokenise(odd[0], "de")) == written[0]
