"""``fairseq-sparsemixer``: one command line over the parts that fairseq does not have.

Each sub-command lives in the module named in :data:`COMMANDS`, which offers ``HELP`` (one line),
``add_arguments(parser)`` and ``run(args)``. Modules are imported only when their command runs.
"""

import argparse
import importlib
import sys
from typing import Optional, Sequence

from fairseq_sparsemixer.errors import UserError
from fairseq_sparsemixer.training.process import interrupted_by_sigterm
from fairseq_sparsemixer.version import __version__

COMMANDS = {
    "prepare": "fairseq_sparsemixer.corpora.prepare",
    "train": "fairseq_sparsemixer.training.launch",
    "average": "fairseq_sparsemixer.evaluation.average",
    "evaluate": "fairseq_sparsemixer.evaluation.evaluate",
    "table": "fairseq_sparsemixer.comparison.table",
    "report": "fairseq_sparsemixer.report.command",
    "translate": "fairseq_sparsemixer.evaluation.translate",
    "study": "fairseq_sparsemixer.study.runner",
    "gradients": "fairseq_sparsemixer.laboratory.gradients",
    "demo": "fairseq_sparsemixer.demo",
}


def build_parser() -> argparse.ArgumentParser:
    """The parser of all sub-commands."""
    parser = argparse.ArgumentParser(
        prog="fairseq-sparsemixer",
        description="Train, translate with and score Switch Transformers routed with SparseMixer.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, module_name in COMMANDS.items():
        module = importlib.import_module(module_name)
        command = commands.add_parser(
            name,
            help=module.HELP,
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run one sub-command; returns the exit status (2 for a :class:`UserError`)."""
    args = build_parser().parse_args(argv)
    try:
        # Schedulers and `kill` send SIGTERM: the processes that were started have to end, too.
        with interrupted_by_sigterm():
            args.run(args)
    except UserError as error:
        print(f"fairseq-sparsemixer {args.command}: error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # The reader (`| head`) has gone: not an error of ours.
        sys.stderr.close()
        return 0
    except KeyboardInterrupt:
        print("\ninterrupted; run the same command again to go on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
