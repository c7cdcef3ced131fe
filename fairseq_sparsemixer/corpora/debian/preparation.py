"""The corpus ``debian``, from packages to ``bin/``."""

import dataclasses
from pathlib import Path
from typing import Any, Dict, Optional

from fairseq_sparsemixer.corpora.debian import apt, extraction
from fairseq_sparsemixer.corpora.folder import steps_in, write_pairs
from fairseq_sparsemixer.corpora.resumable import StepResult
from fairseq_sparsemixer.corpora.split_step import split_step
from fairseq_sparsemixer.corpora.text_to_binary import finish
from fairseq_sparsemixer.disk import report_full_disk
from fairseq_sparsemixer.errors import UserError
from fairseq_sparsemixer.version import __version__

DEBIAN_VOCAB_SIZE = 8000


def prepare_debian(
    output: Path,
    *,
    vocab_size: int = DEBIAN_VOCAB_SIZE,
    downloads: Optional[Path] = None,
) -> Dict[str, Any]:
    """Build the ``debian`` corpus in ``output``; finished steps are skipped.

    Args:
        output: folder of the corpus; made if need be.
        vocab_size: size of the joint vocabulary, special symbols included.
        downloads: where packages and indices are or will be (default: ``output/download``).

    Returns:
        What is in ``record.json``.

    Raises:
        UserError: see :func:`.apt.obtain`; no disk space; an unsuitable ``vocab_size``; the corpus
            in ``output`` was made from other downloads.
    """
    languages = extraction.LANGUAGES
    folder = downloads or output / "download"

    def extract() -> StepResult:
        with report_full_disk(folder, extraction.MEGABYTES, "--downloads"):
            fetched = apt.obtain(folder, extraction.REQUIRED, extraction.OPTIONAL)
        pairs, counts = extraction.extract(folder, fetched)
        write_pairs(pairs_path, pairs)
        return [pairs_path], {"source": fetched.describe(), "counts": counts}

    with steps_in(output, extraction.MEGABYTES, "debian") as steps:
        pairs_path = output / "raw" / "all.tsv"
        limits = dataclasses.asdict(extraction.LIMITS)
        settings = {"version": __version__, "revision": extraction.REVISION, "limits": limits}
        extracted = steps.run("extract", settings, [], extract)
        present = apt.read_record(folder)
        if present is not None and present.describe() != extracted["source"]:
            raise UserError(
                f"{output} was made from other downloads than those in {folder}: name another "
                "folder with --output"
            )
        split = split_step(steps, pairs_path, languages, extraction.SPLIT)
        record = {
            "corpus": "debian",
            "revision": extraction.REVISION,
            "source": extracted["source"],
            "settings": {
                "vocab_size": vocab_size,
                "limits": limits,
                "split": extraction.SPLIT.describe(),
            },
            "extraction": extracted["counts"],
            "split": split["counts"],
            "domains": split["domains"],
            "held_out_documents": split["held_out_documents"],
            "leaks": split["leaks"],
            "copy_bleu_by_domain": split["copy_bleu_by_domain"],
        }
        return finish(steps, languages, vocab_size, record, split)
