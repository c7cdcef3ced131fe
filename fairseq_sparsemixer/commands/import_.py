"""Make a run of fairseq again from a folder that `fairseq-sparsemixer export` wrote.

  fairseq-sparsemixer import FOLDER --output RUN_DIR

RUN_DIR then holds checkpoint_best.pt, the dictionaries and the SentencePiece model: what
`fairseq-sparsemixer translate` and `evaluate`, fairseq-generate and --finetune-from-model take. It
has no state of the optimiser. A folder that transformers saved again, with other weights, serves
as well.
"""

import argparse
from pathlib import Path

HELP = "make a run again from what export wrote"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``fairseq-sparsemixer import``."""
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="a folder of transformers")
    parser.add_argument(
        "--output", required=True, type=Path, metavar="RUN_DIR", help="where to write, a new folder"
    )


def run(args: argparse.Namespace) -> None:
    """Write the run.

    Raises:
        UserError: see :func:`.export.importing.import_folder`.
    """
    from fairseq_sparsemixer.export.importing import import_folder

    import_folder(args.folder, args.output)
    print(f"wrote {args.output}; translate with: fairseq-sparsemixer translate {args.output}")
