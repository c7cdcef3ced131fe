"""The corpus ``wmt14``, from the archives to ``bin/``."""

from pathlib import Path
from typing import Any, Dict, Optional, Tuple

from fairseq_sparsemixer.corpora import bpe
from fairseq_sparsemixer.corpora.downloads import DEFAULT_SHELF, ShelfChoice
from fairseq_sparsemixer.corpora.folder import paths_of, raw_path, steps_in
from fairseq_sparsemixer.corpora.own_text import check_raw_dir
from fairseq_sparsemixer.corpora.resumable import Steps
from fairseq_sparsemixer.corpora.text_to_binary import (
    moses_steps,
    sentencepiece_steps,
    write_record,
)
from fairseq_sparsemixer.corpora.wmt14 import extraction, filtering
from fairseq_sparsemixer.corpora.wmt14.extraction import LANGUAGES
from fairseq_sparsemixer.errors import UserError
from fairseq_sparsemixer.files import sha256_of
from fairseq_sparsemixer.version import __version__

PIPELINES = ("sentencepiece", "moses")
WMT14_VOCAB_SIZE = 32_000
WMT14_MERGES = 32_764
"""Merge operations of the reference recipe."""
DEFAULT_NEWS_COMMENTARY = "v12"
CHARACTER_COVERAGE = 0.9999
"""Of the characters. Common Crawl has some of every script; each would cost a piece."""
MEGABYTES = 10_000
"""Of disk for one pipeline, archives included; see docs/wmt14.md."""
_MADE_WITH = {"version": __version__}


def prepare_wmt14(
    output: Path,
    *,
    pipeline: str = "sentencepiece",
    vocab_size: int = WMT14_VOCAB_SIZE,
    merges: int = WMT14_MERGES,
    news_commentary: str = DEFAULT_NEWS_COMMENTARY,
    raw_dir: Optional[Path] = None,
    archives: ShelfChoice = DEFAULT_SHELF,
    workers: Optional[int] = None,
) -> Dict[str, Any]:
    """Build WMT14 English-German in ``output``; finished steps are skipped.

    Args:
        output: folder of the corpus; made if need be. The two pipelines take two folders.
        pipeline: ``"sentencepiece"`` or ``"moses"``.
        vocab_size: of the pipeline ``sentencepiece``.
        merges: of the pipeline ``moses``.
        news_commentary: ``"v12"`` or ``"v9"``.
        raw_dir: the user's own text in place of the archives.
        archives: where they are kept, and come from.
        workers: processes at most (default: the cores).

    Returns:
        What is in ``record.json``.

    Raises:
        UserError: see :func:`.extraction.extract`; no disk space; an unsuitable ``vocab_size``; a
            package of the pipeline ``moses`` is missing.
    """
    if pipeline == "moses":
        # Missing packages are told before an hour of downloading.
        bpe.check_installed()
    _check_pipeline(output, pipeline)
    corpus = "wmt14" if raw_dir is None else "own text, as wmt14"
    with steps_in(output, MEGABYTES, corpus) as steps:
        raw = _raw_text(steps, news_commentary, raw_dir, archives)
        if pipeline == "moses":
            cleaning, cut = _cut_by_moses(steps, merges, workers)
        else:
            cleaning, cut = _cut_by_sentencepiece(steps, vocab_size, workers)
        own_text = {"folder": str(raw_dir)}
        record = {
            "corpus": corpus,
            "pipeline": pipeline,
            "source": raw.pop("archives", own_text),
            "test": raw.pop("test"),
            "settings": {
                "news_commentary": None if raw_dir else news_commentary,
                **({"merges": merges} if pipeline == "moses" else {"vocab_size": vocab_size}),
                "max_tokens": filtering.MAX_TOKENS,
                "max_length_ratio": filtering.MAX_LENGTH_RATIO,
            },
            "raw": raw,
            "cleaning": cleaning,
        }
        return write_record(steps, LANGUAGES, record, cut)


def _check_pipeline(output: Path, pipeline: str) -> None:
    """Refuse a folder that holds the work of the other pipeline."""
    (other,) = set(PIPELINES) - {pipeline}
    marks = {"sentencepiece": "clean", "moses": "tokenise"}
    if (output / ".steps" / f"{marks[other]}.json").exists():
        raise UserError(
            f"{output} was made by --pipeline {other}: name another folder with --output"
        )


def _raw_text(
    steps: Steps,
    news_commentary: str,
    raw_dir: Optional[Path],
    archives: ShelfChoice,
) -> Dict[str, Any]:
    """The step that writes ``raw/``, and what it says of it."""
    folder = steps.folder
    if raw_dir is not None:
        own = raw_dir
        names = check_raw_dir(own, folder, LANGUAGES)
        checksums_of_text = {name: sha256_of(own / name) for name in names}
        settings = {"version": __version__, "sha256": checksums_of_text}
        return steps.run("copy-text", settings, [], lambda: extraction.copy_text(folder, own))
    shelf = archives.shelf(folder)
    settings = {"version": __version__, "news_commentary": news_commentary}
    raw = steps.run(
        "extract",
        settings,
        [],
        lambda: extraction.extract(folder, shelf, news_commentary),
    )
    shelf.check_made_from(raw["archives"], folder)
    return raw


def _cut_by_sentencepiece(
    steps: Steps, vocab_size: int, workers: Optional[int]
) -> Tuple[Dict[str, Any], Dict[str, Any]]:
    """From ``raw/`` to ``bin/``: what the steps say of the cleaning and of the pieces."""
    cleaning = steps.run(
        "clean",
        _MADE_WITH,
        paths_of(raw_path, steps.folder, LANGUAGES)[:2],
        lambda: filtering.clean_text(steps.folder, workers),
    )
    cut = sentencepiece_steps(
        steps, [LANGUAGES], vocab_size, filtering.clean_path, CHARACTER_COVERAGE, workers
    )
    return cleaning, cut


def _cut_by_moses(
    steps: Steps, merges: int, workers: Optional[int]
) -> Tuple[Dict[str, Any], Dict[str, Any]]:
    """From ``raw/`` to ``bin/``, likewise."""
    cleaning = steps.run(
        "tokenise",
        _MADE_WITH,
        paths_of(raw_path, steps.folder, LANGUAGES),
        lambda: filtering.tokenise(steps.folder, workers),
    )
    return cleaning, moses_steps(steps, LANGUAGES, merges, workers)
