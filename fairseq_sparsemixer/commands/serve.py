"""Show in a browser which experts work on a sentence, and what others would have done.

  fairseq-sparsemixer serve RUN_DIR
  fairseq-sparsemixer serve RUN_DIR --checkpoint checkpoint_average.pt --port 0

Prints the address of the page, which only this machine can open (docs/serve.md). Ctrl-C ends it.
"""

import argparse

from fairseq_sparsemixer.commands.flags import (
    add_beam_arguments,
    add_model_arguments,
    model_of,
    whole_number,
)
from fairseq_sparsemixer.errors import UserError

HOST, PORT = "127.0.0.1", 8642
HELP = "show in a browser what experts do with a sentence, and swap them by hand"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``fairseq-sparsemixer serve``."""
    add_model_arguments(parser)
    add_beam_arguments(parser)
    parser.add_argument(
        "--host",
        default=HOST,
        help="name or address of this machine to listen at; any but %(default)s lets others in, "
        "who are asked for no password (default: %(default)s)",
    )
    parser.add_argument(
        "--port",
        type=whole_number,
        default=PORT,
        help="0 for any that is free (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> None:
    """Serve until interrupted.

    Raises:
        UserError: see :func:`.serving.server.serve`.
    """
    from fairseq_sparsemixer.serving.server import serve

    if not 0 <= args.port < 1 << 16:
        raise UserError(f"--port {args.port} is none; give 0 to 65535")
    serve(model_of(args), args.beam, args.lenpen, args.host, args.port)
