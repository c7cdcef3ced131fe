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

from fairseq_sparsemixer.corpora.debian.preparation import DEBIAN_VOCAB_SIZE
from fairseq_sparsemixer.corpora.homeassistant.preparation import DEFAULT_VOCAB_SIZE
from fairseq_sparsemixer.corpora.wmt14 import extraction as wmt14
from fairseq_sparsemixer.corpora.wmt14.preparation import (
    NEWS_COMMENTARY,
    PIPELINES,
    WMT14_MERGES,
    WMT14_VOCAB_SIZE,
)

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
    """Do it."""
    from fairseq_sparsemixer.corpora import prepare

    prepare.run(args)
