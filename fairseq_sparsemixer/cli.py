"""``fairseq-sparsemixer``: one command line over the parts that fairseq does not have.

Each sub-command is a module of :mod:`fairseq_sparsemixer.commands`.
"""

import argparse
import contextlib
import importlib
import io
import keyword
import logging
import os
import signal
import sys
import warnings
from typing import Any, Iterator, NoReturn, Optional, Sequence

from fairseq_sparsemixer.disk import cannot_write, full_disk
from fairseq_sparsemixer.errors import UserError
from fairseq_sparsemixer.version import __version__

COMMANDS = (
    "prepare",
    "train",
    "average",
    "upcycle",
    "prune",
    "evaluate",
    "table",
    "report",
    "translate",
    "serve",
    "study",
    "gradients",
    "demo",
    "export",
    "import",
    "check",
)


class _Parser(argparse.ArgumentParser):
    """Its errors are one line, too, whatever they quote."""

    def error(self, message: str) -> NoReturn:
        super().error(str(UserError(message)))


def build_parser() -> argparse.ArgumentParser:
    """The parser of all sub-commands."""
    parser = _Parser(
        prog="fairseq-sparsemixer",
        description="Train, translate with and score Switch Transformers routed with SparseMixer.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name in COMMANDS:
        file = f"{name}_" if keyword.iskeyword(name) else name
        module = importlib.import_module(f"fairseq_sparsemixer.commands.{file}")
        command = commands.add_parser(
            name,
            help=module.HELP,
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser


def _quiet_libraries() -> None:
    """Let warnings through to stderr, and no reports of progress but our own."""
    for name in ("fairseq", "hydra", "matplotlib", "sacrebleu"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # fairseq's data loader asks for pinned memory with or without a GPU.
    warnings.filterwarnings("ignore", message="'pin_memory' argument")
    # fairseq's attention masks are of two types.
    warnings.filterwarnings("ignore", message="Support for mismatched key_padding_mask")


@contextlib.contextmanager
def _interrupted_by_sigterm() -> Iterator[None]:
    """Take SIGTERM, which schedulers and ``kill`` send, as Ctrl-C: the training process ends too.

    Raises:
        KeyboardInterrupt: at SIGTERM.
    """

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


@contextlib.contextmanager
def _any_text() -> Iterator[None]:
    """Print what the console's encoding has not as escapes, as Python does on stderr."""
    with contextlib.ExitStack() as stack:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stack.callback(stream.reconfigure, errors=stream.errors)
                stream.reconfigure(errors="backslashreplace")
        yield


def _told(command: str, message: str) -> int:
    """Print an error as one line; its exit status."""
    print(f"fairseq-sparsemixer {command}: error: {UserError(message)}", file=sys.stderr)
    return 2


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run one sub-command; returns the exit status (2 for a :class:`UserError`)."""
    with _any_text():
        return _run(argv)


def _run(argv: Optional[Sequence[str]]) -> int:
    args = build_parser().parse_args(argv)
    _quiet_libraries()
    try:
        with _interrupted_by_sigterm():
            args.run(args)
            sys.stdout.flush()
    except UserError as error:
        return _told(args.command, str(error))
    except BrokenPipeError:
        # The reader (`| head`) has gone: not an error of ours.
        sys.stderr.close()
        return 0
    except OSError as error:
        reason = full_disk(error)
        if reason is None:
            if error.filename is None:  # of no place that the user may have named
                raise
            return _told(
                args.command,
                f"cannot use {error.filename} ({error.strerror}): check the path and its "
                "permissions, or name another",
            )
        _told(args.command, cannot_write(reason))
        # What is left in the buffer of stdout, which may be what is full, is tried again at exit.
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted; run the same command again to go on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
