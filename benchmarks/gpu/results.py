"""What a folder of results holds: one file of JSON with every step, and one log."""

import json
import subprocess
from pathlib import Path
from typing import Any, Dict

from benchmarks.measuring import Record
from fairseq_sparsemixer.errors import UserError
from fairseq_sparsemixer.files import write_json

FILE = "results.json"
LOG = "log.txt"
SUMMARY = "summary.md"
DONE, FAILED, LATE, STOPPED, LEFT_OUT = "done", "failed", "out of time", "interrupted", "left out"
"""How a step ended; all but the first are taken up again by a second start."""


def gpu_and_driver() -> Record:
    """The first GPU, as its driver names it; without one, None."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        output = subprocess.run(query, check=True, capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return {"gpu": None, "driver": None}
    name, driver = output.splitlines()[0].rsplit(", ", 1)
    return {"gpu": name, "driver": driver}


class Results:
    """The results of a folder, written at each change.

    Args:
        folder: of the results, there or not.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / FILE
        self.about: Record = {}
        self.steps: Dict[str, Record] = {}
        if self.path.is_file():
            content = json.loads(self.path.read_text(encoding="utf-8"))
            self.about, self.steps = content["about"], content["steps"]

    def begin(self, about: Record) -> None:
        """Say what all of it is measured on.

        Raises:
            UserError: the folder holds what was measured on something else.
        """
        if self.about and self.about != about:
            raise UserError(
                f"--output {self.folder} holds results of {_in_words(self.about)}, not of "
                f"{_in_words(about)}: name another folder"
            )
        self.about = about
        self._write()

    def done(self, step: str) -> bool:
        """Whether a step needs no second start."""
        return self.steps.get(step, {}).get("status") == DONE

    def ended(self, step: str) -> bool:
        """Whether a step that was begun has ended by itself."""
        return self.steps[step]["status"] != STOPPED

    def keep(self, step: str, **values: Any) -> None:
        """Keep what is known of a step: its "status", "seconds", "result", "error"."""
        self.steps.setdefault(step, {}).update(values)
        self._write()

    def restart(self, step: str) -> None:
        """Drop how a step ended before; its result stays until there is another."""
        before = self.result(step)
        self.steps[step] = {"status": STOPPED, **({"result": before} if before else {})}
        self._write()

    def result(self, step: str) -> Record:
        """What a step has measured; empty where that is nothing."""
        return self.steps.get(step, {}).get("result") or {}

    def _write(self) -> None:
        write_json(self.path, {"about": self.about, "steps": self.steps})


def _in_words(about: Record) -> str:
    words = f"{about['gpu'] or 'a CPU'}, driver {about['driver']}"
    return f"a dry run on {words}" if about["dry_run"] else words
