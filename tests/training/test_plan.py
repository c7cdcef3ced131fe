"""How an update is spread, and what flags come to."""

import pytest
from support import commands
from support.wmt14 import gpus, plan_for

from fairseq_sparsemixer import cli
from fairseq_sparsemixer.commands.train import request
from fairseq_sparsemixer.errors import UserError
from fairseq_sparsemixer.runs.arms import build_variant
from fairseq_sparsemixer.runs.record import check_same
from fairseq_sparsemixer.training import plan
from fairseq_sparsemixer.training.machine import (
    Machine,
)
from fairseq_sparsemixer.training.plan import Batch


@pytest.mark.parametrize(
    ("machine", "wanted", "update_freq"),
    [
        (Machine([], False), None, 16),
        (gpus(1), None, 16),
        (gpus(2), None, 8),
        (gpus(4), None, 4),
        (gpus(8), None, 2),
        (gpus(16, nodes=2), None, 1),
        (gpus(1), 4096, 32),
        (gpus(32, nodes=4), 4096, 1),
        (gpus(64, nodes=8), 1024, 2),
    ],
)
def test_an_update_has_the_same_tokens_on_any_number_of_gpus(machine, wanted, update_freq):
    batch = plan.spread(8192, [16], machine, wanted)
    assert batch == Batch(machine.workers, update_freq, wanted or 8192)
    assert batch.tokens_per_update == 16 * 8192


@pytest.mark.parametrize(
    ("workers", "wanted", "cure"),
    [
        (3, None, "train on 1, 2, 4, 8 or 16 GPUs (CUDA_VISIBLE_DEVICES, --nodes)"),
        (5, None, "train on 1, 2, 4, 8 or 16 GPUs"),
        (7, 4096, "train on 1, 2, 4, 8, 16 or 32 GPUs"),
        (3, 5000, "give another --max-tokens"),
        (32, None, "give --max-tokens 4096, 2048, 1024 or 512"),
        (2, 5000, "give --max-tokens 4096, 2048, 1024 or 512"),
        (1, 100, "give --max-tokens 64, 32, 16 or 8"),
        (1, 0, "--max-tokens must be at least 1"),
    ],
)
def test_a_batch_that_does_not_come_out_even_is_refused(workers, wanted, cure):
    with pytest.raises(UserError) as info:
        plan.spread(8192, [16], gpus(workers), wanted)
    assert cure in str(info.value)


def test_a_batch_by_sentences_is_refused():
    with pytest.raises(UserError, match=r"dataset\.max_tokens and one update_freq"):
        plan.spread(None, [16], gpus(1), None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gpus=two"], "gpus is not set here: use CUDA_VISIBLE_DEVICES, --workers and --nodes"),
        (["model.router=switch"], "use --router"),
        (["common={seed: 3}"], "common.seed is decided by --seed: set common.NAME=VALUE one by"),
        (["--router", "dense", "--experts", "8"], "--experts: such flags are for a router"),
        (["model.dropot=0.1"], "hydra: Could not override 'model.dropot'"),
        (["+modle.dropout=0.3"], "modle: fairseq has no such group of settings"),
        (["--router", "swtch"], "did you mean 'switch'"),
        (["model.top_k=9"], "--top-k must be 1"),
        ([], "run scripts/prepare_wmt14_en_de.sh, or name your own folder with task.data=FOLDER"),
        (["--pipeline", "moses"], "run scripts/prepare_wmt14_en_de.sh --pipeline moses, or"),
    ],
)
def test_what_does_not_work_is_told_in_one_sentence(
    arguments, message, monkeypatch, tmp_path, capsys
):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_names_of_runs():
    def name(*arguments):
        asked = request(commands.parse("train", *arguments))
        return plan.name_of(asked, build_variant(asked.router, asked.experts).name)

    assert name() == "sparsemixer-4-seed1"
    assert name("--router", "dense", "--seed", "2") == "dense-seed2"
    flags = ["--recipe", "released", "--schedule", "short", "--pipeline", "moses"]
    assert name("--experts", "8", *flags) == "sparsemixer-8-released-short-moses-seed1"


@pytest.mark.parametrize("machine", [gpus(8), gpus(16, nodes=2, rank=0)])
def test_a_run_may_go_on_with_more_workers(machine, monkeypatch, tmp_path):
    one, more = (plan_for(each, monkeypatch) for each in (gpus(1), machine))
    started = {
        "settings": one.settings,
        "tokens_per_update": one.batch.tokens_per_update,
        "data": {},
    }
    check_same(tmp_path, started, {**started, "settings": more.settings})
    assert more.batch.tokens_per_update == one.batch.tokens_per_update
