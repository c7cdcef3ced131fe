"""Build a translation corpus: text, SentencePiece pieces and fairseq's binary data.

  homeassistant   English-German user-interface messages (51 MB to download), split so that test
                  sentences have no near duplicate in the training text
  debian          142,000 pairs of Debian's packages in four domains (60 MB to download with apt),
                  split likewise
  wmt14           WMT14 English-German (more than 1 GB to download), test set newstest2014 (full)
  --raw-dir DIR   your own text: DIR/train.en, DIR/train.de and the same for valid and test, one
                  sentence a line, and perhaps {train,valid,test}.domain, a label a line; after
                  wmt14, cleaned and cut as that corpus is

The output folder holds

  raw/{train,valid,test}.{en,de}   text, one sentence a line
  raw/{train,valid,test}.domain    the domain of each line (debian)
  spm/ or bpe/                     how text is cut into pieces, and the same text in pieces
  bin/                             the data for fairseq-train
  copy/test.de                     the test set "translated" by the nearest training sentences
                                   (not for wmt14)
  record.json                      source, counts, scores, versions, settings

Every step is skipped when it is already done: after an interruption run the same command again.
"""

import argparse
import dataclasses
import importlib.metadata
from collections import Counter
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

from fairseq_sparsemixer import __version__
from fairseq_sparsemixer.corpora import bpe, splitting
from fairseq_sparsemixer.corpora.binarise import (
    SPLITS,
    Languages,
    count_lines,
    paths_of,
    raw_path,
)
from fairseq_sparsemixer.corpora.cleaning import Pair, clean
from fairseq_sparsemixer.corpora.debian import apt
from fairseq_sparsemixer.corpora.debian import sources as debian
from fairseq_sparsemixer.corpora.homeassistant import extraction as homeassistant
from fairseq_sparsemixer.corpora.homeassistant.wheels import check_given, obtain_wheel
from fairseq_sparsemixer.corpora.stages import (
    domain_path,
    moses_steps,
    read_pairs,
    sentencepiece_steps,
    steps_in,
    write_pairs,
    write_record,
)
from fairseq_sparsemixer.corpora.steps import StepResult, Steps, say
from fairseq_sparsemixer.corpora.wmt14 import extraction as wmt14
from fairseq_sparsemixer.corpora.wmt14.downloads import Checksums
from fairseq_sparsemixer.errors import UserError
from fairseq_sparsemixer.files import read_lines, report_full_disk, sha256_of, write_lines
from fairseq_sparsemixer.text import moses

HELP = "build a corpus: download or take text, split, cut into pieces, fairseq-preprocess"
DEFAULT_VOCAB_SIZE = 4000
DEBIAN_VOCAB_SIZE = 8000
WMT14_VOCAB_SIZE = 32_000
WMT14_MERGES = 32_764
"""Merge operations of the reference recipe."""
PIPELINES = ("sentencepiece", "moses")
NEWS_COMMENTARY = "v12"
WMT14_FOLDER = Path("data/wmt14_en_de")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``prepare``."""
    parser.add_argument(
        "corpus",
        nargs="?",
        choices=["homeassistant", "debian", "wmt14"],
        help="the corpus to build",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="folder of the corpus (default, for wmt14 only: data/wmt14_en_de, and with "
        "--pipeline moses data/wmt14_en_de_moses)",
    )
    parser.add_argument(
        "--vocab-size",
        type=int,
        metavar="N",
        help="size of the joint SentencePiece vocabulary "
        f"(default: {DEFAULT_VOCAB_SIZE}, for debian {DEBIAN_VOCAB_SIZE}, for wmt14 "
        f"{WMT14_VOCAB_SIZE})",
    )
    parser.add_argument(
        "--wheel",
        type=Path,
        metavar="FILE",
        help="homeassistant: use this copy of the download; no network",
    )
    parser.add_argument(
        "--downloads",
        type=Path,
        metavar="DIR",
        help="debian and wmt14: where downloads are kept (default: download in the folder of the "
        "corpus; for wmt14 without --output data/wmt14_en_de/download)",
    )
    parser.add_argument(
        "--raw-dir", type=Path, metavar="DIR", help="use your own text instead of a download"
    )
    parser.add_argument(
        "--source-lang", default="en", metavar="LANG", help="suffix of the sources in --raw-dir"
    )
    parser.add_argument(
        "--target-lang", default="de", metavar="LANG", help="suffix of the targets in --raw-dir"
    )
    group = parser.add_argument_group("wmt14")
    group.add_argument(
        "--pipeline",
        choices=PIPELINES,
        help="raw text in SentencePiece pieces, or Moses tokens in BPE pieces as in the reference "
        f"recipe (default: {PIPELINES[0]})",
    )
    group.add_argument(
        "--merges",
        type=int,
        metavar="N",
        help=f"joint BPE merges of --pipeline moses (default: {WMT14_MERGES})",
    )
    group.add_argument(
        "--news-commentary",
        choices=sorted(wmt14.NEWS_COMMENTARY),
        help=f"v12 as in the reference recipe, or v9 of 2014 (default: {NEWS_COMMENTARY})",
    )
    group.add_argument(
        "--checksums",
        type=Path,
        metavar="FILE",
        help="record of the archives' checksums: those in it are verified, others are added "
        "(default: checksums.json beside the archives)",
    )
    group.add_argument(
        "--mirror", metavar="URL", help="server in place of statmt.org's, with the same paths"
    )
    group.add_argument(
        "--workers", type=int, metavar="N", help="processes at most (default: the cores)"
    )


def run(args: argparse.Namespace) -> None:
    """Build the corpus that the flags ask for, and print a summary."""
    for flag, value in (("--vocab-size", args.vocab_size), ("--merges", args.merges)):
        if value is not None and value < 1:
            raise UserError(f"{flag} {value} makes no vocabulary; give 1 or more")
    if args.downloads is not None and args.downloads.exists() and not args.downloads.is_dir():
        raise UserError(f"--downloads {args.downloads} is not a folder")
    if args.corpus == "wmt14":
        print(summary(_run_wmt14(args)))
        return
    _refuse(args, _WMT14_FLAGS, "go with the corpus wmt14 only")
    if args.corpus != "debian":
        _refuse(args, ["downloads"], "go with the corpora debian and wmt14 only")
    if args.output is None:
        raise UserError("say where to with --output DIR")
    if args.raw_dir is None:
        if args.corpus is None:
            raise UserError(
                "say what to prepare: the name of a corpus (homeassistant, debian, wmt14) or "
                "--raw-dir"
            )
        if (args.source_lang, args.target_lang) != homeassistant.LANGUAGES:
            raise UserError("--source-lang and --target-lang only go with --raw-dir")
        if args.corpus == "debian":
            _refuse(args, ["wheel"], "go with the corpus homeassistant only")
            record = prepare_debian(
                args.output,
                vocab_size=args.vocab_size or DEBIAN_VOCAB_SIZE,
                downloads=args.downloads,
            )
        else:
            record = prepare_homeassistant(
                args.output, vocab_size=args.vocab_size or DEFAULT_VOCAB_SIZE, wheel=args.wheel
            )
    else:
        if args.corpus is not None or args.wheel is not None:
            raise UserError("--raw-dir replaces the download: leave out the corpus and --wheel")
        record = prepare_raw_text(
            args.output,
            args.raw_dir,
            source_lang=args.source_lang,
            target_lang=args.target_lang,
            vocab_size=args.vocab_size or DEFAULT_VOCAB_SIZE,
        )
    print(summary(record))


_ARCHIVE_FLAGS = ("news_commentary", "checksums", "mirror")
_WMT14_FLAGS = ("pipeline", "merges", *_ARCHIVE_FLAGS, "workers")


def _refuse(args: argparse.Namespace, names: Sequence[str], why: str) -> None:
    """Raise a :class:`UserError` where a flag is given that would have no effect."""
    for name in names:
        if getattr(args, name) is not None:
            raise UserError(f"--{name.replace('_', '-')}: such flags {why}; leave it out")


def _run_wmt14(args: argparse.Namespace) -> Dict[str, Any]:
    _refuse(args, ["wheel"], "go with the corpus homeassistant only")
    if args.raw_dir is not None:
        why = "belong to the archives, which --raw-dir replaces"
        _refuse(args, [*_ARCHIVE_FLAGS, "downloads"], why)
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
        _refuse(args, ["vocab_size"], "belong to --pipeline sentencepiece (moses has --merges)")
    else:
        _refuse(args, ["merges"], "belong to --pipeline moses")
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


def prepare_homeassistant(
    output: Path, *, vocab_size: int = DEFAULT_VOCAB_SIZE, wheel: Optional[Path] = None
) -> Dict[str, Any]:
    """Build the ``homeassistant`` corpus in ``output``; finished steps are skipped.

    Args:
        output: folder of the corpus; made if need be.
        vocab_size: size of the joint vocabulary, special symbols included.
        wheel: a copy of the download, used in place; by default pip fetches it.

    Returns:
        What is in ``record.json``.

    Raises:
        UserError: no network, a damaged file, no disk space, an unsuitable ``vocab_size``.
    """
    source = homeassistant.WHEEL
    languages = homeassistant.LANGUAGES
    if wheel is not None:
        check_given(source, wheel)

    def extract() -> StepResult:
        path = obtain_wheel(source, output / "download", wheel)
        extraction = homeassistant.extract(path)
        pairs, dropped = clean(extraction.pairs, homeassistant.LIMITS)
        write_pairs(pairs_path, pairs)
        return [pairs_path], {
            "messages": extraction.messages,
            "messages_dropped": extraction.dropped_messages,
            "segments": len(extraction.pairs),
            "segments_dropped": dropped,
            "pairs": len(pairs),
        }

    with steps_in(output, megabytes=150) as steps:
        pairs_path = output / "raw" / "all.tsv"
        settings = {
            "version": __version__,
            "sha256": source.sha256,
            "limits": dataclasses.asdict(homeassistant.LIMITS),
        }
        extraction = steps.run("extract", settings, [], extract)
        split = _split_step(steps, pairs_path, languages, homeassistant.SPLIT)
        record = {
            "corpus": "homeassistant",
            "source": {
                key: getattr(source, key)
                for key in ("name", "version", "file", "sha256", "licence")
            },
            "settings": {
                "vocab_size": vocab_size,
                "limits": dataclasses.asdict(homeassistant.LIMITS),
                "split": homeassistant.SPLIT.describe(),
            },
            "extraction": extraction,
            "split": split["counts"],
        }
        return _finish(steps, languages, vocab_size, record, split)


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
    languages = debian.LANGUAGES
    folder = downloads or output / "download"

    def extract() -> StepResult:
        with report_full_disk(folder, debian.MEGABYTES, "--downloads"):
            fetched = apt.obtain(folder, debian.REQUIRED, debian.OPTIONAL)
        pairs, counts = debian.extract(folder, fetched)
        write_pairs(pairs_path, pairs)
        return [pairs_path], {"source": fetched.describe(), "counts": counts}

    with steps_in(output, debian.MEGABYTES) as steps:
        pairs_path = output / "raw" / "all.tsv"
        limits = dataclasses.asdict(debian.LIMITS)
        settings = {"version": __version__, "revision": debian.REVISION, "limits": limits}
        extraction = steps.run("extract", settings, [], extract)
        present = apt.read_record(folder)
        if present is not None and present.describe() != extraction["source"]:
            raise UserError(
                f"{output} was made from other downloads than those in {folder}: name another "
                "folder with --output"
            )
        split = _split_step(steps, pairs_path, languages, debian.SPLIT)
        record = {
            "corpus": "debian",
            "revision": debian.REVISION,
            "source": extraction["source"],
            "settings": {
                "vocab_size": vocab_size,
                "limits": limits,
                "split": debian.SPLIT.describe(),
            },
            "extraction": extraction["counts"],
            "split": split["counts"],
            "domains": split["domains"],
            "held_out_documents": split["held_out_documents"],
            "leaks": split["leaks"],
            "copy_bleu_by_domain": split["copy_bleu_by_domain"],
        }
        return _finish(steps, languages, vocab_size, record, split)


def prepare_raw_text(
    output: Path,
    raw_dir: Path,
    *,
    source_lang: str = "en",
    target_lang: str = "de",
    vocab_size: int = DEFAULT_VOCAB_SIZE,
) -> Dict[str, Any]:
    """Build a corpus in ``output`` from ``raw_dir/{train,valid,test}.{source_lang,target_lang}``.

    The text is used as it is: nothing is cleaned, and near duplicates between the splits show in
    the copy score but are not removed. Files ``{train,valid,test}.domain``, where they are there,
    say of which domain each line is. Returns what is in ``record.json``.

    Raises:
        UserError: a file is missing, empty, not UTF-8, or not as long as its translation; no disk
            space; an unsuitable ``vocab_size``.
    """
    languages = (source_lang, target_lang)
    names = _check_raw_dir(raw_dir, output, languages)
    domain_names = _domain_names(raw_dir)
    names += domain_names
    megabytes = 1 + 4 * sum((raw_dir / name).stat().st_size for name in names) // 10**6

    def copy_text() -> StepResult:
        for split in SPLITS:
            texts = _read_parallel(raw_dir, split, languages)
            for language, lines in zip(languages, texts):
                write_lines(raw_path(output, split, language), lines)
        if not domain_names:
            return raw_paths, {}
        domains = {split: _read_domains(raw_dir, split, source_lang) for split in SPLITS}
        return [*raw_paths, *_write_domains(output, domains)], {"domains": _count(domains)}

    def score() -> StepResult:
        text = {
            split: [read_lines(raw_path(output, split, name)) for name in languages]
            for split in SPLITS
        }
        scores = {split: splitting.copy_score(*text["train"], *text[split]) for split in SPLITS[1:]}
        copy_path = _copy_path(output, languages)
        write_lines(copy_path, scores["test"].hypotheses)
        return [copy_path], {"copy_score": _describe(scores), "versions": _split_versions()}

    with steps_in(output, megabytes) as steps:
        raw_paths = paths_of(raw_path, output, languages)
        checksums = {name: sha256_of(raw_dir / name) for name in names}
        settings = {"version": __version__, "sha256": checksums}
        copied = steps.run("copy-text", settings, [], copy_text)
        scored = steps.run("copy-score", {"version": __version__}, raw_paths, score)
        record = {
            "corpus": "own text",
            "source": {"folder": str(raw_dir), "sha256": checksums},
            "settings": {"vocab_size": vocab_size},
            **copied,
        }
        return _finish(steps, languages, vocab_size, record, scored)


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
        names = _check_raw_dir(own, folder, wmt14.LANGUAGES)
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


def _check_raw_dir(raw_dir: Path, output: Path, languages: Languages) -> List[str]:
    """The names of the files that the user's text consists of; all are there."""
    if raw_dir.resolve() == (output / "raw").resolve():
        raise UserError(f"--raw-dir {raw_dir} is where --output {output} keeps its copy: move it")
    names = [f"{split}.{language}" for split in SPLITS for language in languages]
    for name in names:
        if not (raw_dir / name).is_file():
            raise UserError(f"--raw-dir {raw_dir}: there is no file {name}")
    return names


def _split_step(
    steps: Steps, pairs_path: Path, languages: Languages, settings: splitting.SplitSettings
) -> Dict[str, Any]:
    """Split the pairs of a file (see :func:`write_pairs`) into ``raw/``.

    Where they are of several domains, ``raw/`` also says of which, and the result how many are of
    each and how much each measure against leaks does.
    """
    folder = steps.folder

    def build() -> StepResult:
        pairs = read_pairs(pairs_path)
        unfiltered = splitting.hold_out(pairs, settings)
        split = splitting.remove_near_duplicates(unfiltered, settings.max_cosine)
        outputs = _write_split(folder, split, languages)
        parts = [getattr(split, name) for name in SPLITS[1:]]
        before = splitting.copies(unfiltered.train, parts)
        after = splitting.copies(split.train, parts)
        scores = dict(zip(SPLITS[1:], map(splitting.score_copies, after, parts)))
        described = _describe(scores)
        for name, copied, part in zip(SPLITS[1:], before, parts):
            described[name]["bleu_before_filter"] = splitting.score_copies(copied, part).bleu
        copy_path = _copy_path(folder, languages)
        write_lines(copy_path, scores["test"].hypotheses)
        result = {
            "counts": split.counts,
            "copy_score": described,
            "versions": _split_versions(),
        }
        if any(pair.domain for pair in pairs):
            domains = {name: [pair.domain for pair in getattr(split, name)] for name in SPLITS}
            outputs += _write_domains(folder, domains)
            result["domains"] = _count(domains)
            result["held_out_documents"] = {
                name: splitting.describe_documents(getattr(split, name)) for name in SPLITS[1:]
            }
            random = splitting.random_split(pairs, split, settings)
            measures = {
                "random": (splitting.copies(random.train, [random.test]), [random.test]),
                "documents": (before, parts),
                "documents_and_filter": (after, parts),
            }
            result["leaks"] = {
                name: splitting.describe_leak(*measured, settings.max_cosine)
                for name, measured in measures.items()
            }
            result["copy_bleu_by_domain"] = splitting.bleu_by_domain(after[1], split.test)
        return [*outputs, copy_path], result

    made_with = {"version": __version__, **settings.describe()}
    return steps.run("split", made_with, [pairs_path], build)


def _write_split(folder: Path, split: splitting.Split, languages: Languages) -> List[Path]:
    outputs = []
    for name in SPLITS:
        pairs: Sequence[Pair] = getattr(split, name)
        for side, language in enumerate(languages):
            path = raw_path(folder, name, language)
            write_lines(path, (pair[side] for pair in pairs))
            outputs.append(path)
    return outputs


def _write_domains(folder: Path, domains: Dict[str, List[str]]) -> List[Path]:
    """Write the domains of each split's lines; the paths."""
    outputs = [domain_path(folder, split) for split in SPLITS]
    for split, path in zip(SPLITS, outputs):
        write_lines(path, domains[split])
    return outputs


def _count(domains: Dict[str, List[str]]) -> Dict[str, Dict[str, int]]:
    """How many lines of each split are of each domain."""
    return {split: dict(sorted(Counter(labels).items())) for split, labels in domains.items()}


def _describe(scores: Dict[str, splitting.CopyScore]) -> Dict[str, Dict[str, Any]]:
    return {
        name: {"bleu": score.bleu, "signature": score.signature} for name, score in scores.items()
    }


def _copy_path(folder: Path, languages: Languages) -> Path:
    return folder / "copy" / f"test.{languages[1]}"


def _split_versions() -> Dict[str, str]:
    import sacrebleu
    import sklearn

    return {"sacrebleu": sacrebleu.__version__, "scikit-learn": sklearn.__version__}


def _read_parallel(raw_dir: Path, split: str, languages: Languages) -> List[List[str]]:
    paths = [raw_dir / f"{split}.{language}" for language in languages]
    texts = [read_lines(path) for path in paths]
    for path, lines in zip(paths, texts):
        if not any(line.strip() for line in lines):
            raise UserError(f"{path} holds no text")
    if len(texts[0]) != len(texts[1]):
        raise UserError(
            f"{paths[0]} has {len(texts[0])} lines and {paths[1]} has {len(texts[1])}: "
            "line N of one must translate line N of the other"
        )
    return texts


def _domain_names(raw_dir: Path) -> List[str]:
    """The names of the files that say of which domain the user's text is: three or none."""
    names = [f"{split}.domain" for split in SPLITS]
    missing = [name for name in names if not (raw_dir / name).is_file()]
    if 0 < len(missing) < len(names):
        raise UserError(
            f"--raw-dir {raw_dir}: there is no file {missing[0]}; give the domains of all three "
            "splits or of none"
        )
    return [] if missing else names


def _read_domains(raw_dir: Path, split: str, source_lang: str) -> List[str]:
    domains, text = raw_dir / f"{split}.domain", raw_dir / f"{split}.{source_lang}"
    labels = read_lines(domains)
    if len(labels) != (lines := count_lines(text)):
        raise UserError(
            f"{domains} has {len(labels)} lines and {text} has {lines}: line N of one must name "
            "the domain of line N of the other"
        )
    blank = next((number for number, label in enumerate(labels, 1) if not label.strip()), None)
    if blank is not None:
        raise UserError(f"{domains}, line {blank}: the line names no domain")
    return [label.strip() for label in labels]


def _finish(
    steps: Steps,
    languages: Languages,
    vocab_size: int,
    record: Dict[str, Any],
    scored: Dict[str, Any],
) -> Dict[str, Any]:
    """From ``raw/`` to ``bin/`` and ``record.json``."""
    cut = sentencepiece_steps(steps, languages, vocab_size)
    cut["versions"] = {**scored["versions"], **cut["versions"]}
    return write_record(steps, languages, {**record, "copy_score": scored["copy_score"]}, cut)


def summary(record: Dict[str, Any]) -> str:
    """A short table of a record: sizes, unknown pieces and copy scores of the splits."""
    source, target = record["languages"]
    rows = [["", "sentences", f"pieces {source}", f"pieces {target}", "<unk>", "copy BLEU"]]
    for split, counts in record["splits"].items():
        sides = [counts[source], counts[target]]
        score = record.get("copy_score", {}).get(split)
        rows.append(
            [
                split,
                f"{sides[0]['sentences']:,}",
                *(f"{side['pieces']:,}" for side in sides),
                f"{sum(side['unknown'] for side in sides):,}",
                f"{score['bleu']:.1f}" if score else "-",
            ]
        )
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in rows]
    if "copy_score" in record:
        lines.append(
            "copy BLEU: what copying the most similar training sentence's translation scores "
            f"({record['copy_score']['test']['signature']})"
        )
    if "leaks" in record:
        for name, leak in record["leaks"].items():
            lines.append(
                f"split ({name.replace('_', ' ')}): copy BLEU {leak['bleu']:.1f}, "
                f"{100 * leak['near']:.1f} % of the held-out text has a near duplicate in training"
            )
    if "cleaning" in record:
        for name, counts in (("raw text", record["raw"]), ("cleaning", record["cleaning"])):
            reasons = ", ".join(f"{n:,} {reason}" for reason, n in counts["dropped"].items())
            lines.append(f"{name}: dropped {reasons or 'nothing'}")
        lines.append(
            f"{record['raw']['held_out_sources']:,} sources of the raw training text are also in "
            "the validation or test text; none was dropped for that"
        )
    return "\n".join(lines)
