"""Flags that several sub-commands share."""

import argparse
import math
import os
from pathlib import Path
from typing import Any, Sequence

from fairseq_sparsemixer.errors import UserError
from fairseq_sparsemixer.evaluation.options import LARGEST, ModelChoice, Search

BEST_CHECKPOINT = "checkpoint_best.pt"
SEARCH = {"beam": 5, "lenpen": 1.0, "max_tokens": 4096}
"""The defaults of the flags of a search."""
PRECISIONS = {
    "fp16": "half precision, on a GPU",
    "bf16": "bfloat16, on a GPU",
    "int8": "weights in 8 bits, on a CPU: faster, and some translations change",
}


def whole_number(text: str) -> int:
    """A flag's value.

    Raises:
        ArgumentTypeError: it is none, or too large for anything.
    """
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"invalid int value: {text[:30]!r}") from None
    if abs(value) > LARGEST:
        raise argparse.ArgumentTypeError(f"{text} is too large: at most {LARGEST}")
    return value


def number(text: str) -> float:
    """A flag's value.

    Raises:
        ArgumentTypeError: it is none, or not finite.
    """
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"invalid float value: {text[:30]!r}")
    return value


def refuse_without_effect(args: argparse.Namespace, names: Sequence[str], why: str) -> None:
    """Refuse flags that were given and would do nothing.

    Args:
        args: what was given; None or False where a flag was not.
        names: of flags, with ``_``.
        why: the end of a sentence about them.

    Raises:
        UserError: names the first.
    """
    for name in names:
        if getattr(args, name) not in (None, False):
            raise UserError(f"--{name.replace('_', '-')}: such flags {why}; leave it out")


def add_model_arguments(parser: argparse.ArgumentParser) -> Any:
    """Add the flags that choose a model.

    Returns:
        The group of ``--checkpoint``, for flags that exclude it.
    """
    parser.add_argument(
        "run_dir", metavar="RUN_DIR", help="a run folder, or checkpoint files joined by ':'"
    )
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument(
        "--checkpoint",
        metavar="NAME",
        help="checkpoint in RUN_DIR; several joined by ':' are an ensemble (default: "
        f"{BEST_CHECKPOINT})",
    )
    parser.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help="prepared corpus (default: that of training); dictionaries and "
        "sentencepiece.bpe.model or bpecodes are looked for in RUN_DIR, where the model was "
        "trained, and here, in this order",
    )
    for side in ("source", "target"):
        parser.add_argument(
            f"--{side}-lang",
            metavar="LANG",
            help=f"{side} language, where neither checkpoint nor data tell it",
        )
    add_trust_argument(parser)
    return choice


def add_beam_arguments(parser: argparse.ArgumentParser) -> None:
    """Add ``--beam`` and ``--lenpen``."""
    parser.add_argument(
        "--beam", type=whole_number, default=SEARCH["beam"], help="beam size (default: %(default)s)"
    )
    parser.add_argument(
        "--lenpen",
        type=number,
        default=SEARCH["lenpen"],
        help="length penalty: below 1 favours short output, above 1 long (default: %(default)s)",
    )


def add_search_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the search, its precision aside."""
    add_beam_arguments(parser)
    parser.add_argument(
        "--max-tokens",
        type=whole_number,
        default=SEARCH["max_tokens"],
        help="source tokens in a batch, padding included (default: %(default)s)",
    )


def add_translation_arguments(parser: argparse.ArgumentParser) -> Any:
    """Add the flags that choose a model and how it searches.

    Returns:
        The group of ``--checkpoint``, for flags that exclude it.
    """
    choice = add_model_arguments(parser)
    add_search_arguments(parser)
    precision = parser.add_mutually_exclusive_group()
    for name, about in PRECISIONS.items():
        precision.add_argument(f"--{name}", action="store_true", help=about)
    return choice


def model_of(args: argparse.Namespace) -> ModelChoice:
    """The model that the flags of :func:`add_model_arguments` choose."""
    name = checkpoint_of(args)
    return ModelChoice(args.run_dir, name, args.data, args.source_lang, args.target_lang)


def checkpoint_of(args: argparse.Namespace) -> str:
    """What ``--checkpoint`` chooses.

    Raises:
        UserError: RUN_DIR is a file, which leaves no choice.
    """
    if not os.path.isdir(args.run_dir):
        why = f"choose from a run folder, and {args.run_dir} is none"
        refuse_without_effect(args, ["checkpoint"], why)
    return args.checkpoint or BEST_CHECKPOINT


def search_of(args: argparse.Namespace) -> Search:
    """How it searches, by the same flags."""
    given = [name for name in PRECISIONS if getattr(args, name)]
    return Search(args.beam, args.lenpen, args.max_tokens, (*given, "fp32")[0])


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Add ``RUN...`` and ``--scores``."""
    parser.add_argument(
        "runs",
        nargs="+",
        type=Path,
        metavar="RUN",
        help="a run folder, or a folder that holds run folders",
    )
    parser.add_argument(
        "--scores",
        metavar="NAME",
        help="which evaluation to take where a run has several, such as test.checkpoint_best for "
        "RUN/evaluation/test.checkpoint_best.json",
    )


class _Trust(argparse.Action):
    """Says so in the environment, which reaches the processes that a command starts."""

    def __call__(self, *_: Any) -> None:
        from fairseq_sparsemixer.runs import reading

        os.environ[reading.TRUST] = "1"


def add_trust_argument(parser: argparse.ArgumentParser) -> None:
    """Add ``--trust-checkpoints``."""
    parser.add_argument(
        "--trust-checkpoints",
        nargs=0,
        action=_Trust,
        help="read checkpoints whose settings are refused; code in their pickle is still never run",
    )
