"""Make a Switch Transformer of a dense model: every expert a copy of its feed-forward network.

It begins with the dense model's evaluation loss, whatever the router, to be trained further, or
to be translated with.

  fairseq-sparsemixer upcycle runs/dense --experts 4 --router switch --output upcycled.pt
  fairseq-train DATA --user-dir fairseq_sparsemixer --finetune-from-model upcycled.pt \\
      --arch switch_transformer ...            with the flags that upcycle prints
  fairseq-hydra-train ... checkpoint.finetune_from_model=upcycled.pt experts=four

Any transformer of fairseq's that translates will do, also one that an old version saved.
"""

import argparse
import shlex
from pathlib import Path

from fairseq_sparsemixer.commands.flags import (
    BEST_CHECKPOINT,
    add_trust_argument,
    checkpoint_of,
    number,
    whole_number,
)
from fairseq_sparsemixer.errors import UserError
from fairseq_sparsemixer.files import check_writable

HELP = "make a model with experts of a dense one"
_EXPERTS = (
    "num_experts",
    "router",
    "top_k",
    "jitter_eps",
    "no_router_bias",
    "router_options",
    "balance_bias_rate",
    "moe_every",
    "moe_offset",
    "encoder_moe_layers",
    "decoder_moe_layers",
)
"""The settings of the model that are flags here; what is not given has the model's default."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``fairseq-sparsemixer upcycle``."""
    parser.add_argument(
        "run_dir", metavar="RUN_DIR", help="run folder of the dense model, or its checkpoint file"
    )
    parser.add_argument(
        "--checkpoint",
        metavar="NAME",
        help=f"checkpoint in RUN_DIR (default: {BEST_CHECKPOINT})",
    )
    parser.add_argument(
        "--experts",
        "--num-experts",
        dest="num_experts",
        required=True,
        type=whole_number,
        metavar="N",
        help="experts in each layer that has some",
    )
    parser.add_argument("--output", required=True, type=Path, metavar="FILE", help="where to write")
    for name, kind, about in (
        ("router", str, "how tokens choose their experts (default: sparsemixer)"),
        ("top-k", whole_number, "experts of each token (default: 1)"),
        ("jitter-eps", number, "router jitter (default: 0.1)"),
        ("router-options", str, "further options of the router, as JSON"),
        ("balance-bias-rate", number, "step of the balance bias, if training is to have one"),
        ("moe-every", whole_number, "every how many layers one gets experts (default: 2)"),
        ("moe-offset", whole_number, "the first layer that gets experts (default: 0)"),
        ("encoder-moe-layers", str, "encoder layers that get experts, as 0,2,4 or none"),
        ("decoder-moe-layers", str, "decoder layers that get experts, likewise"),
    ):
        parser.add_argument(f"--{name}", type=kind, help=about)
    parser.add_argument(
        "--no-router-bias", action="store_true", default=None, help="router logits without a bias"
    )
    parser.add_argument(
        "--reinitialise",
        type=number,
        default=0.0,
        metavar="SHARE",
        help="share of the inner units that each expert draws anew, so that experts are not alike "
        "(Drop-Upcycling takes 0.5); the model then begins worse (default: 0)",
    )
    parser.add_argument("--seed", type=whole_number, default=1, help="default: %(default)s")
    add_trust_argument(parser)


def run(args: argparse.Namespace) -> None:
    """Read, convert and write.

    Raises:
        UserError: a flag is out of range, or see :func:`.conversion.upcycling.upcycle`.
    """
    from fairseq_sparsemixer.conversion.checkpoints import find_checkpoint
    from fairseq_sparsemixer.conversion.upcycling import upcycle

    check_writable(args.output)
    if not 0 <= args.reinitialise <= 1:
        raise UserError(f"--reinitialise must be 0 to 1, not {args.reinitialise}")
    experts = {name: getattr(args, name) for name in _EXPERTS if getattr(args, name) is not None}
    dense = find_checkpoint(args.run_dir, checkpoint_of(args))
    done = upcycle(dense, args.output, experts, args.reinitialise, args.seed)
    for name, gate in done.gates.items():
        print(f"{name}: experts divided by the sum of a token's gates, {gate:.6g}")
    before, after = done.parameters
    print(f"wrote {args.output}: {after:,} parameters, of {before:,} in {dense}")
    print("train it further with these flags of fairseq-train, or the same settings for hydra:")
    print(f"  {shlex.join(['--finetune-from-model', str(args.output), *done.flags])}")
