"""The tests that are marked ``gpu``, counted one by one: ``python -m benchmarks.gpu.tests``.

Further arguments go to pytest. Neither lint nor an installation is needed.
"""

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Dict, List

import pytest

from benchmarks.measuring import Record
from fairseq_sparsemixer.files import write_json

ROOT = Path(__file__).parents[2]
MARK = "mark.gpu"
WORKERS = 4
"""Processes that share the GPU, where pytest-xdist is installed."""


def marked_files() -> List[Path]:
    """The files in which some test is marked."""
    return [
        path for path in sorted((ROOT / "tests").rglob("test_*.py")) if MARK in path.read_text()
    ]


class Counter:
    """A plugin of pytest that writes how each test ended when it has."""

    def __init__(self, output: Path) -> None:
        self.output = output
        self.found: Record = {"passed": 0, "skipped": 0, "failed": []}

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Count a test by its call; by its setup where there is no call."""
        if report.failed:
            self.found["failed"].append(report.nodeid)
        elif report.skipped or report.when == "call":
            self.found["skipped" if report.skipped else "passed"] += 1
        else:
            return
        write_json(self.output, self.found)

    def pytest_sessionfinish(self) -> None:
        """Write the counts where there was no test, too."""
        write_json(self.output, self.found)


def main() -> None:
    """Run them, count them, and end with pytest's status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.json")
    args, more = parser.parse_known_args()
    options: Dict[str, str] = {"-m": "gpu", "-p": "no:cacheprovider", "--rootdir": str(ROOT)}
    words = ["-q", *(word for option in options.items() for word in option)]
    if find_spec("xdist"):
        words += ["-n", str(WORKERS)]
    plugins = [Counter(args.output)]
    sys.exit(int(pytest.main([*words, *more, *map(str, marked_files())], plugins=plugins)))


if __name__ == "__main__":
    main()
