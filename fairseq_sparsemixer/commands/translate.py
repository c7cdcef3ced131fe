"""Translate raw text: a file, a pipe, or lines typed at a prompt.

  fairseq-sparsemixer translate RUN_DIR --input test.en --output test.de
  cat test.en | fairseq-sparsemixer translate RUN_DIR > test.de
  fairseq-sparsemixer translate RUN_DIR

Lines are raw text, and so are translations. Each input line gives one output line.
"""

import argparse
import sys
from pathlib import Path

from fairseq_sparsemixer.commands.flags import (
    add_translation_arguments,
    model_of,
    search_of,
    whole_number,
)
from fairseq_sparsemixer.errors import UserError
from fairseq_sparsemixer.files import check_writable

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
        type=whole_number,
        metavar="N",
        help=f"lines translated together (default: {FILE_BUFFER} of a file, {PIPE_BUFFER} of a "
        "pipe, 1 at a prompt)",
    )


def run(args: argparse.Namespace) -> None:
    """Translate until the input ends.

    Raises:
        UserError: a flag is out of range, or see :func:`.evaluation.translate.translate`.
    """
    from fairseq_sparsemixer.evaluation.translate import translate

    if args.buffer_size is not None and args.buffer_size < 1:
        raise UserError(f"--buffer-size {args.buffer_size} translates nothing; give 1 or more")
    if args.output is not None:
        check_writable(args.output)
    at_prompt = args.input == "-" and sys.stdin.isatty()
    usual_size = 1 if at_prompt else PIPE_BUFFER if args.input == "-" else FILE_BUFFER
    size = args.buffer_size or usual_size
    translate(model_of(args), search_of(args), args.input, args.output, size, at_prompt)
