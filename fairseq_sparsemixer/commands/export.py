"""Write a trained model as a folder that is loaded where fairseq is not installed.

  fairseq-sparsemixer export RUN_DIR --to transformers --output FOLDER
  fairseq-sparsemixer export RUN_DIR --to onnx --output FOLDER

Of the first, there, with torch, transformers and sentencepiece:

  tokenizer = AutoTokenizer.from_pretrained("FOLDER", trust_remote_code=True)
  model = AutoModelForSeq2SeqLM.from_pretrained("FOLDER", trust_remote_code=True)
  tokens = model.generate(**tokenizer(["A sentence."], return_tensors="pt", padding=True))
  tokenizer.batch_decode(tokens, skip_special_tokens=True)

generate() searches as fairseq does, with --beam and --lenpen unless it is told otherwise. The
second folder holds encoder.onnx and decoder.onnx, a step of the decoder, for a search of your own.
See docs/export.md for what is the same and what is not, and `fairseq-sparsemixer import` for the
way back from the first.
"""

import argparse
from pathlib import Path

from fairseq_sparsemixer.commands.flags import add_beam_arguments, add_model_arguments, model_of
from fairseq_sparsemixer.errors import UserError

HELP = "write a trained model for transformers or ONNX"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``fairseq-sparsemixer export``."""
    add_model_arguments(parser)
    add_beam_arguments(parser)
    parser.add_argument(
        "--to", required=True, choices=["transformers", "onnx"], help="what loads it"
    )
    parser.add_argument(
        "--output", required=True, type=Path, metavar="FOLDER", help="where to write, a new folder"
    )


def run(args: argparse.Namespace) -> None:
    """Write the folder.

    Raises:
        UserError: a flag is out of range, or see :func:`.export.exporting.export`.
    """
    from fairseq_sparsemixer.export.exporting import export

    if args.beam < 1:
        raise UserError(f"--beam {args.beam} makes no search; give 1 or more")
    size = export(model_of(args), args.to, args.beam, args.lenpen, args.output)
    print(f"wrote {args.output}, {size / 1e6:.1f} MB")
