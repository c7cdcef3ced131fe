"""Train a Switch Transformer on WMT14 English-German with the recipes in configs/wmt14.yaml.

  scripts/train_wmt14.sh --router sparsemixer --experts 8 --dry-run
  scripts/train_wmt14.sh --router dense --schedule short --seed 2
  scripts/train_wmt14.sh --recipe released --pipeline moses model.dropout=0.2

An update has the same 16 x 8192 tokens on any number of GPUs. Each run lands in its own folder
below --runs and is resumed where it stopped: press Ctrl-C at any time and start the same command
again. run.json there holds every setting, and a start with others is refused. On several nodes,
start the command on each with --nodes, and with MASTER_ADDR and NODE_RANK in the environment, as
scripts/train_wmt14.sbatch does. Several workers are started by torchrun; where one of them dies,
the others are stopped.
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from fairseq_sparsemixer.commands.flags import (
    add_trust_argument,
    refuse_without_effect,
    whole_number,
)

if TYPE_CHECKING:
    from fairseq_sparsemixer.training.plan import Request

EXPERTS = 4
HELP = "train on WMT14 English-German, on whatever GPUs there are"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of the sub-command."""
    _add_what(parser)
    _add_where(parser)
    add_trust_argument(parser)
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="KEY=VALUE",
        help="further settings of configs/wmt14.yaml, such as model.jitter_eps=0.2",
    )


def _add_what(parser: argparse.ArgumentParser) -> None:
    """What is trained."""
    parser.add_argument(
        "--router",
        default="sparsemixer",
        metavar="NAME",
        help="one of docs/routers.md, or dense for the model without experts (default: "
        "%(default)s)",
    )
    parser.add_argument(
        "--experts",
        type=whole_number,
        default=EXPERTS,
        metavar="N",
        help="in each layer that has them (default: %(default)s)",
    )
    parser.add_argument(
        "--model", choices=["base", "big"], default="base", help="default: %(default)s"
    )
    parser.add_argument(
        "--recipe",
        choices=["recommended", "released"],
        default="recommended",
        help="released: that of the SparseMixer paper's example (default: %(default)s)",
    )
    parser.add_argument(
        "--schedule",
        choices=["long", "short"],
        default="long",
        help="400,000 or 100,000 updates (default: %(default)s)",
    )
    parser.add_argument(
        "--pipeline",
        choices=["sentencepiece", "moses"],
        default="sentencepiece",
        help="how the text was cut; the released recipe took moses (default: %(default)s)",
    )
    parser.add_argument("--seed", type=whole_number, default=1, help="default: %(default)s")


def _add_where(parser: argparse.ArgumentParser) -> None:
    """Where, and on what."""
    parser.add_argument(
        "--runs",
        type=Path,
        default=Path("runs/wmt14"),
        metavar="DIR",
        help="folder of the runs (default: %(default)s)",
    )
    parser.add_argument(
        "--nodes",
        type=whole_number,
        default=1,
        metavar="N",
        help="with as many workers each as this one (default: %(default)s)",
    )
    parser.add_argument(
        "--workers",
        type=whole_number,
        metavar="N",
        help="on each node (default: one for each GPU, or one on the CPU)",
    )
    parser.add_argument("--cpu", action="store_true", help="and not on GPUs, though there are some")
    parser.add_argument(
        "--max-tokens",
        type=whole_number,
        metavar="T",
        help="of one batch of one worker, for its memory; an update keeps its tokens (default: "
        "that of the recipe)",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="only print the command, the parameters, and estimates of memory and time",
    )


def run(args: argparse.Namespace) -> None:
    """Start or resume the run, or say what it would need.

    Raises:
        UserError: see :func:`.training.launch.run`.
    """
    from fairseq_sparsemixer.training import launch

    launch.run(request(args), dry_run=args.dry_run)


def request(args: argparse.Namespace) -> "Request":
    """What the flags ask for."""
    from fairseq_sparsemixer.runs.arms import DENSE
    from fairseq_sparsemixer.training.plan import Request

    if args.router == DENSE and args.experts != EXPERTS:
        refuse_without_effect(args, ["experts"], "are for a router, and dense has none")
    return Request(**{name: getattr(args, name) for name in Request._fields})
