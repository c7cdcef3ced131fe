"""How good are the routers' gradients? Estimators against the exact one, every expert computed.

  fairseq-sparsemixer gradients                     exact cases with a formula, about a minute
  fairseq-sparsemixer gradients RUN_DIR             your model, on sentences of its corpus
  fairseq-sparsemixer gradients RUN_DIR --checkpoint checkpoint_1_60.pt,checkpoint_best.pt

With a model: in each layer some tokens are drawn, each of them is sent to every expert while all
else is held fixed (other tokens and layers keep their experts), and the loss of its sentence gives
the exact gradient of that token's routing. All estimators are measured against it. Writes
gradients.json, tables and figures; stopped, the same command goes on where it was.
"""

import argparse
from pathlib import Path
from typing import Any, Dict

from fairseq_sparsemixer.commands.flags import (
    BEST_CHECKPOINT,
    add_trust_argument,
    checkpoint_of,
    refuse_without_effect,
    whole_number,
)
from fairseq_sparsemixer.errors import UserError

_SAMPLE: Dict[str, Any] = {"subset": "valid", "tokens": 100, "fit_sentences": 400, "max_length": 40}
"""Of the corpus, where flags do not say otherwise."""
HELP = "measure the routers' gradients against the exact ones"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of the sub-command."""
    parser.add_argument(
        "run_dir", nargs="?", metavar="RUN_DIR", help="run folder of a model (default: exact cases)"
    )
    parser.add_argument(
        "--checkpoint",
        metavar="NAME[,NAME...]",
        help=f"checkpoints in RUN_DIR, one after another (default: {BEST_CHECKPOINT})",
    )
    parser.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help="prepared corpus (default: the one that the model was trained on)",
    )
    parser.add_argument(
        "--subset", help=f"raw/SUBSET.* of the corpus (default: {_SAMPLE['subset']})"
    )
    parser.add_argument(
        "--layers", metavar="NAME[,NAME...]", help="such as encoder.0,decoder.2 (default: all)"
    )
    parser.add_argument(
        "--tokens",
        type=whole_number,
        help=f"tokens in each layer (default: {_SAMPLE['tokens']})",
    )
    parser.add_argument(
        "--fit-sentences",
        type=whole_number,
        metavar="N",
        help="training sentences that sparsemixer-cv's predictions are fitted on "
        f"(default: {_SAMPLE['fit_sentences']})",
    )
    parser.add_argument(
        "--max-length",
        type=whole_number,
        help=f"longest sentence, in pieces (default: {_SAMPLE['max_length']})",
    )
    parser.add_argument("--seed", type=whole_number, default=1, help="default: %(default)s")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="where results go (default: RUN_DIR/gradients, or gradients)",
    )
    add_trust_argument(parser)


def run(args: argparse.Namespace) -> None:
    """Do it.

    Raises:
        UserError: a flag is out of range, or see :mod:`.laboratory.gradients`.
    """
    from fairseq_sparsemixer.laboratory import gradients

    for flag in ("tokens", "fit_sentences", "max_length"):
        value = getattr(args, flag)
        if value is not None and value < 1:
            raise UserError(f"--{flag.replace('_', '-')} must be at least 1")
    if args.run_dir is None:
        why = "go with a model, and no RUN_DIR is given"
        refuse_without_effect(args, ["checkpoint", "data", "layers", *_SAMPLE], why)
        gradients.measure_toys(args.seed, args.output or Path("gradients"))
        return
    run_dir = Path(args.run_dir)
    given = {name: getattr(args, name) for name in _SAMPLE}
    sample = {name: _SAMPLE[name] if value is None else value for name, value in given.items()}
    gradients.measure_model(
        args.run_dir,
        checkpoint_of(args).split(","),
        args.data,
        args.layers.split(",") if args.layers else None,
        gradients.Sample(**sample, seed=args.seed),
        args.output or (run_dir if run_dir.is_dir() else run_dir.parent) / "gradients",
    )
