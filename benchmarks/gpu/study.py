"""A study that was laid out beforehand, for so many minutes, and the points that it has then.

python -m benchmarks.gpu.study STUDY --minutes 2 --output study.json
"""

import argparse
import signal
import sys
from pathlib import Path
from typing import Any

from benchmarks.measuring import Record
from fairseq_sparsemixer.errors import UserError
from fairseq_sparsemixer.files import write_json
from fairseq_sparsemixer.runs import points
from fairseq_sparsemixer.study import runner
from fairseq_sparsemixer.study.layout import PLAN
from fairseq_sparsemixer.study.plan import read_plan

FIELDS = ("updates", "seconds", "words_per_second", "loss", "nll_loss", "bleu")


def _so_far(folder: Path) -> Record:
    """The points of each run, without what is known of layers and domains."""
    runs = {}
    finished = True
    for run in read_plan(folder / PLAN).runs():
        found = points.read_points(folder / run.name / points.FILE)
        runs[run.name] = [{field: point.get(field) for field in FIELDS} for point in found]
        finished &= (folder / run.name / runner.SCORES).is_file()
    return {"runs": runs, "unfinished": not finished}


def main() -> None:
    """Go on with the study."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("study", type=Path, metavar="STUDY")
    parser.add_argument("--minutes", type=float, required=True, metavar="M")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.json")
    args = parser.parse_args()

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    try:
        runner.run(args.study, minutes=args.minutes)
    except UserError as error:
        sys.exit(f"error: {error}")
    finally:
        write_json(args.output, _so_far(args.study))


if __name__ == "__main__":
    main()
