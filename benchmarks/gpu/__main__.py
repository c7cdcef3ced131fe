"""Check, measure and train on a GPU, within the minutes given.

  python -m benchmarks.gpu --minutes 8 --output results/gpu
  python -m benchmarks.gpu --minutes 8 --output results/gpu      # goes on with what is missing
  python -m benchmarks.gpu --table results/gpu                   # the summary again

In this order: what the machine is and the most that it does; whether every backend computes the
right numbers, without waiting and in CUDA graphs; which kernels take the time; layers with experts
beside dense ones; fairseq's training and search; the layers' operators one by one; and, side by
side, the marked tests, torch.compile and a study that `fairseq-sparsemixer study PLAN --output
STUDY --prepare-only` laid out, which has what is left of the time. With `--only sweep`, and not
else, the kernels are launched with other tiles, warps and stages, too. A step that does not fit is
left out; what the others found is in results.json at every moment, their output in log.txt, and the
tables in summary.md.
"""

import argparse
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import results, steps, table
from benchmarks.gpu.results import Results
from benchmarks.gpu.runner import Runner
from fairseq_sparsemixer.errors import UserError
from fairseq_sparsemixer.files import write_lines
from fairseq_sparsemixer.locks import sole_user

KINDS = (
    steps.MACHINE,
    steps.CHECKS,
    steps.COMPILE,
    steps.KERNELS,
    steps.LAYER,
    steps.TRAIN,
    steps.GENERATE,
    steps.OPERATORS,
    steps.SWEEP,
    steps.TESTS,
    steps.STUDY,
)


def build_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder of the results")
    parser.add_argument(
        "--minutes", type=float, default=8.0, metavar="M", help="for all of it (default: 8)"
    )
    parser.add_argument(
        "--study", type=Path, metavar="STUDY", help="a study laid out with --prepare-only"
    )
    parser.add_argument(
        "--only", nargs="+", choices=KINDS, default=[], metavar="STEP", help=", ".join(KINDS)
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="all of it in tiny sizes on a CPU, without a GPU"
    )
    parser.add_argument(
        "--table", type=Path, metavar="DIR", help="do nothing: print the summary of a folder"
    )
    return parser


def _print_summary(folder: Path) -> None:
    if not (folder / results.FILE).is_file():
        raise UserError(f"--table {folder} holds no {results.FILE}: name what --output named")
    print(table.summary(Results(folder)))


def _check(args: argparse.Namespace) -> None:
    if args.output is None:
        raise UserError("say where the results go with --output DIR")
    if not args.minutes > 0:
        raise UserError(f"--minutes {args.minutes} does nothing; give more than 0")
    if not args.dry_run and not torch.cuda.is_available():
        raise UserError("there is no GPU that PyTorch sees; --dry-run shows the command without")
    if args.study is not None and not (args.study / "plan.yaml").is_file():
        raise UserError(
            f"--study {args.study} holds no plan.yaml: lay a study out with `fairseq-sparsemixer "
            f"study PLAN --output {args.study} --prepare-only`"
        )
    if args.output.exists() and not args.output.is_dir():
        raise UserError(f"--output {args.output} is not a folder")


def _run(args: argparse.Namespace) -> bool:
    """Run what is missing, and leave a summary in any case; whether a step failed.

    Raises:
        UserError: the flags do not fit, or the folder holds results of another machine.
        KeyboardInterrupt: as it came, once all processes have ended.
    """
    deadline = time.monotonic() + 60 * args.minutes
    _check(args)
    args.output.mkdir(parents=True, exist_ok=True)
    with sole_user(args.output, "--output"):
        found = Results(args.output)
        found.begin({**results.gpu_and_driver(), "dry_run": args.dry_run})
        sizes = steps.DRY if args.dry_run else steps.GPU
        environment = {**os.environ, **({"TRITON_INTERPRET": "1"} if args.dry_run else {})}
        try:
            runner = Runner(found, deadline, table.headline, environment)
            runner.do(steps.plan(sizes, args.study, args.only))
        finally:
            text = table.summary(found)
            write_lines(args.output / results.SUMMARY, [text])
        print(f"\n{text}")
    failed = [name for name, step in found.steps.items() if step["status"] == results.FAILED]
    if failed:
        print(f"failed: {', '.join(failed)}; after a repair the same command does them again")
    return bool(failed)


def main() -> int:
    """Run, or print the table.

    Returns:
        1 where a step failed, 2 for a mistake, 130 when interrupted.
    """
    args = build_parser().parse_args()

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    signal.signal(signal.SIGINT, interrupt)
    try:
        if args.table is not None:
            _print_summary(args.table)
        else:
            return int(_run(args))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted; run the same command again to go on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
