"""Build a translation corpus: text, SentencePiece pieces and fairseq's binary data.

  homeassistant   English-German user-interface messages (51 MB to download), split so that test
                  sentences have no near duplicate in the training text
  debian          142,000 pairs of Debian's packages in four domains (60 MB to download with apt),
                  split likewise
  wmt14           WMT14 English-German (more than 1 GB to download), test set newstest2014 (full)
  iwslt14         IWSLT14 German-English, 160,000 pairs of talks (19 MB to download), cleaned, split
                  and cut as by fairseq's own example
  glue            tasks to fine-tune a pre-trained model on, cut into the pieces of the corpus
                  --vocabulary, on which it was pre-trained; of another layout, see
                  docs/pretraining.md
  --raw-dir DIR   your own text: DIR/train.en, DIR/train.de and the same for valid and test, one
                  sentence a line, and perhaps {train,valid,test}.domain, a label a line; after
                  wmt14, cleaned and cut as that corpus is

The output folder holds

  raw/{train,valid,test}.{en,de}   text, one sentence a line
  raw/{train,valid,test}.domain    the domain of each line (debian)
  spm/ or bpe/                     how text is cut into pieces, and the same text in pieces
  bin/                             the data for fairseq-train
  copy/test.de                     the test set "translated" by the nearest training sentences
                                   (not for wmt14 and iwslt14)
  record.json                      source, counts, scores, versions, settings

Every step is skipped when it is already done: after an interruption run the same command again.
"""

import argparse
from pathlib import Path
from typing import Any, Dict

from fairseq_sparsemixer.commands.flags import refuse_without_effect, whole_number
from fairseq_sparsemixer.corpora.debian.preparation import DEBIAN_VOCAB_SIZE, prepare_debian
from fairseq_sparsemixer.corpora.downloads import ShelfChoice
from fairseq_sparsemixer.corpora.glue import TASKS as GLUE_TASKS
from fairseq_sparsemixer.corpora.glue import prepare_glue
from fairseq_sparsemixer.corpora.homeassistant.preparation import prepare_homeassistant
from fairseq_sparsemixer.corpora.iwslt14 import IWSLT14_MERGES, prepare_iwslt14
from fairseq_sparsemixer.corpora.own_text import prepare_raw_text
from fairseq_sparsemixer.corpora.resumable import say
from fairseq_sparsemixer.corpora.summary import summary
from fairseq_sparsemixer.corpora.text_to_binary import DEFAULT_VOCAB_SIZE
from fairseq_sparsemixer.corpora.wmt14.extraction import NEWS_COMMENTARY
from fairseq_sparsemixer.corpora.wmt14.preparation import (
    DEFAULT_NEWS_COMMENTARY,
    PIPELINES,
    WMT14_MERGES,
    WMT14_VOCAB_SIZE,
    prepare_wmt14,
)
from fairseq_sparsemixer.errors import UserError

HELP = "build a corpus: download or take text, split, cut into pieces, fairseq-preprocess"

_LANGUAGES = ("en", "de")
_WMT14_FOLDER = Path("data/wmt14_en_de")
_SERVER_FLAGS = ("checksums", "mirror")
_TAKEN_BY = {
    **dict.fromkeys(("pipeline", "news_commentary"), ("wmt14",)),
    **dict.fromkeys(("merges", "workers"), ("wmt14", "iwslt14")),
    **dict.fromkeys(_SERVER_FLAGS, ("wmt14", "iwslt14", "glue")),
    **dict.fromkeys(("vocabulary", "tasks"), ("glue",)),
    "downloads": ("debian", "wmt14", "iwslt14", "glue"),
    "wheel": ("homeassistant",),
}
"""The corpora that a flag goes with, if not with all."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``prepare``."""
    parser.add_argument(
        "corpus",
        nargs="?",
        choices=list(_DOORS),
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
        type=whole_number,
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
        help="debian, wmt14, iwslt14, glue: where downloads are kept (default: download in the "
        "folder of the corpus; for wmt14 without --output data/wmt14_en_de/download)",
    )
    _add_own_text_arguments(parser)
    _add_wmt14_arguments(parser.add_argument_group("wmt14"))
    _add_server_arguments(parser.add_argument_group("wmt14, iwslt14 and glue"))
    _add_glue_arguments(parser.add_argument_group("glue"))


def _add_own_text_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--raw-dir", type=Path, metavar="DIR", help="use your own text instead of a download"
    )
    for side, language in zip(("source", "target"), _LANGUAGES):
        parser.add_argument(
            f"--{side}-lang",
            default=language,
            metavar="LANG",
            help=f"suffix of the {side}s in --raw-dir",
        )


def _add_wmt14_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--pipeline",
        choices=PIPELINES,
        help="raw text in SentencePiece pieces, or Moses tokens in BPE pieces as in the reference "
        f"recipe (default: {PIPELINES[0]})",
    )
    group.add_argument(
        "--news-commentary",
        choices=sorted(NEWS_COMMENTARY),
        help=f"v12 as in the reference recipe, or v9 of 2014 (default: {DEFAULT_NEWS_COMMENTARY})",
    )


def _add_server_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--merges",
        type=whole_number,
        metavar="N",
        help=f"joint BPE merges of iwslt14 (default: {IWSLT14_MERGES}), and of wmt14's "
        f"--pipeline moses (default: {WMT14_MERGES})",
    )
    group.add_argument(
        "--checksums",
        type=Path,
        metavar="FILE",
        help="record of the archives' checksums: those in it are verified, others are added "
        "(default: checksums.json beside the archives)",
    )
    group.add_argument(
        "--mirror", metavar="URL", help="server in place of the published one, with the same paths"
    )
    group.add_argument(
        "--workers", type=whole_number, metavar="N", help="processes at most (default: the cores)"
    )


def _add_glue_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--vocabulary", type=Path, metavar="CORPUS", help="folder of the corpus whose pieces to use"
    )
    group.add_argument(
        "--tasks", metavar="TASK,...", help=f"some of {','.join(GLUE_TASKS)} (default: all)"
    )


def run(args: argparse.Namespace) -> None:
    """Build the corpus that the flags ask for, and print a summary.

    Raises:
        UserError: flags that do not go together, and what the corpus raises.
    """
    for flag, value in (("--vocab-size", args.vocab_size), ("--merges", args.merges)):
        if value is not None and value < 1:
            raise UserError(f"{flag} {value} makes no vocabulary; give 1 or more")
    if args.downloads is not None and args.downloads.exists() and not args.downloads.is_dir():
        raise UserError(f"--downloads {args.downloads} is not a folder")
    own_text = args.raw_dir is not None and args.corpus != "wmt14"
    if own_text and (args.corpus is not None or args.wheel is not None):
        raise UserError("--raw-dir replaces the download: leave out the corpus and --wheel")
    for flag, corpora in _TAKEN_BY.items():
        if args.corpus not in corpora:
            plural = "corpora" if len(corpora) > 1 else "corpus"
            why = f"go with the {plural} {', '.join(corpora)} only"
            refuse_without_effect(args, [flag], why)
    if args.output is None and args.corpus != "wmt14":
        raise UserError("say where to with --output DIR")
    if args.corpus is None and not own_text:
        raise UserError(
            f"say what to prepare: the name of a corpus ({', '.join(_DOORS)}) or --raw-dir"
        )
    print(summary(_own_text(args) if own_text else _DOORS[args.corpus](args)))


def _own_text(args: argparse.Namespace) -> Dict[str, Any]:
    return prepare_raw_text(
        args.output,
        args.raw_dir,
        source_lang=args.source_lang,
        target_lang=args.target_lang,
        vocab_size=args.vocab_size or DEFAULT_VOCAB_SIZE,
    )


def _check_languages(args: argparse.Namespace) -> None:
    if (args.source_lang, args.target_lang) != _LANGUAGES:
        raise UserError("--source-lang and --target-lang only go with --raw-dir")


def _homeassistant(args: argparse.Namespace) -> Dict[str, Any]:
    _check_languages(args)
    return prepare_homeassistant(
        args.output, vocab_size=args.vocab_size or DEFAULT_VOCAB_SIZE, wheel=args.wheel
    )


def _debian(args: argparse.Namespace) -> Dict[str, Any]:
    _check_languages(args)
    return prepare_debian(
        args.output, vocab_size=args.vocab_size or DEBIAN_VOCAB_SIZE, downloads=args.downloads
    )


def _wmt14(args: argparse.Namespace) -> Dict[str, Any]:
    if args.raw_dir is not None:
        why = "belong to the archives, which --raw-dir replaces"
        refuse_without_effect(args, ["news_commentary", *_SERVER_FLAGS, "downloads"], why)
    if (args.source_lang, args.target_lang) != _LANGUAGES:
        raise UserError("wmt14 is English-German: leave out --source-lang and --target-lang")
    _check_server_flags(args)
    pipeline = args.pipeline or PIPELINES[0]
    if pipeline == "moses":
        why = "belong to --pipeline sentencepiece (moses has --merges)"
        refuse_without_effect(args, ["vocab_size"], why)
    else:
        refuse_without_effect(args, ["merges"], "belong to --pipeline moses")
    output, downloads = args.output, args.downloads
    if output is None:
        output = _WMT14_FOLDER
        downloads = downloads or _WMT14_FOLDER / "download"
        if pipeline == "moses":
            output = output.with_name(f"{output.name}_moses")
    return prepare_wmt14(
        output,
        pipeline=pipeline,
        vocab_size=args.vocab_size or WMT14_VOCAB_SIZE,
        merges=args.merges or WMT14_MERGES,
        news_commentary=args.news_commentary or DEFAULT_NEWS_COMMENTARY,
        raw_dir=args.raw_dir,
        archives=ShelfChoice(downloads, args.checksums, args.mirror),
        workers=args.workers,
    )


def _check_server_flags(args: argparse.Namespace) -> None:
    if args.workers is not None and args.workers < 1:
        raise UserError(f"--workers {args.workers} does nothing; give 1 or more")
    if args.mirror is not None and not args.mirror.startswith(("http://", "https://")):
        raise UserError(f"--mirror {args.mirror} is no address; give http://... or https://...")
    if args.checksums is not None and not args.checksums.exists():
        say(f"{args.checksums} is not there yet: checksums will be recorded in it, not verified")


def _iwslt14(args: argparse.Namespace) -> Dict[str, Any]:
    _check_languages(args)
    why = "belong to SentencePiece (iwslt14 has --merges)"
    refuse_without_effect(args, ["vocab_size"], why)
    _check_server_flags(args)
    return prepare_iwslt14(
        args.output,
        merges=args.merges or IWSLT14_MERGES,
        archives=ShelfChoice(args.downloads, args.checksums, args.mirror),
        workers=args.workers,
    )


def _glue(args: argparse.Namespace) -> Dict[str, Any]:
    _check_languages(args)
    refuse_without_effect(args, ["vocab_size"], "belong to corpora with pieces of their own")
    _check_server_flags(args)
    if args.vocabulary is None:
        raise UserError("say with --vocabulary which corpus the model was pre-trained on")
    return prepare_glue(
        args.output,
        args.vocabulary,
        tasks=list(GLUE_TASKS) if args.tasks is None else args.tasks.split(","),
        archives=ShelfChoice(args.downloads, args.checksums, args.mirror),
    )


_DOORS = {
    "homeassistant": _homeassistant,
    "debian": _debian,
    "wmt14": _wmt14,
    "iwslt14": _iwslt14,
    "glue": _glue,
}
"""What prepares each corpus."""
