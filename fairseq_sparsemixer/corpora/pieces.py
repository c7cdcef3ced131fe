"""Text in pieces: written for every split and language, and counted."""

from collections import Counter
from pathlib import Path
from typing import Callable, Container, Dict, Iterator, List, NamedTuple, Tuple

from fairseq_sparsemixer.corpora.folder import (
    SPLITS,
    Languages,
    TextPath,
    count_lines,
    piece_path,
)
from fairseq_sparsemixer.files import write_lines


class Pieces(NamedTuple):
    """The text of one split and language in pieces: number of lines, and how often each piece."""

    sentences: int
    frequency: Counter

    def describe(self, vocabulary: Container[str]) -> Dict[str, int]:
        """``sentences``, ``pieces``, and ``unknown``: pieces that become ``<unk>``."""
        unknown = sum(n for piece, n in self.frequency.items() if piece not in vocabulary)
        return {
            "sentences": self.sentences,
            "pieces": sum(self.frequency.values()),
            "unknown": unknown,
        }


def write_pieces(
    folder: Path,
    languages: Languages,
    pieces: str,
    text_path: TextPath,
    encode: Callable[[Path], Iterator[str]],
) -> Tuple[List[Path], Dict[str, Dict[str, Pieces]]]:
    """Write the text of every split to the subfolder ``pieces``, a line for each line.

    Args:
        folder, languages, text_path: as for :func:`build_pieces`.
        pieces: name of the subfolder.
        encode: yields the lines of a file as pieces separated by spaces.

    Returns:
        Paths of the outputs, and by split and language what they hold.
    """
    outputs = []
    splits: Dict[str, Dict[str, Pieces]] = {split: {} for split in SPLITS}
    for split in SPLITS:
        for language in languages:
            path = piece_path(folder, split, language, pieces)
            splits[split][language] = write_text(path, encode(text_path(folder, split, language)))
            outputs.append(path)
    return outputs, splits


def write_text(path: Path, lines: Iterator[str]) -> Pieces:
    """Write lines of pieces separated by spaces; what they hold."""
    frequency: Counter = Counter()
    write_lines(path, _counted(lines, frequency))
    return Pieces(count_lines(path), frequency)


def describe_splits(
    splits: Dict[str, Dict[str, Pieces]], vocabulary: Container[str]
) -> Dict[str, Dict[str, Dict[str, int]]]:
    """:meth:`Pieces.describe` by split and language."""
    return {
        split: {language: pieces.describe(vocabulary) for language, pieces in sides.items()}
        for split, sides in splits.items()
    }


def _counted(lines: Iterator[str], frequency: Counter) -> Iterator[str]:
    """The same lines; adds up how often each piece occurs."""
    for line in lines:
        # Not split(): a piece may be a character that Python takes for white space.
        frequency.update(line.split(" ") if line else [])
        yield line
