"""Translate raw text: a file, a pipe, or lines typed at a prompt.

  fairseq-sparsemixer translate RUN_DIR --input test.en --output test.de
  cat test.en | fairseq-sparsemixer translate RUN_DIR > test.de
  fairseq-sparsemixer translate RUN_DIR

Lines are raw text, and so are translations. Each input line gives one output line.
"""

import argparse
from pathlib import Path

from fairseq_sparsemixer.commands.flags import add_translation_arguments

PIPE_BUFFER, FILE_BUFFER = 64, 2048
"""Lines translated together. More are faster, because batches hold lines of like length; a pipe
answers after each buffer."""
HELP = "translate a file, a pipe or typed lines with a trained model"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``fairseq-sparsemixer translate``."""
    add_translation_arguments(parser)
    parser.add_argument(
        "--input", default="-", metavar="FILE", help="UTF-8 text, - for stdin (default: -)"
    )
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="where translations go (default: stdout)"
    )
    parser.add_argument(
        "--buffer-size",
        type=int,
        metavar="N",
        help=f"lines translated together (default: {FILE_BUFFER} of a file, {PIPE_BUFFER} of a "
        "pipe, 1 at a prompt)",
    )


def run(args: argparse.Namespace) -> None:
    """Do it."""
    from fairseq_sparsemixer.evaluation import translate

    translate.run(args)
