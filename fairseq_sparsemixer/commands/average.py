"""Average the parameters of several checkpoints of one run into a new checkpoint.

A mean over the last or the best checkpoints usually translates better than any one of them.
The result serves for translation and scoring, or to fine-tune from; it holds no optimiser state.

  fairseq-sparsemixer average --inputs RUN_DIR --last 5 --output RUN_DIR/averaged.pt
  fairseq-sparsemixer average --inputs RUN_DIR --best 5 --output RUN_DIR/averaged.pt
  fairseq-sparsemixer average --inputs A.pt B.pt --output averaged.pt
"""

import argparse
from pathlib import Path
from typing import List, Optional

from fairseq_sparsemixer.commands.flags import add_trust_argument, whole_number
from fairseq_sparsemixer.errors import UserError
from fairseq_sparsemixer.files import check_writable

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
        type=whole_number,
        metavar="N",
        help="the newest N of checkpointE.pt and checkpoint_E_U.pt (epoch E, update U)",
    )
    choice.add_argument(
        "--best",
        type=whole_number,
        metavar="N",
        help="the best N of those that fairseq's --keep-best-checkpoints wrote",
    )
    parser.add_argument("--output", required=True, type=Path, metavar="FILE", help="where to write")
    add_trust_argument(parser)


def run(args: argparse.Namespace) -> None:
    """Choose, average and write checkpoints.

    Raises:
        UserError: the flags do not fit together, name too few checkpoints, or some that are not of
            one run.
    """
    from fairseq_sparsemixer.evaluation.average import average_checkpoints

    check_writable(args.output)
    paths = _checkpoints(args.inputs, args.last, args.best)
    average_checkpoints(paths, args.output)
    print(f"wrote {args.output}, the mean of:", *(f"  {path}" for path in paths), sep="\n")


def _checkpoints(inputs: List[Path], last: Optional[int], best: Optional[int]) -> List[Path]:
    """The files that ``--inputs`` with ``--last`` or ``--best`` stand for."""
    from fairseq_sparsemixer.runs.checkpoints import best_checkpoints, last_checkpoints

    folders = [path for path in inputs if path.is_dir()]
    if not folders:
        if last is not None or best is not None:
            raise UserError("--last and --best choose from a run folder; give --inputs one folder")
        return inputs
    if len(inputs) > 1:
        raise UserError("--inputs takes either one run folder or checkpoint files, not both")
    if last is not None:
        return last_checkpoints(folders[0], last)
    if best is not None:
        return best_checkpoints(folders[0], best)
    raise UserError(f"{folders[0]} is a folder; add --last N or --best N to choose from it")
