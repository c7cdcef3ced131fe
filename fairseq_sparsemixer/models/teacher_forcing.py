"""Sentence pairs as a model reads them under teacher forcing."""

from typing import Any, Dict, Iterable, Iterator, List, NamedTuple, Sequence

import torch
from fairseq.data import data_utils
from torch import Tensor


class EncodedPair(NamedTuple):
    """A sentence and its translation, (length,) int64 each, with the end-of-sentence symbol."""

    source: Tensor
    target: Tensor


def decoder_input(target: Tensor, eos: int) -> Tensor:
    """(length,) what the decoder reads to put out ``target``: the symbol before each of it."""
    return torch.cat([target.new_tensor([eos]), target[:-1]])


def net_input(
    sources: List[Tensor], decoder_inputs: List[Tensor], pad: int, left_pad_source: bool
) -> Dict[str, Any]:
    """The arguments of ``model(**net_input)`` for a batch.

    Args:
        sources: (length,) what the encoder reads of each sentence.
        decoder_inputs: (length,) of each, see :func:`decoder_input`.
        pad: symbol of padding.
        left_pad_source: where sources are padded; decoder inputs are on the right.

    Returns:
        ``src_tokens`` and ``prev_output_tokens`` (batch, longest), and ``src_lengths`` (batch,).
    """
    return {
        "src_tokens": data_utils.collate_tokens(sources, pad, left_pad=left_pad_source),
        "src_lengths": torch.tensor([len(source) for source in sources]),
        "prev_output_tokens": data_utils.collate_tokens(decoder_inputs, pad),
    }


def batches(sizes: Sequence[int], order: Iterable[int], max_tokens: int) -> Iterator[List[int]]:
    """The numbers of ``order`` in runs of at most ``max_tokens``, padding included.

    Args:
        sizes: tokens of each number.
        order: those of like size should follow each other.
        max_tokens: of a run of more than one.
    """
    run: List[int] = []
    longest = 0
    for number in order:
        longest = max(longest, sizes[number])
        if run and longest * (len(run) + 1) > max_tokens:
            yield run
            run, longest = [], sizes[number]
        run.append(number)
    if run:
        yield run
