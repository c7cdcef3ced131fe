"""The command line: help, version, errors."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import fairseq_sparsemixer
from fairseq_sparsemixer import cli
from fairseq_sparsemixer.errors import UserError


@pytest.mark.parametrize("command", sorted(cli.COMMANDS))
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as info:
        cli.main([command, "--help"])
    assert info.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith(f"usage: fairseq-sparsemixer {command}")
    assert len(out.splitlines()) > 10


def test_version_and_list_of_commands(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert fairseq_sparsemixer.__version__ in capsys.readouterr().out
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    out = capsys.readouterr().out
    assert all(command in out for command in cli.COMMANDS)


def test_a_user_error_is_one_line_and_status_2(monkeypatch, capsys):
    from fairseq_sparsemixer.commands import translate

    def fail(args):
        raise UserError("--beam must be at least 1")

    monkeypatch.setattr(translate, "run", fail)
    assert cli.main(["translate", "somewhere"]) == 2
    assert capsys.readouterr().err == (
        "fairseq-sparsemixer translate: error: --beam must be at least 1\n"
    )


def test_torchrun_without_gpu_is_named():
    command = [sys.executable, "-m", "fairseq_cli.train", "no-data", "--arch", "transformer"]
    package = str(Path(fairseq_sparsemixer.__file__).parent)
    torchrun = {"TORCHELASTIC_RUN_ID": "1", "WORLD_SIZE": "2", "RANK": "0"}
    result = subprocess.run(
        [*command, "--user-dir", package],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", **torchrun},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1
    (error,) = [line for line in result.stderr.splitlines() if "error: " in line]
    assert error.startswith("error: fairseq cannot be started by torchrun on a machine without a")
    assert "Traceback" not in result.stderr
