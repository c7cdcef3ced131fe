"""Versions that do not work are refused when the package is imported, in one sentence."""

import os
import subprocess
import sys

import pytest
from support.commands import PACKAGE

from fairseq_sparsemixer import requirements
from fairseq_sparsemixer.errors import UserError

WORKING = {"python": "3.12.1", "torch": "2.6.0+cu124", "ve-fairseq": "0.12.3"}


@pytest.fixture
def installed(monkeypatch):
    """Say what is."""
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # undone where it is refused

    def install(versions):
        versions = {**WORKING, **versions}
        monkeypatch.setattr(requirements.platform, "python_version", lambda: versions["python"])
        monkeypatch.setattr(requirements, "version_of", versions.get)

    return install


@pytest.mark.parametrize(
    "versions",
    [
        {},
        {"python": "3.11.0", "torch": "2.14.1"},
        {"torch": "2.10.0a0+git1234"},
        {"torch": None, "ve-fairseq": None},  # a layer in plain PyTorch that is no package
        {"ve-fairseq": None, "fairseq": "1.0.0a0"},
        {"fairseq": "0.12.2"},  # installed before, and replaced
    ],
)
def test_what_works(versions, installed):
    installed(versions)
    requirements.check()
    requirements.check_fairseq()


@pytest.mark.parametrize(
    ("versions", "message"),
    [
        ({"python": "3.10.13"}, "Python 3.10.13 is not supported: use 3.11 or a later one before"),
        ({"python": "3.13.0rc1"}, "Python 3.13.0rc1 is not supported: use 3.11 or a later one"),
        ({"torch": "2.5.1+cpu"}, r"torch 2.5.1\+cpu is too old: pip install 'torch>=2.6'"),
        ({"ve-fairseq": None, "fairseq": "0.12.2"}, "fairseq 0.12.2 is too old: pip uninstall"),
    ],
)
def test_what_does_not(versions, message, installed):
    installed(versions)
    with pytest.raises(UserError, match=f"^{message}"):
        requirements.check()
        requirements.check_fairseq()


@pytest.mark.parametrize(
    "command",
    [
        ["-m", "fairseq_sparsemixer.cli", "--version"],
        ["-m", "fairseq_cli.train", "data", "--user-dir", str(PACKAGE)],
        ["-c", "from fairseq_sparsemixer.moe import ROUTERS"],
    ],
)
def test_commands_say_it_alone(command, tmp_path):
    """As of a torch that is older than the one there is."""
    about = tmp_path / "torch-2.5.1.dist-info" / "METADATA"
    about.parent.mkdir()
    about.write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.5.1\n")
    result = subprocess.run(
        [sys.executable, *command],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{PACKAGE.parent}"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2
    last = result.stderr.strip().splitlines()[-1]
    assert last == "error: torch 2.5.1 is too old: pip install 'torch>=2.6'"
    assert "Traceback" not in result.stderr
