"""Finished runs side by side: means over seeds, significance and speed-up against a baseline.

  fairseq-sparsemixer table runs/sweep --baseline dense --output runs/sweep-table
  fairseq-sparsemixer table runs/a runs/b runs/c --baseline switch-8 --output results/table

RUN is the folder of a run, or a folder that holds such folders. Runs whose settings differ by the
seed alone form one row, named by router and experts: dense, switch-8, sparsemixer-8. Where two
rows would have one name, the settings in which they differ are added: switch-8,jitter_eps=0.2.
Only runs that are finished and scored count; the others are listed with a note. Scores that cannot
be compared (other text, other search, other signature) are refused.

Columns of the table, which is written as STEM.md, STEM.csv and STEM.json:

  BLEU, chrF2, valid nll   mean over seeds, +- sample standard deviation; nll in bits per token, of
                           the checkpoint that was scored, as the updates are
  p                        paired bootstrap test of BLEU against the baseline's run of equal seed;
                           with several seeds the largest, and 1 unless all differ in the same
                           direction as the means (the JSON holds each)
  updates to target        updates to the baseline's scored loss: until its valid nll (mean over its
                           seeds) is first reached, linear between two validations; the
                           baseline's own runs: until each one's own nll is first reached
                           (`fairseq-sparsemixer report` shows updates to the baseline's best loss)
  minutes to target        likewise, in minutes of training, validation and saving included
  speed-up                 the baseline's updates to target over the row's; 1 for the baseline
  words/s                  median of the log's, in target tokens; mean over seeds
  paper                    empty: its tables could not be read
"""

import argparse
from pathlib import Path

from fairseq_sparsemixer.commands.flags import add_run_arguments
from fairseq_sparsemixer.errors import UserError

HELP = "finished runs side by side: means over seeds, significance, speed-up"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``fairseq-sparsemixer table``."""
    add_run_arguments(parser)
    parser.add_argument(
        "--baseline",
        required=True,
        metavar="NAME",
        help="the row to compare with, such as dense or switch-8",
    )
    parser.add_argument(
        "--output",
        required=True,
        type=Path,
        metavar="STEM",
        help="writes STEM.md, STEM.csv and STEM.json",
    )


def run(args: argparse.Namespace) -> None:
    """Do it.

    Raises:
        UserError: ``--output`` is the name of a file, or none.
    """
    from fairseq_sparsemixer.comparison import table

    if args.output.name in ("", ".."):
        raise UserError(f"--output {args.output} is no stem of file names; give one, such as table")
    if args.output.suffix in table.SUFFIXES:
        raise UserError(
            f"--output {args.output} is the stem of three files; leave out {args.output.suffix}"
        )
    table.make_table(args.runs, args.scores, args.baseline, args.output)
