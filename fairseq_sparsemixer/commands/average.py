"""Average the parameters of several checkpoints of one run into a new checkpoint.

A mean over the last or the best checkpoints usually translates better than any one of them.
The result serves for translation and scoring, or to fine-tune from; it holds no optimiser state.

  fairseq-sparsemixer average --inputs RUN_DIR --last 5 --output RUN_DIR/averaged.pt
  fairseq-sparsemixer average --inputs RUN_DIR --best 5 --output RUN_DIR/averaged.pt
  fairseq-sparsemixer average --inputs A.pt B.pt --output averaged.pt
"""

import argparse
from pathlib import Path

HELP = "average the last or best checkpoints of a run"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``fairseq-sparsemixer average``."""
    parser.add_argument(
        "--inputs",
        nargs="+",
        required=True,
        type=Path,
        metavar="PATH",
        help="a run folder (with --last or --best), or checkpoint files",
    )
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument(
        "--last",
        type=int,
        metavar="N",
        help="the newest N of checkpointE.pt and checkpoint_E_U.pt (epoch E, update U)",
    )
    choice.add_argument(
        "--best",
        type=int,
        metavar="N",
        help="the best N of those that fairseq's --keep-best-checkpoints wrote",
    )
    parser.add_argument("--output", required=True, type=Path, metavar="FILE", help="where to write")


def run(args: argparse.Namespace) -> None:
    """Do it."""
    from fairseq_sparsemixer.evaluation import average

    average.run(args)
