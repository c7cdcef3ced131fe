"""Train a small Switch Transformer on real English-German text, translate and score it.

Each run lands in its own folder below --runs and is resumed where it stopped: press Ctrl-C at any
time and start the same command again. With --compare three models are trained on the same data
for the same number of updates (dense, switch, sparsemixer) and set side by side in one table;
--router takes several names, or "all", and does the same for them.
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, List

from fairseq_sparsemixer.commands.flags import refuse_without_effect, whole_number

if TYPE_CHECKING:
    from fairseq_sparsemixer.runs.arms import Variant

HELP = "train, translate and score a small model on real text, in minutes on a CPU"


_DECIDED = {
    "experts": "--num-experts, or --router dense",
    "model.router": "--router",
    "model.num_experts": "--num-experts",
    "task.data": "--data",
    "checkpoint.save_dir": "--runs",
    "hydra.run.dir": "--runs",
}
"""Settings that the command makes itself, and what decides them."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of the sub-command."""
    parser.add_argument(
        "--router",
        metavar="NAME[,NAME...]",
        help="one or more routers, or all; dense is the model without experts "
        "(default: sparsemixer)",
    )
    parser.add_argument("--num-experts", type=whole_number, default=4, help="default: %(default)s")
    parser.add_argument(
        "--compare",
        action="store_true",
        help="train dense, switch and sparsemixer and print one table (three times as long)",
    )
    parser.add_argument(
        "--max-update",
        type=whole_number,
        help="updates of each run (default: that of configs/demo.yaml)",
    )
    parser.add_argument("--seed", type=whole_number, default=1, help="default: %(default)s")
    parser.add_argument(
        "--data",
        type=Path,
        default=Path("data/homeassistant"),
        help="folder of the corpus, built if need be (default: %(default)s)",
    )
    parser.add_argument(
        "--runs",
        type=Path,
        default=Path("runs/demo"),
        help="folder of the runs (default: %(default)s)",
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="KEY=VALUE",
        help="further settings of configs/demo.yaml, such as model.jitter_eps=0.2",
    )


def run(args: argparse.Namespace) -> None:
    """Train, score and show what the flags name.

    Raises:
        UserError: see :meth:`.study.demo.Demo.do`; or there is no such router.
    """
    from fairseq_sparsemixer.study.demo import Demo
    from fairseq_sparsemixer.training.settings import refuse_decided

    refuse_decided(args.overrides, _DECIDED)
    updates = [] if args.max_update is None else [f"optimization.max_update={args.max_update}"]
    overrides = [f"common.seed={args.seed}", *updates, *args.overrides]
    Demo(variants(args), args.data, args.runs, overrides).do()


def variants(args: argparse.Namespace) -> List["Variant"]:
    """The models that the flags name, in the order of the table.

    Raises:
        UserError: there is no such router, or too much is named.
    """
    from fairseq_sparsemixer.runs.arms import DENSE, build_variant, of_any_text

    names = list(dict.fromkeys((args.router or "sparsemixer").split(",")))
    if args.compare:
        refuse_without_effect(args, ["router"], "name routers, and --compare names three")
        names = [DENSE, "switch", "sparsemixer"]
    elif args.router == "all":
        names = of_any_text()
    return [build_variant(name, args.num_experts) for name in names]
