#!/usr/bin/env python
"""Test with other versions of Python, PyTorch and NumPy, and print a table of what was found.

    python scripts/versions.py --output versions.json            # all eight combinations
    python scripts/versions.py --output versions.json 3.12:2.6.0:1 3.12:newest:2
    python scripts/versions.py --long --output long.json         # and what takes 20 minutes each
    python scripts/versions.py --table versions.json             # the table again

A combination is PYTHON:TORCH:NUMPY. Each has an environment of its own, some gigabytes, in
.venv-versions/ (or the folder ENVIRONMENTS), which is kept: installed is what setup.py asks for, in
the newest versions that go together. There `fairseq-sparsemixer check` is run (preparing,
training, resuming, translating), and a short suite; with --long, also Triton's kernels in its
interpreter, torch.compile, and fairseq's commands. Of what fails, the end of the output is shown.
`uv` installs (pip install uv): it links what environments share, and finds the interpreters or
brings them; UV_... are its settings.
"""

import argparse
import hashlib
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict, List, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
VERSIONS = dict(
    re.findall(r'^(\w+) = "(.+)"$', (ROOT / "fairseq_sparsemixer/version.py").read_text(), re.M)
)
OLDEST_TORCH = f"{VERSIONS['MINIMUM_TORCH']}.0"
TRITON = {OLDEST_TORCH: ["triton==3.2.0"]}
"""That which PyTorch's CUDA build brings, for a build without."""
SUITE = [
    "tests/test_requirements.py",
    "tests/models/test_models.py",
    "tests/moe/test_gates.py",
    "tests/moe/test_layer.py",
    "tests/tasks/test_measuring.py",
]
LONG = [
    "tests/test_compat.py",
    "tests/models/test_determinism.py",
    "tests/models/test_generation.py",
    "tests/models/test_hydra.py",
    "tests/models/test_training.py",
    "tests/moe/kernels",
    "tests/moe/test_triton.py",
    "tests/runs/test_reading.py",
]
SHOWN = 40
"""Lines of the output of what failed."""
COUNT = re.compile(r"(\d+) (passed|failed|skipped|errors?)\b")
FOUND = """
import importlib.metadata, platform
names = ("torch", "numpy", "ve-fairseq")
print(platform.python_version(), *map(importlib.metadata.version, names))
"""


class Combination(NamedTuple):
    """Of versions."""

    python: str
    torch: str
    """"newest", or one."""
    numpy: str
    """The first number of its version."""


def all_combinations() -> List[Combination]:
    """Each with each, of those that setup.py allows."""
    first, too_new = (
        int(VERSIONS[name].split(".")[1]) for name in ("MINIMUM_PYTHON", "TOO_NEW_PYTHON")
    )
    pythons = [f"3.{minor}" for minor in range(first, too_new)]
    each_with_each = itertools.product(pythons, (OLDEST_TORCH, "newest"), ("1", "2"))
    return list(itertools.starmap(Combination, each_with_each))


def combination(text: str) -> Combination:
    """What a word of the command line means."""
    parts = text.split(":")
    if len(parts) != 3 or not all(parts) or parts[2] not in ("1", "2"):
        raise argparse.ArgumentTypeError(f"{text!r} is not PYTHON:TORCH:NUMPY, as in 3.12:2.6.0:1")
    return Combination(*parts)


def environment(wanted: Combination) -> Path:
    """The interpreter of a combination, installed once."""
    folder = Path(os.environ.get("ENVIRONMENTS", ROOT / ".venv-versions"))
    folder /= f"python{wanted.python}-torch{wanted.torch}-numpy{wanted.numpy}"
    python, installed = folder / "bin" / "python", folder / "installed"
    wanted_by = hashlib.sha256((ROOT / "setup.py").read_bytes()).hexdigest()
    if not installed.exists() or installed.read_text() != wanted_by:
        torch = [] if wanted.torch == "newest" else [f"=={wanted.torch}"]
        packages = ["".join(["torch", *torch]), f"numpy=={wanted.numpy}.*"]
        packages += [*TRITON.get(wanted.torch, []), "--editable", f"{ROOT}[dev]"]
        for command in (
            ["venv", "--clear", "--python", wanted.python, folder],
            ["pip", "install", "--python", python, *packages],
        ):
            subprocess.run(["uv", "--quiet", *map(str, command)], check=True, cwd=ROOT)
        installed.write_text(wanted_by)
    return python


def run(python: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """A command of an environment, with both of its outputs in one."""
    variables = {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [str(python), *arguments],
        cwd=ROOT,
        env={**os.environ, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test(wanted: Combination, tests: List[str]) -> Dict[str, Any]:
    """A row of the table."""
    row: Dict[str, Any] = {**wanted._asdict(), "found": [], "check": False, "tests": {}}
    try:
        python = environment(wanted)
    except (OSError, subprocess.CalledProcessError) as error:
        return {**row, "error": f"not installed: {error}"}
    row["found"] = run(python, "-c", FOUND).stdout.strip().split("\n")[-1].split()
    check = run(python, "-m", "fairseq_sparsemixer.cli", "check")
    suite = run(python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests)
    row["check"] = check.returncode == 0
    last = suite.stdout.strip().split("\n")[-1]
    row["tests"] = {kind: int(number) for number, kind in COUNT.findall(last)}
    if suite.returncode:
        row["tests"].setdefault("failed", 0)
    for ended in (check, suite):
        if ended.returncode:
            print(*ended.stdout.splitlines()[-SHOWN:], sep="\n", file=sys.stderr)
    return row


def succeeded(row: Dict[str, Any]) -> bool:
    """Whether the check went well, and some tests ran, and all of these."""
    tests = row["tests"]
    return row["check"] and tests.keys() <= {"passed", "skipped"} and tests.get("passed", 0) > 0


def table(rows: List[Dict[str, Any]]) -> str:
    """Markdown."""
    cells = [["Python", "PyTorch", "NumPy", "fairseq", "`check`", "tests"]]
    for row in rows:
        wanted = [row["python"], row["torch"], row["numpy"], ""]
        found = row["found"] if len(row["found"]) == len(wanted) else wanted
        counts = ", ".join(f"{number} {kind}" for kind, number in row["tests"].items())
        told = "all is well" if row["check"] else "fails"
        cells.append([*found, *([row["error"], ""] if "error" in row else [told, counts])])
    return "\n".join("| " + " | ".join(line) + " |" for line in [cells[0], ["---"] * 6, *cells[1:]])


def main() -> int:
    """Test, print, write; 1 where something failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("combinations", nargs="*", type=combination, metavar="PYTHON:TORCH:NUMPY")
    parser.add_argument("--long", action="store_true", help="what takes 20 minutes each, too")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="where results go")
    parser.add_argument("--table", type=Path, metavar="FILE.json", help="test nothing: print these")
    args = parser.parse_args()
    if args.table:
        print(table(json.loads(args.table.read_text())))
        return 0
    rows: List[Dict[str, Any]] = []
    for wanted in args.combinations or all_combinations():
        rows.append(test(wanted, SUITE + (LONG if args.long else [])))
        print(table(rows[-1:]).split("\n")[-1], flush=True)
        if args.output:
            args.output.write_text(json.dumps(rows, indent=1) + "\n")
    print(f"\n{table(rows)}")
    return 0 if all(map(succeeded, rows)) else 1


if __name__ == "__main__":
    sys.exit(main())
