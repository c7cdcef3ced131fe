"""scripts/environment.sh, with an interpreter that installs nothing."""

import subprocess
import sys

import pytest
from support.commands import PACKAGE

from fairseq_sparsemixer.training.settings import quoted

PATHS = ["runs/x-1", "a b,c=(d)", "jürgen", "it's", "back\\", "a\\'b", "a\\b", "\\\\'x"]
PYTHON = """#!/bin/sh
echo "$*" >>"{log}"
case "$*" in
*"-m venv"*) sleep 0.5; mkdir -p .venv/bin; cp "$0" .venv/bin/python ;;
*"-m pip"*) [ ! -e "{failing}" ] ;;
*) exec "{python}" "$@" ;;
esac
"""


@pytest.fixture
def place(tmp_path):
    """A checkout with a space in its name, and an interpreter."""
    place = tmp_path / "a checkout"
    (place / "scripts").mkdir(parents=True)
    root = PACKAGE.parent
    for name in ("setup.py", "scripts/constraints.txt", "scripts/environment.sh"):
        (place / name).write_text((root / name).read_text())
    python = place / "my python"
    program = PYTHON.format(log=place / "log", failing=place / "failing", python=sys.executable)
    python.write_text(program)
    python.chmod(0o755)
    return place


def start(place, then=""):
    return subprocess.Popen(
        ["bash", "-euc", f"source scripts/environment.sh; {then}", "test", *PATHS],
        cwd=place,
        env={"PATH": "/usr/bin:/bin", "PYTHON": str(place / "my python"), "LC_ALL": "C.UTF-8"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def installed(place):
    return (place / "log").read_text().count("-m pip install")


def test_two_scripts_install_once(place):
    processes = [start(place), start(place)]
    said = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert installed(place) == 1
    assert sum("Waiting for another script" in text for text in said) == 1
    with (place / "setup.py").open("a") as file:
        file.write("# changed")
    for _ in range(2):
        assert start(place).wait() == 0
    assert installed(place) == 2


def test_an_installation_that_failed_is_begun_again(place):
    (place / "failing").touch()
    process = start(place)
    assert "pip could not install the requirements" in process.communicate()[1]
    assert process.returncode == 1
    (place / "failing").unlink()
    assert start(place).wait() == 0 and installed(place) == 2


def test_paths_are_quoted_for_hydra(place):
    said, _ = start(place, 'for path in "$@"; do quoted "$path"; done').communicate()
    found = said.splitlines()[-len(PATHS) :]
    for path, text in zip(PATHS, found, strict=True):
        assert text in (quoted(path), f"'{quoted(path)}'")
