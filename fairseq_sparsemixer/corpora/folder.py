"""What a corpus' folder holds and where: text, pairs, the record that says it is complete.

======================================  ===========================================================
``raw/{train,valid,test}.LANG``         text, a sentence a line; ``.domain`` the kind of each line
``{spm,bpe}/{train,valid,test}.LANG``   the same text in pieces
``copy/test.LANG``                      the test set "translated" by the nearest training sentences
``bin/``                                what fairseq trains on
``record.json``                         source, counts, scores, versions, settings
======================================  ===========================================================

In a corpus of several pairs of languages, such as ``en-de``, ``LANG`` is ``en-de.en`` and
``en-de.de``.
"""

import contextlib
from pathlib import Path
from typing import Callable, Iterator, List, Optional, Sequence, Tuple

from fairseq_sparsemixer.corpora.cleaning import SentencePair
from fairseq_sparsemixer.corpora.resumable import STEPS, Steps
from fairseq_sparsemixer.disk import report_full_disk
from fairseq_sparsemixer.errors import UserError
from fairseq_sparsemixer.files import iterate_lines, read_json, read_lines, write_lines
from fairseq_sparsemixer.locks import in_turn

SPLITS = ("train", "valid", "test")
CORPUS_RECORD = "record.json"
"""Written last, so that a folder that has it is complete."""
_MADE = ("raw", "spm", "bpe", "bin", "copy")
_NAME = "corpus"
"""Beside the records of the steps: the name of the corpus."""

Languages = Tuple[str, str]
"""Endings of the files of source and target; see :func:`sides_of`, too."""
TextPath = Callable[[Path, str, str], Path]
"""Where the text of a split and language lies in a corpus' folder, such as :func:`raw_path`."""


@contextlib.contextmanager
def steps_in(output: Path, megabytes: int, corpus: str) -> Iterator[Steps]:
    """Yield the steps of the folder ``output``; errors of the disk become a :class:`UserError`.

    A preparation that is at work there is waited for: its steps are then done. Another corpus, and
    text that none has made, which the steps would replace, are refused.

    Args:
        output: the folder; made if need be.
        megabytes: of disk that the corpus takes.
        corpus: its name.
    """
    with report_full_disk(output, megabytes):
        try:
            output.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise UserError(f"--output {output} is not a folder") from error
        except PermissionError as error:
            raise UserError(f"--output {output}: {error.strerror}") from error
        with in_turn(output):
            _make_own(output, corpus)
            yield Steps(output, seal=output / CORPUS_RECORD)


def _make_own(output: Path, corpus: str) -> None:
    """Refuse a folder with files of somebody else's where steps write theirs."""
    steps = output / STEPS
    held = _held(output) if any(steps.glob("*.json")) else None
    if steps.is_dir():
        if held not in (None, corpus):
            raise UserError(
                f"{output} holds the corpus {held}, which the corpus {corpus} would replace: name "
                f"another folder, or remove {output}"
            )
    else:
        for name in _MADE:
            if any((output / name).glob("*")):
                raise UserError(
                    f"{output / name} holds files that were not prepared here, and would be "
                    f"replaced: move them, or name another folder than {output}"
                )
        # Before the first step, which may be killed: what it leaves is no stranger's.
        steps.mkdir()
    if held is None:
        write_lines(steps / _NAME, [corpus])


def _held(output: Path) -> Optional[str]:
    """The corpus of a folder where steps are done; None where that is not known."""
    name, record = output / STEPS / _NAME, output / CORPUS_RECORD
    if name.is_file():
        held = "".join(read_lines(name))
        # Earlier versions called it as text that is only cut.
        cleaned = any((output / STEPS / f"{each}.json").exists() for each in ("clean", "tokenise"))
        return "own text, as wmt14" if held == "own text" and cleaned else held
    with contextlib.suppress(UserError):  # one that is damaged is made anew
        if record.is_file():  # of an earlier version
            return str(read_json(record, {"corpus": str}, "")["corpus"])
    return None


@contextlib.contextmanager
def unchanged(corpus: Optional[Path]) -> Iterator[None]:
    """Refuse a prepared corpus that is made anew while the block reads it; None is no corpus.

    Nothing is locked, as it may be one that others own. A corpus that nobody prepared is taken as
    it is.

    Raises:
        UserError: it is not complete, or not the same after the block.
    """
    before = _seal(corpus)
    if before is None and corpus is not None and (corpus / STEPS).is_dir():
        raise UserError(
            f"{corpus} is not complete: wait for `fairseq-sparsemixer prepare`, or run it again"
        )
    yield
    if _seal(corpus) != before:
        raise UserError(
            f"{corpus} was prepared anew while it was read: wait for `fairseq-sparsemixer "
            "prepare`, and start the same command again"
        )


def _seal(corpus: Optional[Path]) -> Optional[Tuple[int, int]]:
    """Of the record, which goes before anything is changed; None where there is none."""
    if corpus is None or not (corpus / CORPUS_RECORD).is_file():
        return None
    status = (corpus / CORPUS_RECORD).stat()
    return status.st_ino, status.st_mtime_ns


def raw_path(folder: Path, split: str, language: str) -> Path:
    """``raw/train.en`` and so on."""
    return folder / "raw" / f"{split}.{language}"


def piece_path(folder: Path, split: str, language: str, pieces: str = "spm") -> Path:
    """``spm/train.en`` and so on."""
    return folder / pieces / f"{split}.{language}"


def domain_path(folder: Path, split: str) -> Path:
    """``raw/train.domain`` and so on: the kind of text of each line, where there are several."""
    return raw_path(folder, split, "domain")


def copy_path(folder: Path, languages: Languages) -> Path:
    """Where the test set "translated" by the nearest training sentences is."""
    return folder / "copy" / f"test.{languages[1]}"


def sides_of(pair: str) -> Languages:
    """``("en-de.en", "en-de.de")``: the endings of a pair's files where there are several pairs."""
    source, target = pair.split("-")
    return f"{pair}.{source}", f"{pair}.{target}"


def paths_of(text_path: TextPath, folder: Path, languages: Sequence[str]) -> List[Path]:
    """The files of every split in all languages."""
    return [text_path(folder, split, language) for split in SPLITS for language in languages]


def count_lines(path: Path) -> int:
    """How many lines a file has."""
    with path.open("rb") as file:
        return sum(1 for _ in file)


def write_pairs(path: Path, pairs: Sequence[SentencePair]) -> None:
    """Write source, target, document and domain (if there is one), separated by tabs.

    What separates fields or lines becomes a space: a document may be named after somebody's file.
    """
    separators = str.maketrans("\t\n\r", "   ")
    write_lines(
        path,
        (
            "\t".join(field.translate(separators) for field in (pair if pair.domain else pair[:3]))
            for pair in pairs
        ),
    )


def read_pairs(path: Path) -> List[SentencePair]:
    """The pairs of a file that :func:`write_pairs` made."""
    return [SentencePair(*line.split("\t")) for line in iterate_lines(path)]
