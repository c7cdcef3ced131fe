"""The corpus ``debian``, from packages to ``bin/``."""

import dataclasses
from pathlib import Path
from typing import Any, Dict, Optional, Sequence

from fairseq_sparsemixer.corpora.debian import apt, extraction
from fairseq_sparsemixer.corpora.folder import sides_of, steps_in, write_pairs
from fairseq_sparsemixer.corpora.resumable import StepResult
from fairseq_sparsemixer.corpora.split_step import split_languages_step, split_step
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
    languages: Sequence[str] = (),
) -> Dict[str, Any]:
    """Build the ``debian`` corpus in ``output``; finished steps are skipped.

    Args:
        output: folder of the corpus; made if need be.
        vocab_size: size of the joint vocabulary, special symbols included.
        downloads: where packages and indices are or will be (default: ``output/download``).
        languages: translate English into each of these, in package descriptions alone (the other
            texts are there in German only).

    Returns:
        What is in ``record.json``.

    Raises:
        UserError: see :func:`.apt.obtain`; no disk space; an unsuitable ``vocab_size``; the corpus
            in ``output`` was made from other downloads.
    """
    pairs = [extraction.pair_of(language) for language in languages]
    packages = ((), ()) if pairs else (extraction.REQUIRED, extraction.OPTIONAL)
    translations = languages or extraction.LANGUAGES[1:]
    split_settings = extraction.LANGUAGES_SPLIT if pairs else extraction.SPLIT
    corpus = "debian-languages" if pairs else "debian"
    folder = downloads or output / "download"

    def extract() -> StepResult:
        with report_full_disk(folder, extraction.MEGABYTES, "--downloads"):
            fetched = apt.obtain(folder, *packages, translations)
        texts, counts = extraction.extract(folder, fetched, languages)
        write_pairs(pairs_path, texts)
        return [pairs_path], {"source": fetched.describe(), "counts": counts}

    with steps_in(output, extraction.MEGABYTES, corpus) as steps:
        pairs_path = output / "raw" / "all.tsv"
        limits = dataclasses.asdict(extraction.LIMITS)
        settings = {"version": __version__, "revision": extraction.REVISION, "limits": limits}
        if pairs:
            settings["pairs"] = pairs
        extracted = steps.run("extract", settings, [], extract)
        present = apt.read_record(folder)
        names = [*packages[0], *packages[1]]
        if present is not None and (
            present.only(names, translations).describe() != extracted["source"]
        ):
            raise UserError(
                f"{output} was made from other downloads than those in {folder}: name another "
                "folder with --output"
            )
        if pairs:
            split = split_languages_step(steps, pairs_path, pairs, split_settings)
        else:
            split = split_step(steps, pairs_path, extraction.LANGUAGES, split_settings)
        measured = ("domains", "held_out_documents", "leaks", "copy_bleu_by_domain")
        record = {
            "corpus": corpus,
            "revision": extraction.REVISION,
            "source": extracted["source"],
            "settings": {
                "vocab_size": vocab_size,
                "limits": limits,
                "split": split_settings.describe(),
            },
            "extraction": extracted["counts"],
            "split": split["counts"],
            **{name: split[name] for name in measured if name in split},
        }
        if not pairs:
            return finish(steps, extraction.LANGUAGES, vocab_size, record, split)
        record["pairs"] = pairs
        every = [extraction.SOURCE, *languages]
        sides = [sides_of(pair) for pair in pairs]
        return finish(steps, every, vocab_size, record, split, sides)
