"""Text in two languages, line N of one file for line N of the other, read and written in step."""

import contextlib
import itertools
import re
from collections import Counter
from pathlib import Path
from typing import Callable, Dict, Iterator, List, Optional, Sequence, Set, Tuple, Union

from tqdm import tqdm

from fairseq_sparsemixer.corpora.cleaning import normalise
from fairseq_sparsemixer.corpora.folder import Languages, TextPath, count_lines
from fairseq_sparsemixer.errors import UserError
from fairseq_sparsemixer.files import atomic_path, decode_line, iterate_lines

LinePair = Tuple[str, str]
ParallelFiles = Tuple[Path, Path]
"""Two files, whose lines correspond."""
_SEGMENT = re.compile(r"<seg.*?>(.*)</seg>.*?")
_SPACES = re.compile(r"\s+")


def parallel_files(
    text_path: TextPath, folder: Path, split: str, languages: Languages
) -> ParallelFiles:
    """The files of a split in both languages."""
    source, target = (text_path(folder, split, language) for language in languages)
    return source, target


def iterate_segments(path: Path) -> Iterator[str]:
    """The segments of an SGM or XML file of a shared task, exactly as sacreBLEU reads them."""
    for line in iterate_lines(path):
        if line.startswith("<seg "):
            yield _SPACES.sub(" ", _SEGMENT.sub(r"\1", line).strip())


def write_parallel(
    texts: Sequence[ParallelFiles],
    targets: ParallelFiles,
    held_out: Optional[Set[str]] = None,
) -> Tuple[List[int], Dict[str, int], int]:
    """Join parallel texts.

    Args:
        texts: for each text its two files.
        targets: the files to write, whole or not at all.
        held_out: normalised source lines of validation and test, where ``texts`` are for training:
            lines of these that are not UTF-8 are left out with their translations.

    Returns:
        Pairs written of each text, pairs dropped by reason, and how many sources of those written
        are in ``held_out``.

    Raises:
        UserError: the two files of a text have different numbers of lines, or hold no text; or a
            line is not UTF-8 and ``held_out`` is None.
    """
    pairs: List[int] = []
    dropped: Counter = Counter()
    also_held_out = 0
    with pair_writer(targets) as write:
        for text in texts:
            written = 0
            name = text[0].name
            for pair in tqdm(_pairs(text), desc=name, unit=" lines", leave=False, disable=None):
                if isinstance(pair, UserError):
                    if held_out is None:
                        raise pair
                    dropped["not_utf8"] += 1
                    continue
                write(pair)
                written += 1
                also_held_out += held_out is not None and normalise(pair[0]) in held_out
            if not written:
                raise UserError(f"{text[0]} and {text[1]} hold no text")
            pairs.append(written)
    return pairs, dict(dropped), also_held_out


@contextlib.contextmanager
def pair_writer(targets: ParallelFiles) -> Iterator[Callable[[LinePair], None]]:
    """Yield what writes a pair to two files, which appear when the block ends without error."""
    with contextlib.ExitStack() as stack:
        partials = [stack.enter_context(atomic_path(path)) for path in targets]
        # Closed before the files get their names.
        with contextlib.ExitStack() as files:
            source, target = (
                files.enter_context(path.open("w", encoding="utf-8", newline="\n"))
                for path in partials
            )

            def write(pair: LinePair) -> None:
                source.write(f"{pair[0]}\n")
                target.write(f"{pair[1]}\n")

            yield write


def _pairs(text: ParallelFiles) -> Iterator[Union[LinePair, UserError]]:
    """Yield the pairs of two files; for one that is not UTF-8 the error that says where."""
    with text[0].open("rb") as sources, text[1].open("rb") as targets:
        for number, (source, target) in enumerate(itertools.zip_longest(sources, targets), 1):
            if source is None or target is None:
                raise unequal_lengths(text)
            try:
                yield (
                    decode_line(source, str(text[0]), number),
                    decode_line(target, str(text[1]), number),
                )
            except UserError as error:
                yield error


def unequal_lengths(text: ParallelFiles) -> UserError:
    """The error of two files that have different numbers of lines."""
    first, second = text
    return UserError(
        f"{first} has {count_lines(first)} lines and {second} has {count_lines(second)}: "
        "line N of one must translate line N of the other"
    )
