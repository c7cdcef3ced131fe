"""The corpus ``wmt14``, from the archives to ``bin/``."""

import argparse
import importlib.metadata
from pathlib import Path
from typing import Any, Dict, Optional

from fairseq_sparsemixer.corpora import bpe
from fairseq_sparsemixer.corpora.binarise import (
    paths_of,
    raw_path,
)
from fairseq_sparsemixer.corpora.flags import refuse
from fairseq_sparsemixer.corpora.own_text import check_raw_dir
from fairseq_sparsemixer.corpora.resumable import Steps, say
from fairseq_sparsemixer.corpora.text_to_binary import (
    moses_steps,
    sentencepiece_steps,
    steps_in,
    write_record,
)
from fairseq_sparsemixer.corpora.wmt14 import extraction as wmt14
from fairseq_sparsemixer.corpora.wmt14.downloads import Checksums
from fairseq_sparsemixer.errors import UserError
from fairseq_sparsemixer.files import sha256_of
from fairseq_sparsemixer.text import moses
from fairseq_sparsemixer.version import __version__

WMT14_VOCAB_SIZE = 32_000
WMT14_MERGES = 32_764
"""Merge operations of the reference recipe."""
PIPELINES = ("sentencepiece", "moses")
NEWS_COMMENTARY = "v12"
WMT14_FOLDER = Path("data/wmt14_en_de")
_ARCHIVE_FLAGS = ("news_commentary", "checksums", "mirror")
WMT14_FLAGS = ("pipeline", "merges", *_ARCHIVE_FLAGS, "workers")


def run_wmt14(args: argparse.Namespace) -> Dict[str, Any]:
    """Check the flags of ``prepare`` for this corpus, and build it."""
    refuse(args, ["wheel"], "go with the corpus homeassistant only")
    if args.raw_dir is not None:
        why = "belong to the archives, which --raw-dir replaces"
        refuse(args, [*_ARCHIVE_FLAGS, "downloads"], why)
    if (args.source_lang, args.target_lang) != wmt14.LANGUAGES:
        raise UserError("wmt14 is English-German: leave out --source-lang and --target-lang")
    if args.workers is not None and args.workers < 1:
        raise UserError(f"--workers {args.workers} does nothing; give 1 or more")
    if args.mirror is not None and not args.mirror.startswith(("http://", "https://")):
        raise UserError(f"--mirror {args.mirror} is no address; give http://... or https://...")
    if args.checksums is not None and not args.checksums.exists():
        say(f"{args.checksums} is not there yet: checksums will be recorded in it, not verified")
    pipeline = args.pipeline or PIPELINES[0]
    output, downloads = args.output, args.downloads
    if pipeline == "moses":
        refuse(args, ["vocab_size"], "belong to --pipeline sentencepiece (moses has --merges)")
    else:
        refuse(args, ["merges"], "belong to --pipeline moses")
    if output is None:
        output = WMT14_FOLDER
        downloads = downloads or WMT14_FOLDER / "download"
        if pipeline == "moses":
            output = output.with_name(f"{output.name}_moses")
    return prepare_wmt14(
        output,
        pipeline=pipeline,
        vocab_size=args.vocab_size or WMT14_VOCAB_SIZE,
        merges=args.merges or WMT14_MERGES,
        news_commentary=args.news_commentary or NEWS_COMMENTARY,
        raw_dir=args.raw_dir,
        downloads=downloads,
        checksums=args.checksums,
        mirror=args.mirror,
        workers=args.workers,
    )


def prepare_wmt14(
    output: Path,
    *,
    pipeline: str = "sentencepiece",
    vocab_size: int = WMT14_VOCAB_SIZE,
    merges: int = WMT14_MERGES,
    news_commentary: str = NEWS_COMMENTARY,
    raw_dir: Optional[Path] = None,
    downloads: Optional[Path] = None,
    checksums: Optional[Path] = None,
    mirror: Optional[str] = None,
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
        downloads, checksums, mirror: see :func:`.downloads.obtain`.
        workers: processes at most (default: the cores).

    Returns:
        What is in ``record.json``.

    Raises:
        UserError: see :func:`.wmt14.extract`; no disk space; an unsuitable ``vocab_size``; a
            package of the pipeline ``moses`` is missing.
    """
    languages = wmt14.LANGUAGES
    raw_paths = paths_of(raw_path, output, languages)
    if pipeline == "moses":
        # Missing packages are told before an hour of downloading.
        moses.tokenise("", languages[0])
        bpe.check_installed()
    _check_wmt14_folder(output, pipeline, raw_dir)
    with steps_in(output, WMT14_MEGABYTES) as steps:
        raw = _wmt14_text(steps, news_commentary, raw_dir, downloads, checksums, mirror)
        made_with = {"version": __version__}
        if pipeline == "moses":
            cleaning = steps.run(
                "tokenise", made_with, raw_paths, lambda: wmt14.tokenise(output, workers)
            )
            cut = moses_steps(steps, languages, merges, workers)
            cut["versions"]["sacremoses"] = importlib.metadata.version("sacremoses")
        else:
            cleaning = steps.run(
                "clean", made_with, raw_paths[:2], lambda: wmt14.clean_text(output, workers)
            )
            cut = sentencepiece_steps(
                steps,
                languages,
                vocab_size,
                wmt14.clean_path,
                WMT14_COVERAGE,
                workers,
            )
        own_text = {"folder": str(raw_dir)}
        record = {
            "corpus": "wmt14" if raw_dir is None else "own text",
            "pipeline": pipeline,
            "source": raw.pop("archives", own_text),
            "test": raw.pop("test"),
            "settings": {
                "news_commentary": None if raw_dir else news_commentary,
                **({"merges": merges} if pipeline == "moses" else {"vocab_size": vocab_size}),
                "max_tokens": wmt14.MAX_TOKENS,
                "max_length_ratio": wmt14.MAX_LENGTH_RATIO,
            },
            "raw": raw,
            "cleaning": cleaning,
        }
        return write_record(steps, languages, record, cut)


def _check_wmt14_folder(output: Path, pipeline: str, raw_dir: Optional[Path]) -> None:
    """Refuse a folder that holds the work of the other pipeline, or of another text."""
    (other,) = set(PIPELINES) - {pipeline}
    marks = {"sentencepiece": "clean", "moses": "tokenise"}
    if (output / ".steps" / f"{marks[other]}.json").exists():
        raise UserError(
            f"{output} was made by --pipeline {other}: name another folder with --output"
        )
    other_step, text = (
        ("copy-text", "--raw-dir") if raw_dir is None else ("extract", "the archives")
    )
    if (output / ".steps" / f"{other_step}.json").exists():
        raise UserError(f"{output} was made from {text}: name another folder with --output")


WMT14_MEGABYTES = 10_000
"""Of disk for one pipeline, archives included; see docs/wmt14.md."""
WMT14_COVERAGE = 0.9999
"""Of the characters. Common Crawl has some of every script; each would cost a piece."""


def _wmt14_text(
    steps: Steps,
    news_commentary: str,
    raw_dir: Optional[Path],
    downloads: Optional[Path],
    checksums: Optional[Path],
    mirror: Optional[str],
) -> Dict[str, Any]:
    """The step that writes ``raw/``, and what it says of it."""
    folder = steps.folder
    if raw_dir is not None:
        own = raw_dir
        names = check_raw_dir(own, folder, wmt14.LANGUAGES)
        checksums_of_text = {name: sha256_of(own / name) for name in names}
        settings = {"version": __version__, "sha256": checksums_of_text}
        return steps.run("copy-text", settings, [], lambda: wmt14.copy_text(folder, own))
    downloads = downloads or folder / "download"
    record = Checksums(checksums or downloads / "checksums.json")
    settings = {"version": __version__, "news_commentary": news_commentary}
    raw = steps.run(
        "extract",
        settings,
        [],
        lambda: wmt14.extract(folder, downloads, record, mirror, news_commentary),
    )
    for name, entry in raw["archives"].items():
        if record.expected(name) not in (None, entry["sha256"]):
            raise UserError(
                f"{folder} was made from another {name} than {record.path} asks for: name "
                "another folder with --output"
            )
    return raw
