"""Train and score several models alike: arms x seeds, as a YAML plan names them.

  fairseq-sparsemixer study configs/studies/debian.yaml --output runs/debian
  fairseq-sparsemixer study runs/debian --minutes 25 --jobs 4     # goes on, for so long

The folder holds all that is needed: the plan, the configs, the corpus in pieces. It can be moved to
another machine, without network too, and back. Every run has a folder of its own in it; what is
measured at each validation is in its points.jsonl (see docs/study.md). Stopped at any time, by
Ctrl-C, by the end of --minutes or by being killed, the same command goes on: with the training at
the last checkpoint, and without losing a point. `fairseq-sparsemixer report` shows the results.
"""

import argparse
from pathlib import Path

from fairseq_sparsemixer.commands.flags import add_trust_argument, number, whole_number
from fairseq_sparsemixer.errors import UserError

HELP = "train and score arms x seeds as a plan names them, stoppable at any time"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of the sub-command."""
    parser.add_argument(
        "plan", type=Path, metavar="PLAN.yaml|STUDY", help="the plan, or the folder of a study"
    )
    parser.add_argument(
        "--output", type=Path, metavar="STUDY", help="folder of the study, made from the plan"
    )
    parser.add_argument(
        "--jobs",
        type=whole_number,
        metavar="N",
        help="models trained at once (default: jobs of the plan)",
    )
    parser.add_argument(
        "--minutes", type=number, metavar="M", help="stop after so long; the same command goes on"
    )
    parser.add_argument(
        "--prepare-only", action="store_true", help="only make the folder, to be carried elsewhere"
    )
    add_trust_argument(parser)


def run(args: argparse.Namespace) -> None:
    """Check the flags and work off the study.

    Raises:
        UserError: flags that do not go together, or see :func:`.study.runner.run`.
    """
    for flag, value in (("--jobs", args.jobs), ("--minutes", args.minutes)):
        if value is not None and not value > 0:
            raise UserError(f"{flag} {value} does nothing; give more than 0")
    if not args.plan.exists():
        raise UserError(f"there is no plan and no study {args.plan}")
    if args.plan.is_dir() and args.output is not None:
        raise UserError("--output goes with a plan; leave it out to go on with a study")
    if not args.plan.is_dir() and args.output is None:
        raise UserError("say where to with --output STUDY")

    from fairseq_sparsemixer.study import runner

    runner.run(
        args.plan,
        args.output,
        jobs=args.jobs,
        minutes=args.minutes,
        prepare_only=args.prepare_only,
    )
