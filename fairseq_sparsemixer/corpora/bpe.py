"""Tokenised text cut by byte-pair encoding (Sennrich et al. 2016), with subword-nmt.

The folder of a corpus holds ``tokens/{train,valid,test}.LANG`` (text as :mod:`.text.moses`
tokenises it) and ``bpe/`` (``codes`` and the same text in pieces).
"""

import functools
import io
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any, Iterator, List, Optional

from tqdm import tqdm

from fairseq_sparsemixer.corpora.folder import Languages, count_lines
from fairseq_sparsemixer.corpora.pieces import describe_splits, write_pieces
from fairseq_sparsemixer.corpora.resumable import StepResult
from fairseq_sparsemixer.corpora.workers import map_chunks, useful_workers
from fairseq_sparsemixer.files import atomic_path, iterate_lines
from fairseq_sparsemixer.requirements import load
from fairseq_sparsemixer.text import moses

_SPECIAL_SYMBOLS = 4  # of fairseq's dictionary


def check_installed() -> None:
    """Raise a :class:`UserError` unless sacremoses and subword-nmt can be imported."""
    moses.tokenise("", "en")
    load("subword_nmt.learn_bpe", "wmt")


def token_path(folder: Path, split: str, language: str) -> Path:
    """``tokens/train.en`` and so on."""
    return folder / "tokens" / f"{split}.{language}"


def build_pieces(
    folder: Path, languages: Languages, merges: int, workers: Optional[int] = None
) -> StepResult:
    """Learn joint merges on the training tokens alone, and write all tokens in pieces.

    Args:
        folder: of the corpus.
        languages: source and target.
        merges: number of merge operations (``subword-nmt learn-bpe --symbols``).
        workers: processes at most (default: the cores).

    Returns:
        Paths of the outputs, and counts as :func:`.spm.build_pieces` returns them.

    Raises:
        UserError: subword-nmt is not installed.
    """
    codes = folder / "bpe" / "codes"
    _learn([token_path(folder, "train", name) for name in languages], merges, codes)

    def encode(path: Path) -> Iterator[str]:
        lines = count_lines(path)
        apply = functools.partial(_apply, str(codes))
        processes = useful_workers(lines, workers)
        chunks = map_chunks(apply, iterate_lines(path), processes, total=lines, name=path.name)
        return (line for chunk in chunks for line in chunk)

    outputs, splits = write_pieces(folder, languages, "bpe", token_path, encode)
    vocabulary = set().union(*(pieces.frequency for pieces in splits["train"].values()))
    result = {
        "vocabulary": len(vocabulary) + _SPECIAL_SYMBOLS,
        "splits": describe_splits(splits, vocabulary),
        "versions": {"subword-nmt": version("subword-nmt")},
    }
    return [codes, *outputs], result


def _learn(texts: List[Path], merges: int, codes: Path) -> None:
    """Write ``merges`` merge operations, learnt from the words of all ``texts`` together."""
    learn_bpe = load("subword_nmt.learn_bpe", "wmt")
    words: Counter = Counter()
    for path in texts:
        # In this process: handing lines to others would take longer than counting.
        for line in tqdm(
            iterate_lines(path), desc=f"words of {path.name}", unit=" lines", disable=None
        ):
            words.update(word for word in line.split(" ") if word)
    dictionary = io.StringIO("".join(f"{word} {count}\n" for word, count in words.items()))
    with atomic_path(codes) as partial, partial.open("w", encoding="utf-8", newline="\n") as file:
        learn_bpe.learn_bpe(dictionary, file, merges, is_dict=True)
    _load.cache_clear()


def _apply(codes: str, lines: List[str]) -> List[str]:
    bpe = _load(codes)
    return [bpe.process_line(line) for line in lines]


@functools.lru_cache(maxsize=1)
def _load(codes: str) -> Any:
    """The codes of a file, with the words that were cut so far."""
    with open(codes, encoding="utf-8") as file:
        return load("subword_nmt.apply_bpe", "wmt").BPE(file)
