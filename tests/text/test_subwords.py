"""Models that cut text, damaged."""

import pytest

from fairseq_sparsemixer.errors import UserError
from fairseq_sparsemixer.text.subwords import MosesBPE, SentencePiece


def test_a_sentencepiece_model_that_is_damaged_is_named(corpus, tmp_path):
    good = (corpus / "bin" / SentencePiece.file_name).read_bytes()
    path = tmp_path / SentencePiece.file_name
    for content in (b"", good[:1000], good[1:], b"text"):
        path.write_bytes(content)
        with pytest.raises(UserError, match=rf"SentencePiece model {path} .*--data"):
            SentencePiece(path).encoder()
    with pytest.raises(UserError, match=rf"SentencePiece model {tmp_path} .*--data"):
        SentencePiece(tmp_path).encoder()
    path.write_bytes(good)
    assert SentencePiece(path).encoder().encode("the red house")


def test_bpe_codes_that_are_damaged_are_named(tmp_path):
    pytest.importorskip("subword_nmt")
    path = tmp_path / MosesBPE.file_name
    for content in (b"#version: x\na b\n", b"a\n", b"\xff\xfe"):
        path.write_bytes(content)
        with pytest.raises(UserError, match=rf"{path} holds no codes .*--data"):
            MosesBPE(path).encoder()
    with pytest.raises(UserError, match="holds no codes"):
        MosesBPE(tmp_path).encoder()
