"""The stages that corpora share: a folder of resumable steps, and from text to ``bin/``."""

import contextlib
import functools
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Sequence

from fairseq_sparsemixer.corpora import binarise, bpe
from fairseq_sparsemixer.corpora.binarise import (
    SPLITS,
    Languages,
    TextPath,
    paths_of,
    piece_path,
    raw_path,
)
from fairseq_sparsemixer.corpora.cleaning import SentencePair
from fairseq_sparsemixer.corpora.resumable import Steps
from fairseq_sparsemixer.errors import UserError
from fairseq_sparsemixer.files import iterate_lines, report_full_disk, write_json, write_lines
from fairseq_sparsemixer.version import __version__

CORPUS_RECORD = "record.json"
"""Written last, so that a folder that has it is complete."""


@contextlib.contextmanager
def steps_in(output: Path, megabytes: int) -> Iterator[Steps]:
    """Yield the steps of the folder ``output``; errors of the disk become a :class:`UserError`."""
    with report_full_disk(output, megabytes):
        try:
            output.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise UserError(f"--output {output} is not a folder") from error
        except PermissionError as error:
            raise UserError(f"--output {output}: {error.strerror}") from error
        yield Steps(output, seal=output / CORPUS_RECORD)


def domain_path(folder: Path, split: str) -> Path:
    """``raw/train.domain`` and so on: the kind of text of each line, where there are several."""
    return raw_path(folder, split, "domain")


def write_pairs(path: Path, pairs: Sequence[SentencePair]) -> None:
    """Write source, target, document and domain (if there is one), separated by tabs."""
    write_lines(path, ("\t".join(pair if pair.domain else pair[:3]) for pair in pairs))


def read_pairs(path: Path) -> List[SentencePair]:
    """The pairs of a file that :func:`write_pairs` made."""
    return [SentencePair(*line.split("\t")) for line in iterate_lines(path)]


def sentencepiece_steps(
    steps: Steps,
    languages: Languages,
    vocab_size: int,
    text_path: TextPath = raw_path,
    character_coverage: float = 1.0,
    workers: Optional[int] = None,
) -> Dict[str, Any]:
    """From text to ``spm/`` and ``bin/``; the arguments are those of ``binarise.build_pieces``."""
    folder = steps.folder
    cut = steps.run(
        "sentencepiece",
        {**_made_with(languages), "vocab_size": vocab_size},
        paths_of(text_path, folder, languages),
        lambda: binarise.build_pieces(
            folder, languages, vocab_size, text_path, character_coverage, workers
        ),
    )
    model_and_dictionary = [folder / "spm" / "spm.model", folder / "spm" / "dict.txt"]
    steps.run(
        "binarise",
        _made_with(languages),
        [*paths_of(piece_path, folder, languages), *model_and_dictionary],
        lambda: binarise.build_binary(folder, languages, workers=workers),
    )
    return cut


def moses_steps(
    steps: Steps, languages: Languages, merges: int, workers: Optional[int]
) -> Dict[str, Any]:
    """From ``tokens/`` to ``bpe/`` and ``bin/``."""
    folder = steps.folder
    bpe_path = functools.partial(piece_path, pieces="bpe")
    cut = steps.run(
        "bpe",
        {**_made_with(languages), "merges": merges},
        paths_of(bpe.token_path, folder, languages),
        lambda: bpe.build_pieces(folder, languages, merges, workers),
    )
    steps.run(
        "binarise",
        _made_with(languages),
        [*paths_of(bpe_path, folder, languages), folder / "bpe" / "codes"],
        lambda: binarise.build_binary(folder, languages, "bpe", ("codes", bpe.CODES_NAME), workers),
    )
    return cut


def _made_with(languages: Languages) -> Dict[str, Any]:
    return {"version": __version__, "languages": list(languages)}


def write_record(
    steps: Steps, languages: Languages, record: Dict[str, Any], cut: Dict[str, Any]
) -> Dict[str, Any]:
    """Write ``record.json``: ``record`` and what the steps said of the pieces; returns it.

    Domains that an earlier corpus left in the folder are no longer those of its lines.
    """
    if "domains" not in record:
        for split in SPLITS:
            domain_path(steps.folder, split).unlink(missing_ok=True)
    record = {
        **record,
        "languages": list(languages),
        "splits": cut["splits"],
        "vocabulary": cut["vocabulary"],
        "versions": {"fairseq-sparsemixer": __version__, **cut["versions"]},
    }
    write_json(steps.folder / CORPUS_RECORD, record)
    return record
