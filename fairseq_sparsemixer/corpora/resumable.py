"""Steps of a long job that can be interrupted and resumed.

A step is finished when its record is there, was made with the same settings from the same inputs,
and every output still has the size and checksum noted in it. The record is written last, and before
the step is redone it is cut down to the old outputs, so that an interrupted step is never taken for
a finished one, and what it made under other settings is removed when it is done.
"""

import contextlib
import sys
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, Sequence, Tuple

from fairseq_sparsemixer.errors import UserError
from fairseq_sparsemixer.files import read_json, sha256_of, write_json

STEPS = ".steps"
"""In the output folder: a record of each step."""
_RECORD = ({"made_from": dict, "outputs": dict, "result": dict}, {"outputs": dict})
"""Of a finished step, and of one that is done again."""
StepResult = Tuple[List[Path], Dict[str, Any]]


class Steps:
    """The steps of one output folder, with their records in ``FOLDER/.steps``.

    ``seal`` is a file that the caller writes after the last step. It is removed as soon as any step
    has to be redone, so that it is only there when everything in the folder fits together.
    """

    def __init__(self, folder: Path, seal: Path):
        self.folder = folder
        self._seal = seal
        self._fingerprints: Dict[Tuple[Path, int, int], Dict[str, Any]] = {}

    def run(
        self,
        name: str,
        settings: Dict[str, Any],
        inputs: Sequence[Path],
        build: Callable[[], StepResult],
    ) -> Dict[str, Any]:
        """Run ``build`` unless the step is finished; return its result either way.

        Args:
            name: names the step's record and its lines on standard error.
            settings: everything but the inputs that the outputs depend on (JSON values).
            inputs: files inside the folder that the step reads.
            build: makes the outputs; returns their paths (inside the folder) and a JSON object.
        """
        made_from = {
            "settings": settings,
            "inputs": {self._relative(path): self._fingerprint(path) for path in inputs},
        }
        record_path = self.folder / STEPS / f"{name}.json"
        record = _read_record(record_path)
        known = "result" in record and record.get("made_from") == made_from
        if known and self._outputs_intact(record):
            say(f"{name}: already done")
            return record["result"]

        say(f"{name} ...")
        start = time.monotonic()
        with contextlib.suppress(FileNotFoundError):
            self._seal.unlink()
        if record:
            # What the step made before stays known, though it is killed now.
            write_json(record_path, {"outputs": record["outputs"]})
        outputs, result = build()
        new_record = {
            "made_from": made_from,
            "outputs": {self._relative(path): self._fingerprint(path) for path in outputs},
            "result": result,
        }
        self._remove_stale(record, new_record)
        write_json(record_path, new_record)
        say(f"{name}: done in {time.monotonic() - start:.1f} s")
        return result

    def _outputs_intact(self, record: Dict[str, Any]) -> bool:
        for name, noted in record["outputs"].items():
            path = self.folder / name
            if not path.is_file() or self._fingerprint(path) != noted:
                say(f"{name} is missing or has changed since it was made; making it again")
                return False
        return True

    def _remove_stale(self, old: Dict[str, Any], new: Dict[str, Any]) -> None:
        """Remove what the step made under other settings and has not made now."""
        for name in old.get("outputs", {}).keys() - new["outputs"].keys():
            with contextlib.suppress(FileNotFoundError):
                (self.folder / name).unlink()

    def _relative(self, path: Path) -> str:
        return path.relative_to(self.folder).as_posix()

    def _fingerprint(self, path: Path) -> Dict[str, Any]:
        status = path.stat()
        key = (path, status.st_size, status.st_mtime_ns)
        if key not in self._fingerprints:
            self._fingerprints[key] = {"bytes": status.st_size, "sha256": sha256_of(path)}
        return self._fingerprints[key]


def _read_record(path: Path) -> Dict[str, Any]:
    try:
        return read_json(path, _RECORD, "") if path.exists() else {}
    except UserError:
        return {}  # the step is done again


def say(message: str) -> None:
    """Tell the user what is going on (standard error; results go to standard output)."""
    print(message, file=sys.stderr, flush=True)
