"""The flags that ``evaluate`` and ``translate`` share, and the translator they stand for."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fairseq_sparsemixer.evaluation.translator import Translator


def add_translation_arguments(parser: argparse.ArgumentParser) -> Any:
    """Add the flags that choose a model and how it searches.

    Returns:
        The group of ``--checkpoint``, for flags that exclude it.
    """
    parser.add_argument(
        "run_dir", metavar="RUN_DIR", help="a run folder, or checkpoint files joined by ':'"
    )
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument(
        "--checkpoint",
        default="checkpoint_best.pt",
        metavar="NAME",
        help="checkpoint in RUN_DIR; several joined by ':' are an ensemble (default: %(default)s)",
    )
    parser.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help="prepared corpus: where dictionaries and sentencepiece.bpe.model or bpecodes are, if "
        "RUN_DIR has none (default: where the model was trained)",
    )
    for side in ("source", "target"):
        parser.add_argument(
            f"--{side}-lang",
            metavar="LANG",
            help=f"{side} language, where neither checkpoint nor data tell it",
        )
    parser.add_argument("--beam", type=int, default=5, help="beam size (default: %(default)s)")
    parser.add_argument(
        "--lenpen",
        type=float,
        default=1.0,
        help="length penalty: below 1 favours short output, above 1 long (default: %(default)s)",
    )
    parser.add_argument(
        "--max-tokens",
        type=int,
        default=4096,
        help="source tokens in a batch, padding included (default: %(default)s)",
    )
    precision = parser.add_mutually_exclusive_group()
    precision.add_argument("--fp16", action="store_true", help="half precision, on a GPU")
    precision.add_argument("--bf16", action="store_true", help="bfloat16, on a GPU")
    return choice


def build_translator(args: argparse.Namespace) -> "Translator":
    """The translator that the flags name."""
    from fairseq_sparsemixer.evaluation.translator import Translator

    return Translator(
        args.run_dir,
        args.checkpoint,
        data=args.data,
        source_lang=args.source_lang,
        target_lang=args.target_lang,
        precision=precision_of(args),
    )


def precision_of(args: argparse.Namespace) -> str:
    """``"fp16"``, ``"bf16"`` or ``"fp32"``."""
    return "fp16" if args.fp16 else "bf16" if args.bf16 else "fp32"


def quiet_libraries() -> None:
    """Let warnings through to stderr, and no reports of progress but our own."""
    import logging
    import warnings

    for name in ("fairseq", "matplotlib", "sacrebleu"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # fairseq's data loader asks for pinned memory with or without a GPU.
    warnings.filterwarnings("ignore", message="'pin_memory' argument")
    # fairseq's attention masks are of two types.
    warnings.filterwarnings("ignore", message="Support for mismatched key_padding_mask")
