"""Which pairs of ``raw/`` WMT14's training text keeps: normalised text, or tokens of Moses."""

import functools
from collections import Counter
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Tuple

from fairseq_sparsemixer.corpora.bpe import token_path
from fairseq_sparsemixer.corpora.cleaning import (
    Limits,
    drop_reason,
    moses_drop_reason,
    normalise,
)
from fairseq_sparsemixer.corpora.folder import count_lines, raw_path
from fairseq_sparsemixer.corpora.parallel_text import (
    LinePair,
    ParallelFiles,
    pair_writer,
    parallel_files,
)
from fairseq_sparsemixer.corpora.resumable import StepResult
from fairseq_sparsemixer.corpora.wmt14.extraction import LANGUAGES, raw_paths
from fairseq_sparsemixer.corpora.workers import map_chunks, useful_workers
from fairseq_sparsemixer.errors import UserError
from fairseq_sparsemixer.files import iterate_lines
from fairseq_sparsemixer.text import moses

MAX_TOKENS = 80
MAX_LENGTH_RATIO = 9.0
"""Of the longer side to the shorter, in tokens: the default of clean-corpus-n.perl."""
LIMITS = Limits(
    min_tokens=1,
    max_tokens=MAX_TOKENS,
    max_length_ratio=MAX_LENGTH_RATIO,
    min_letter_share=0.0,
    min_words=0,
)

Filtered = Tuple[List[LinePair], Counter]
"""Pairs kept, and how many were dropped for each reason."""


def clean_text(folder: Path, workers: Optional[int]) -> StepResult:
    """Write ``clean/train.*``: normalised pairs of ``raw/`` within :data:`LIMITS`.

    Returns:
        Paths, and how many pairs were kept and dropped for each reason.
    """
    targets = (clean_path(folder, "train", "en"), clean_path(folder, "train", "de"))
    return list(targets), _filter(folder, "train", targets, _clean_chunk, workers)


def clean_path(folder: Path, split: str, language: str) -> Path:
    """``clean/train.en``; validation and test text stay as they are: ``raw/valid.en``."""
    if split != "train":
        return raw_path(folder, split, language)
    return folder / "clean" / f"{split}.{language}"


def _clean_chunk(pairs: List[LinePair]) -> Filtered:
    normalised = [(normalise(source), normalise(target)) for source, target in pairs]
    return _keep(normalised, functools.partial(drop_reason, limits=LIMITS))


def _keep(pairs: List[LinePair], reason_against: Callable[[str, str], Optional[str]]) -> Filtered:
    kept: List[LinePair] = []
    dropped: Counter = Counter()
    for pair in pairs:
        reason = reason_against(*pair)
        if reason is None:
            kept.append(pair)
        else:
            dropped[reason] += 1
    return kept, dropped


def tokenise(folder: Path, workers: Optional[int]) -> StepResult:
    """Write ``tokens/``: Moses tokens as the reference recipe makes them.

    Training and validation text has its punctuation normalised, test text has not; training pairs
    are kept as ``clean-corpus-n.perl`` with 1 and 80 keeps them.

    Returns:
        Paths, and how many training pairs were kept and dropped for each reason.
    """
    outputs: List[Path] = []
    result: Dict[str, Any] = {}
    for split, function in (
        ("train", _tokenise_training_chunk),
        ("valid", _tokenise_valid_chunk),
        ("test", _tokenise_test_chunk),
    ):
        targets = parallel_files(token_path, folder, split, LANGUAGES)
        counts = _filter(folder, split, targets, function, workers)
        outputs += targets
        if split == "train":
            result = counts
    return outputs, result


def _tokenise_training_chunk(pairs: List[LinePair]) -> Filtered:
    reason_against = functools.partial(
        moses_drop_reason, max_tokens=MAX_TOKENS, max_length_ratio=MAX_LENGTH_RATIO
    )
    return _keep(_tokens(pairs, moses.training_tokens), reason_against)


def _tokenise_valid_chunk(pairs: List[LinePair]) -> Filtered:
    return _tokens(pairs, moses.training_tokens), Counter()


def _tokenise_test_chunk(pairs: List[LinePair]) -> Filtered:
    return _tokens(pairs, moses.test_tokens), Counter()


def _tokens(pairs: List[LinePair], tokenise_line: Callable[[str, str], str]) -> List[LinePair]:
    source_lang, target_lang = LANGUAGES
    return [
        (tokenise_line(source, source_lang), tokenise_line(target, target_lang))
        for source, target in pairs
    ]


def _filter(
    folder: Path,
    split: str,
    targets: ParallelFiles,
    function: Callable[[List[LinePair]], Filtered],
    workers: Optional[int],
) -> Dict[str, Any]:
    """Write what ``function`` makes of the pairs of a split; its counts."""
    paths = raw_paths(folder, split)
    lines = count_lines(paths[0])
    pairs = zip(iterate_lines(paths[0]), iterate_lines(paths[1]))
    total: Counter = Counter()
    processes = useful_workers(lines, workers)
    with pair_writer(targets) as write:
        for kept, dropped in map_chunks(function, pairs, processes, total=lines, name=split):
            total.update(dropped)
            for pair in kept:
                write(pair)
    pairs_kept = lines - sum(total.values())
    if not pairs_kept:
        raise UserError(f"cleaning leaves nothing of {paths[0]} and {paths[1]}: {dict(total)}")
    return {"pairs": pairs_kept, "dropped": dict(sorted(total.items()))}
