"""The optimiser with one kernel, against fairseq's own Adam."""

import pytest
import torch
from fairseq.optim.adam import FairseqAdam
from fairseq.optim.fp16_optimizer import MemoryEfficientFP16Optimizer
from omegaconf import OmegaConf
from support import commands
from support.commands import parameters
from support.training import assert_same
from torch.utils._python_dispatch import TorchDispatchMode

from fairseq_sparsemixer.models.config import ConfigError
from fairseq_sparsemixer.optim import FusedAdam

SETTINGS = {
    "lr": [0.01],
    "adam_betas": "(0.9, 0.98)",
    "adam_eps": 1e-8,
    "weight_decay": 0.1,
    "use_old_adam": False,
    "fp16_adam_stats": False,
    "tpu": False,
}
FUSED = {"optimizer": "fused_adam", "adam-betas": "(0.9, 0.98)", "lr": 0.01}


class Operations(TorchDispatchMode):
    """Counts what is launched."""

    number = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.number += 1
        return function(*args, **(kwargs or {}))


def updated(optimizer, steps=4):
    """Parameters after some steps, and the operations of one more."""
    torch.manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(7, 5)) for _ in range(30)]
    adam = optimizer(OmegaConf.create(SETTINGS), weights)
    for _ in range(steps):
        for weight in weights:
            weight.grad = torch.randn_like(weight)
        adam.step()
    result = [weight.detach().clone() for weight in weights]
    with Operations() as operations:
        adam.step()
    return result, operations.number


def test_its_steps_are_those_of_fairseq_in_few_operations():
    expected, many = updated(FairseqAdam)
    actual, few = updated(FusedAdam)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
    assert few < 10 < 300 < many


@pytest.mark.parametrize("flag", ["fp16_adam_stats", "tpu"])
def test_what_it_does_not_have_is_refused(flag):
    cfg = OmegaConf.create({**SETTINGS, flag: True})
    weights = [torch.nn.Parameter(torch.zeros(2))]
    cure = "does not go with --{}.*: take adam"
    with pytest.raises(ConfigError, match=cure.format(flag.replace("_", "-"))):
        FusedAdam(cfg, weights)
    adam = FusedAdam(OmegaConf.create(SETTINGS), weights)
    with pytest.raises(ConfigError, match=cure.format("memory-efficient-fp16")):
        MemoryEfficientFP16Optimizer(OmegaConf.create({}), weights, adam)


def train(corpus, folder, **settings):
    return commands.train(
        corpus / "joined", folder, share_all_embeddings=True, save_interval=1000, **settings
    )


def last(folder):
    return parameters(folder / "checkpoint_last.pt")


def test_a_run_goes_on_as_if_it_had_not_stopped(toy_corpus, tmp_path):
    for updates in (7, 12):
        train(toy_corpus, tmp_path / "stopped", optimizer=FUSED, max_update=updates)
    train(toy_corpus, tmp_path / "whole", optimizer=FUSED, max_update=12)
    assert_same(last(tmp_path / "whole"), last(tmp_path / "stopped"))
