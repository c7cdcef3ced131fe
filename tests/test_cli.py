"""The command line: help, version, errors."""

import subprocess
import sys

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
    import os

    import torch

    if torch.cuda.is_available():
        pytest.skip("only fails without a GPU")
    result = subprocess.run(
        [sys.executable, "-c", "import fairseq, fairseq_sparsemixer"],
        env={**os.environ, "TORCHELASTIC_RUN_ID": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode
    assert "fairseq cannot be started by torchrun on a machine without a GPU" in result.stderr
