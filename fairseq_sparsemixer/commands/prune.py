"""Which experts does a model need? Drop the others, or go back to a dense model.

  fairseq-sparsemixer prune RUN_DIR                                  measure only
  fairseq-sparsemixer prune RUN_DIR --experts 2 --output small.pt    keep 2 in each layer
  fairseq-sparsemixer prune RUN_DIR --to-dense keep --output dense.pt

Measured on the validation text of the model's corpus: the load of each expert, and the loss where
it is gone and its tokens go to the next best. Prints size, loss, BLEU and speed of each step, and
writes them beside the checkpoint. With --to-dense the checkpoint is one of fairseq's own
transformer, which needs no extension: the best expert of each layer, or all merged by load.
"""

import argparse
from pathlib import Path

from fairseq_sparsemixer.commands.flags import (
    add_model_arguments,
    add_search_arguments,
    model_of,
    whole_number,
)
from fairseq_sparsemixer.errors import UserError
from fairseq_sparsemixer.evaluation.options import Search
from fairseq_sparsemixer.files import check_writable

HELP = "drop the experts that a model needs least, or go back to a dense one"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``fairseq-sparsemixer prune``."""
    add_model_arguments(parser)
    goal = parser.add_mutually_exclusive_group()
    goal.add_argument(
        "--experts", type=whole_number, metavar="N", help="how many are left in each layer"
    )
    goal.add_argument(
        "--to-dense",
        choices=("keep", "merge"),
        help="write a dense model: keep the best expert of each layer, or merge them by load (for "
        "experts that began alike, see upcycle)",
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="where to write")
    parser.add_argument(
        "--subset", default="valid", metavar="NAME", help="raw/NAME.* (default: %(default)s)"
    )
    parser.add_argument(
        "--sentences",
        type=whole_number,
        default=200,
        metavar="N",
        help="how many of them, from the first (default: %(default)s)",
    )
    add_search_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Measure, drop and write.

    Raises:
        UserError: flags do not fit together, or see :func:`.conversion.pruning.prune`.
    """
    from fairseq_sparsemixer.conversion.pruning import Goal, prune

    goal = Goal(args.experts, args.to_dense)
    if (args.output is None) != (goal == Goal(None, None)):
        raise UserError("--output goes with --experts or --to-dense; give both or neither")
    if args.sentences < 1:
        raise UserError(f"--sentences {args.sentences} measures nothing; give 1 or more")
    if args.output is not None:
        check_writable(args.output)
    search = Search(args.beam, args.lenpen, args.max_tokens, "fp32")
    prune(
        model_of(args),
        search,
        goal,
        subset=args.subset,
        sentences=args.sentences,
        output=args.output,
    )
