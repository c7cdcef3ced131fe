"""Find out whether all works on this machine: the first thing to run when something is odd.

  fairseq-sparsemixer check
  fairseq-sparsemixer check > check.txt    # to be pasted into a report

Says what is installed, which devices there are, which backends of the experts serve them, and why
others do not. Makes a toy corpus, trains a small model on it, on a GPU if there is one, goes on
from its checkpoint, and validates and translates with what was saved.
"""

import argparse
import shutil
import tempfile
from pathlib import Path

from fairseq_sparsemixer.errors import UserError

HELP = "say what is installed, and try everything once in under a minute"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """There are none."""


def run(args: argparse.Namespace) -> None:
    """Check, and print what was found.

    Raises:
        UserError: something does not work. What it said is kept.
    """
    from fairseq_sparsemixer.installation import parts, round_trip

    for line in parts.lines():
        print(line, flush=True)
    print("round trip")
    folder = Path(tempfile.mkdtemp(prefix="fairseq_sparsemixer_check_"))
    try:
        for name, seconds in round_trip.run(folder):
            print(f"  {name:<9}  {seconds:5.1f} s", flush=True)
    except UserError:
        raise
    except BaseException:
        shutil.rmtree(folder)
        raise
    shutil.rmtree(folder)
    if unsuitable := parts.unsuitable():
        raise UserError(f"the round trip went well, but {', '.join(unsuitable)}")
    print("all is well")
