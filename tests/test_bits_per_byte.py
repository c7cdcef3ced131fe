"""How many bytes tokens stand for: those of a line add up to it and its end."""

import pytest

from fairseq_sparsemixer.bits_per_byte import byte_counts

SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]
LINE = "größer als zwei"


@pytest.mark.parametrize(
    "tokens",
    [
        ["▁grö", "ßer", "▁als", "▁", "zwei"],  # sentencepiece
        ["▁gr", "<0xC3>", "<0xB6>", "ßer", "▁als", "▁zwei"],  # which falls back on bytes
        ["grö@@", "ßer", "als", "zw@@", "ei"],
        ["größer", "als", "zwei"],
    ],
)
def test_tokens_of_a_line_add_up_to_its_bytes(tokens):
    symbols = SPECIAL + sorted(set(tokens))
    counts = dict(zip(symbols, byte_counts(symbols, len(SPECIAL))))
    assert sum(counts[token] for token in [*tokens, "</s>"]) == len(f"{LINE}\n".encode())
    assert not any(counts[symbol] for symbol in SPECIAL)
