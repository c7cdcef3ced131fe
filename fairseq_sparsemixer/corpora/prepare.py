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
from pathlib import Path
from typing import Any, Dict

from fairseq_sparsemixer.corpora.debian.preparation import DEBIAN_VOCAB_SIZE, prepare_debian
from fairseq_sparsemixer.corpora.flags import refuse
from fairseq_sparsemixer.corpora.homeassistant import extraction as homeassistant
from fairseq_sparsemixer.corpora.homeassistant.preparation import (
    DEFAULT_VOCAB_SIZE,
    prepare_homeassistant,
)
from fairseq_sparsemixer.corpora.own_text import prepare_raw_text
from fairseq_sparsemixer.corpora.wmt14 import extraction as wmt14
from fairseq_sparsemixer.corpora.wmt14.preparation import (
    NEWS_COMMENTARY,
    PIPELINES,
    WMT14_FLAGS,
    WMT14_MERGES,
    WMT14_VOCAB_SIZE,
    run_wmt14,
)
from fairseq_sparsemixer.errors import UserError

HELP = "build a corpus: download or take text, split, cut into pieces, fairseq-preprocess"


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
        print(summary(run_wmt14(args)))
        return
    refuse(args, WMT14_FLAGS, "go with the corpus wmt14 only")
    if args.corpus != "debian":
        refuse(args, ["downloads"], "go with the corpora debian and wmt14 only")
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
            refuse(args, ["wheel"], "go with the corpus homeassistant only")
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
