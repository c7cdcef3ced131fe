"""The stages that corpora share: a folder of resumable steps, and from text to ``bin/``."""

import contextlib
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional

from fairseq_sparsemixer import __version__
from fairseq_sparsemixer.corpora import binarise, bpe
from fairseq_sparsemixer.corpora.binarise import SPLITS, Languages
from fairseq_sparsemixer.corpora.steps import Steps
from fairseq_sparsemixer.errors import UserError
from fairseq_sparsemixer.files import report_full_disk, write_json

RECORD = "record.json"
"""Written last, so that a folder that has it is complete."""


@contextlib.contextmanager
def steps_in(output: Path, megabytes: int) -> Iterator[Steps]:
    """Yield the steps of the folder ``output``; errors of the disk become a :class:`UserError`."""
    with report_full_disk(output, megabytes):
        try:
            output.mkdir(parents=True, exist_ok=True)
        except FileExistsError as error:
            raise UserError(f"--output {output} is not a folder") from error
        except PermissionError as error:
            raise UserError(f"--output {output}: {error.strerror}") from error
        yield Steps(output, seal=output / RECORD)


def sentencepiece_steps(
    steps: Steps, languages: Languages, vocab_size: int, texts: List[Path], **options: Any
) -> Dict[str, Any]:
    """From text to ``spm/`` and ``bin/``; ``options`` are those of ``build_pieces``."""
    folder = steps.folder
    made_with = {"version": __version__, "languages": list(languages)}
    cut = steps.run(
        "sentencepiece",
        {**made_with, "vocab_size": vocab_size},
        texts,
        lambda: binarise.build_pieces(folder, languages, vocab_size, **options),
    )
    encoded = [binarise.piece_path(folder, split, name) for split in SPLITS for name in languages]
    encoded += [folder / "spm" / "spm.model", folder / "spm" / "dict.txt"]
    steps.run("binarise", made_with, encoded, lambda: binarise.build_binary(folder, languages))
    return cut


def moses_steps(
    steps: Steps, languages: Languages, merges: int, workers: Optional[int]
) -> Dict[str, Any]:
    """From ``tokens/`` to ``bpe/`` and ``bin/``."""
    folder = steps.folder
    made_with = {"version": __version__, "languages": list(languages)}
    tokens = [bpe.token_path(folder, split, name) for split in SPLITS for name in languages]
    cut = steps.run(
        "bpe",
        {**made_with, "merges": merges},
        tokens,
        lambda: bpe.build_pieces(folder, languages, merges, workers),
    )
    encoded = [
        binarise.piece_path(folder, split, name, "bpe") for split in SPLITS for name in languages
    ]
    steps.run(
        "binarise",
        made_with,
        [*encoded, folder / "bpe" / "codes"],
        lambda: binarise.build_binary(folder, languages, "bpe", ("codes", bpe.CODES_NAME), workers),
    )
    return cut


def write_record(
    steps: Steps, languages: Languages, record: Dict[str, Any], cut: Dict[str, Any]
) -> Dict[str, Any]:
    """Write ``record.json``: ``record`` and what the steps said of the pieces; returns it."""
    record = {
        **record,
        "languages": list(languages),
        "splits": cut["splits"],
        "vocabulary": cut["vocabulary"],
        "versions": {"fairseq-sparsemixer": __version__, **cut["versions"]},
    }
    write_json(steps.folder / RECORD, record)
    return record
