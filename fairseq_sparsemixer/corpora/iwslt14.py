"""The corpus ``iwslt14``: talks, German to English, as fairseq's example prepares them.

Cleaning, split and pieces are those of ``fairseq/examples/translation/prepare-iwslt14.sh``: Moses
tokens without ``-a`` in small letters, of the training text the pairs of 1 to 175 tokens a side
with at most 1.5 times as many on the other; every 23rd of these is for validation; the test set is
the development and test talks of 2010 to 2012.
"""

import contextlib
import itertools
import re
from collections import Counter
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, Iterator, List, Optional, Tuple

from fairseq_sparsemixer.corpora import bpe
from fairseq_sparsemixer.corpora.archives import unpack
from fairseq_sparsemixer.corpora.bpe import token_path
from fairseq_sparsemixer.corpora.cleaning import moses_drop_reason
from fairseq_sparsemixer.corpora.downloads import DEFAULT_SHELF, RemoteFile, Shelf, ShelfChoice
from fairseq_sparsemixer.corpora.folder import count_lines, paths_of, raw_path, steps_in
from fairseq_sparsemixer.corpora.parallel_text import (
    LinePair,
    ParallelFiles,
    iterate_segments,
    pair_writer,
    parallel_files,
)
from fairseq_sparsemixer.corpora.resumable import StepResult
from fairseq_sparsemixer.corpora.text_to_binary import moses_steps, write_record
from fairseq_sparsemixer.corpora.workers import map_chunks, useful_workers
from fairseq_sparsemixer.errors import UserError
from fairseq_sparsemixer.files import iterate_lines, scratch_folder, write_json
from fairseq_sparsemixer.text import MOSES_TOKENS, moses
from fairseq_sparsemixer.version import __version__

LANGUAGES = ("de", "en")
ARCHIVE = RemoteFile("https://dl.fbaipublicfiles.com/fairseq/data/iwslt14/de-en.tgz")
IWSLT14_MERGES = 10_000
MAX_TOKENS = 175
MAX_LENGTH_RATIO = 1.5
VALID_EVERY = 23
"""One in so many of the pairs that are kept is for validation."""
MEGABYTES = 500
"""Of disk, the archive included."""
_TRAIN = "de-en/train.tags.de-en.{}"
_TEST = (
    "de-en/IWSLT14.TED.dev2010.de-en.{}.xml",
    "de-en/IWSLT14.TEDX.dev2012.de-en.{}.xml",
    "de-en/IWSLT14.TED.tst2010.de-en.{}.xml",
    "de-en/IWSLT14.TED.tst2011.de-en.{}.xml",
    "de-en/IWSLT14.TED.tst2012.de-en.{}.xml",
)
_NO_TEXT = re.compile("<url>|<talkid>|<keywords>")
_TAGS = re.compile("</?(?:title|description)>")

Tokenised = Tuple[List[Tuple[LinePair, LinePair]], Counter]
"""Pairs of text with their tokens, and how many were dropped for each reason."""


def prepare_iwslt14(
    output: Path,
    *,
    merges: int = IWSLT14_MERGES,
    archives: ShelfChoice = DEFAULT_SHELF,
    workers: Optional[int] = None,
) -> Dict[str, Any]:
    """Build IWSLT14 German-English in ``output``; finished steps are skipped.

    Args:
        output: folder of the corpus; made if need be.
        merges: of the joint BPE.
        archives: where they are kept, and come from.
        workers: processes at most (default: the cores).

    Returns:
        What is in ``record.json``.

    Raises:
        UserError: see :func:`.archives.unpack`; no disk space; a missing package; the languages of
            a text have different numbers of lines.
    """
    # Missing packages are told before the download.
    bpe.check_installed()
    with steps_in(output, MEGABYTES, "iwslt14") as steps:
        shelf = archives.shelf(output)
        text = steps.run(
            "tokenise",
            {"version": __version__},
            [],
            lambda: _tokenise(output, shelf, workers),
        )
        shelf.check_made_from(text["archives"], output)
        return write_record(
            steps,
            LANGUAGES,
            {
                "corpus": "iwslt14",
                "pipeline": "moses",
                "source": text["archives"],
                "settings": {
                    "merges": merges,
                    "max_tokens": MAX_TOKENS,
                    "max_length_ratio": MAX_LENGTH_RATIO,
                },
                "cleaning": text["cleaning"],
            },
            moses_steps(steps, LANGUAGES, merges, workers),
        )


def _tokenise(folder: Path, shelf: Shelf, workers: Optional[int]) -> StepResult:
    """Write ``raw/`` and ``tokens/``, both in small letters; what was kept and dropped."""
    with scratch_folder(folder / ".raw.partial") as scratch:
        members = {
            text.format(language): scratch / Path(text.format(language)).name
            for text in (_TRAIN, *_TEST)
            for language in LANGUAGES
        }
        unpack(ARCHIVE, members, shelf, MEGABYTES)
        train, *tests = zip(*[iter(members.values())] * len(LANGUAGES))
        kept, dropped = _write_train(folder, train, workers)
        with _writer(folder, "test") as write:
            for test in tests:
                for pair in _pairs(test, iterate_segments):
                    write((pair, _tokens(pair, moses.test_tokens)))
    settings = folder / "tokens" / MOSES_TOKENS
    write_json(settings, {"split_hyphens": False, "lowercase": True})
    paths = [*paths_of(raw_path, folder, LANGUAGES), *paths_of(token_path, folder, LANGUAGES)]
    return [*paths, settings], {
        "archives": {ARCHIVE.name: shelf.checksums.entries[ARCHIVE.name]},
        "cleaning": {"pairs": kept, "dropped": dict(sorted(dropped.items()))},
    }


def _write_train(
    folder: Path, train: ParallelFiles, workers: Optional[int]
) -> Tuple[Dict[str, int], Counter]:
    """Write training and validation text; how many pairs of each, and what was dropped."""
    lines = count_lines(train[0])
    chunks = map_chunks(
        _tokenise_chunk,
        _pairs(train, _talk_lines),
        useful_workers(lines, workers),
        total=lines,
        name="train",
    )
    kept: Counter = Counter()
    dropped: Counter = Counter()
    with _writer(folder, "train") as write, _writer(folder, "valid") as write_valid:
        for pairs, reasons in chunks:
            dropped.update(reasons)
            for pair in pairs:
                number = sum(kept.values()) + 1
                split, write_pair = (
                    ("train", write) if number % VALID_EVERY else ("valid", write_valid)
                )
                write_pair(pair)
                kept[split] += 1
    return dict(kept), dropped


def _tokenise_chunk(pairs: List[LinePair]) -> Tokenised:
    kept = []
    dropped: Counter = Counter()
    for pair in pairs:
        tokens = _tokens(pair, moses.tokenise)
        reason = moses_drop_reason(*tokens, MAX_TOKENS, MAX_LENGTH_RATIO)
        if reason is None:
            kept.append((pair, tokens))
        else:
            dropped[reason] += 1
    return kept, dropped


def _tokens(pair: LinePair, tokenise: Callable[..., str]) -> LinePair:
    source, target = (
        tokenise(line, language, split_hyphens=False).lower()
        for line, language in zip(pair, LANGUAGES)
    )
    return source, target


def _talk_lines(path: Path) -> Iterator[str]:
    """The lines of a training file that are text: titles, descriptions and what is said."""
    for line in iterate_lines(path):
        if not _NO_TEXT.search(line):
            yield _TAGS.sub("", line).strip()


def _pairs(files: ParallelFiles, read: Callable[[Path], Iterable[str]]) -> Iterator[LinePair]:
    """The pairs of two files, in step."""
    for source, target in itertools.zip_longest(*map(read, files)):
        if source is None or target is None:
            names = " and ".join(path.name for path in files)
            raise UserError(
                f"{ARCHIVE.name} is not the published archive: {names} hold different numbers of "
                "sentences; remove it and run the command again"
            )
        yield source, target


@contextlib.contextmanager
def _writer(folder: Path, split: str) -> Iterator[Callable[[Tuple[LinePair, LinePair]], None]]:
    """Yield what writes a pair in small letters, and its tokens."""
    with contextlib.ExitStack() as stack:
        text, tokens = (
            stack.enter_context(pair_writer(parallel_files(path, folder, split, LANGUAGES)))
            for path in (raw_path, token_path)
        )

        def write(pair_and_tokens: Tuple[LinePair, LinePair]) -> None:
            (source, target), pair_of_tokens = pair_and_tokens
            text((source.lower(), target.lower()))
            tokens(pair_of_tokens)

        yield write
