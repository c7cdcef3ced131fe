"""The training command: runs that are started, interrupted and gone on with."""

import json
import signal
import time

import pytest
import torch
from omegaconf import OmegaConf
from support import commands
from support.wmt14 import TINY

from fairseq_sparsemixer import cli
from fairseq_sparsemixer.errors import UserError
from fairseq_sparsemixer.files import sha256_of
from fairseq_sparsemixer.locks import sole_user
from fairseq_sparsemixer.runs import mending as checkpoints
from fairseq_sparsemixer.runs import record
from fairseq_sparsemixer.runs.logs import read_log
from fairseq_sparsemixer.training import launch


def command(corpus, runs, *arguments):
    flags = ["--runs", str(runs), "--experts", "2", "--router", "switch"]
    data = f"task.data={corpus / 'bin'}"
    return ["train", *flags, *arguments, *TINY, data, "optimization.max_update=160"]


@pytest.fixture(scope="module")
def interrupted(corpus, tmp_path_factory):
    """A run that was ended by SIGTERM after its first checkpoints; returns its ``runs``."""
    runs = tmp_path_factory.mktemp("interrupted")
    folder = runs / "switch-2-seed1"
    started = commands.start(
        "fairseq_sparsemixer.cli", *command(corpus, runs), prelude=commands.HEAR_INTERRUPTIONS
    )
    deadline = time.monotonic() + commands.TIMEOUT_SECONDS
    while not list(folder.glob("checkpoint_*_8.pt")):
        assert started.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    started.send_signal(signal.SIGTERM)
    (result,) = commands.finish(started)
    assert result.returncode == 130, result.stderr
    assert "run the same command again to go on" in result.stderr
    return runs


def test_an_interrupted_run_goes_on(interrupted, corpus, capsys):
    folder = interrupted / "switch-2-seed1"
    # Killed while fairseq copied it.
    last = folder / "checkpoint_last.pt"
    last.write_bytes(last.read_bytes()[:2000])
    (folder / "checkpoint_1_12.pt.tmp").write_bytes(b"")
    with sole_user(folder, "--runs"):  # whoever trained in it has ended
        pass
    arguments = command(corpus, interrupted, "--max-tokens", "50")

    assert cli.main([*arguments, "model.dropout=0.2"]) == 2
    assert "was trained with model.dropout=0.1, not 0.2:" in capsys.readouterr().err
    assert cli.main([*arguments, "dataset.max_tokens=200"]) == 2
    assert "was trained with tokens_per_update=200, not 400:" in capsys.readouterr().err

    copied = folder / "dict.en.txt"
    written = json.loads((folder / record.RECORD).read_text())
    assert written["data"][copied.name] == sha256_of(copied)
    with pytest.raises(UserError, match=r"was trained with dict\.en\.txt="):
        record.check_same(folder, written, {**written, "data": {copied.name: "another"}})

    assert cli.main(arguments) == 0
    out = capsys.readouterr().out
    assert "goes on from checkpoint_" in out
    assert "1 x 4 x 50 tokens an update, fp32, on the CPU" in out
    assert f"score      scripts/evaluate_wmt14.sh {folder}" in out
    assert "Loaded checkpoint" in (folder / launch.LOG).read_text()
    assert checkpoints.is_intact(last)
    assert commands.load(last)["optimizer_history"][-1]["num_updates"] == 160
    assert not list(folder.glob("*.tmp"))
    # All that is needed to translate.
    for name in ("dict.en.txt", "dict.de.txt", "sentencepiece.bpe.model"):
        assert (folder / name).read_bytes() == (corpus / "bin" / name).read_bytes()
    config = OmegaConf.load(folder / ".hydra" / "config.yaml")
    assert config.dataset.max_tokens == 50 and config.optimization.update_freq == [4]

    before = (folder / launch.LOG).read_text()
    assert cli.main(arguments) == 0
    assert "finished before" in capsys.readouterr().out
    assert (folder / launch.LOG).read_text() == before

    written = json.loads((folder / record.RECORD).read_text())
    assert [start["update_freq"] for start in written["starts"]] == [2, 4]
    assert written["update_freq"] == 4 and written["tokens_per_update"] == 200
    assert written["workers"] == 1 and written["gpus"] == []
    assert written["settings"]["model"]["num_experts"] == 2
    assert written["settings"]["optimizer"]["adam_eps"] == 1e-8
    assert written["versions"]["torch"] == torch.__version__
    total = read_log(folder / launch.LOG).parameters  # as fairseq counted
    assert written["parameters"]["total"] == total > written["parameters"]["active"]


def test_a_folder_of_another_origin_is_left_alone(corpus, tmp_path, capsys):
    folder = tmp_path / "switch-2-seed1"
    folder.mkdir()
    (folder / "checkpoint_last.pt").write_bytes(b"of somebody")
    assert cli.main(command(corpus, tmp_path)) == 2
    assert "holds checkpoints, but no run.json" in capsys.readouterr().err
    assert (folder / "checkpoint_last.pt").read_bytes() == b"of somebody"
