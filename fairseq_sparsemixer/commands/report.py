"""One page that shows what trained models do: curves, scores, experts, translations.

  fairseq-sparsemixer report runs/demo --output report.html
  fairseq-sparsemixer report study --baseline switch-8 --output study/report.html

RUN is the folder of a run, or a folder that holds such folders; runs whose settings differ by the
seed alone form one arm, as in `fairseq-sparsemixer table`. The page is one file that needs no
network; beside it lies a folder REPORT_figures with every figure as SVG and PNG, which the next
report replaces as a whole, if it holds nothing else. Where a model and its test set are there, the
model is run over the test set once to see which experts take which words; what comes out is kept in
RUN/evaluation/routing.json, where that can be written.

--baseline is what all arms are compared with. Default: the first arm of the router switch, else the
dense one, else the first, of those with a run that is finished and scored.
"""

import argparse
from pathlib import Path

from fairseq_sparsemixer.commands.flags import add_run_arguments, add_trust_argument
from fairseq_sparsemixer.errors import UserError
from fairseq_sparsemixer.requirements import load

HELP = "one HTML page: curves, scores, what each expert takes, translations"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``fairseq-sparsemixer report``."""
    add_run_arguments(parser)
    parser.add_argument(
        "--baseline", metavar="NAME", help="the arm to compare with, such as dense or switch-8"
    )
    parser.add_argument(
        "--output",
        required=True,
        type=Path,
        metavar="REPORT.html",
        help="the page; figures go to the folder REPORT_figures beside it",
    )
    add_trust_argument(parser)


def run(args: argparse.Namespace) -> None:
    """Do it.

    Raises:
        UserError: a package is missing, or ``--output`` is no name of a page.
    """
    for package in ("jinja2", "matplotlib"):
        load(package, "report")
    if args.output.suffix != ".html":
        raise UserError(f"--output {args.output} is a page; give it a name ending in .html")
    from fairseq_sparsemixer.report.build import build_report

    build_report(args.runs, args.scores, args.baseline, args.output)
