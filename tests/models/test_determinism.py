"""The same seed gives the same bits again, on a CPU with as many threads."""

import copy

import pytest
import torch
from omegaconf import OmegaConf
from support import commands, training
from support.commands import parameters
from support.routers import OF_ANY_TEXT
from support.training import assert_same

from fairseq_sparsemixer import determinism
from fairseq_sparsemixer.errors import UserError
from fairseq_sparsemixer.moe import ROUTERS

UPDATES = 3
WIDE = {
    f"model.{side}_{name}": size
    for side in ("encoder", "decoder")
    for name, size in (("embed_dim", 128), ("ffn_embed_dim", 512))
}
WIDE.update({"dataset.batch_size": None, "dataset.max_tokens": 2000})
"""So much that PyTorch shares it out over threads."""


@pytest.fixture(autouse=True)
def switched_off(monkeypatch):
    """What the flag changes in the process is undone."""
    monkeypatch.delenv(determinism.WORKSPACE, raising=False)
    yield
    determinism.follow(False)
    assert torch.utils.deterministic.fill_uninitialized_memory  # PyTorch's default


@pytest.fixture(scope="module")
def settings(toy_corpus, tmp_path_factory):
    """Of a training whose first update takes a step of full length, too."""
    optimizer = {**commands.ADAM, "warmup-updates": 1, "warmup-init-lr": 0.01}
    folder = tmp_path_factory.mktemp("run")
    return training.configure(toy_corpus / "joined", folder, batch_size=4, optimizer=optimizer)


@pytest.fixture
def trained(settings):
    """The parameters after some updates, and the norm of the first one's gradient."""

    def train(name, subset="test1", **more):
        cfg = copy.deepcopy(settings)
        router = ROUTERS[name]
        changes = {"model.router": name, "model.top_k": router.min_top_k, **more}
        if not router.causal:
            changes["model.decoder_moe_layers"] = "none"
        if not router.takes_balance_bias:
            changes["model.balance_bias_rate"] = 0.0
        for key, value in changes.items():
            OmegaConf.update(cfg, key, value)
        trainer, batches = training.build_trainer(cfg, subset)
        for number in range(UPDATES):
            training.step(trainer, batches[number % len(batches)])
            if number == 0:
                norms = [p.grad.norm() for p in trainer.model.parameters() if p.grad is not None]
        assert trainer.get_num_updates() == UPDATES
        return trainer.model.state_dict(), torch.stack(norms).norm().item()

    return train


@pytest.mark.parametrize("name", OF_ANY_TEXT)
def test_every_router_gives_the_same_bits_again(name, trained, one_thread):
    (first, _), (second, _) = trained(name), trained(name)
    assert_same(second, first)


def test_another_seed_gives_others(trained, one_thread):
    (first, _), (other, _) = trained("sparsemixer"), trained("sparsemixer", **{"common.seed": 2})
    assert any(not torch.equal(other[key], first[key]) for key in first)


@pytest.mark.slow
@pytest.mark.parametrize("name", OF_ANY_TEXT)
def test_two_threads_give_the_same_bits_again(name, trained, one_thread):
    """And another rounding than one, which shows that they share the work."""
    one, norm = trained(name, subset="train", **WIDE)
    torch.set_num_threads(2)
    try:
        (first, norm_of_two), (second, _) = (
            trained(name, subset="train", **WIDE) for _ in range(2)
        )
    finally:
        torch.set_num_threads(1)  # as all of this module have it
    assert_same(second, first)
    assert any(not torch.equal(one[key], first[key]) for key in first)
    assert norm_of_two == pytest.approx(norm, rel=1e-5)


def test_processes_that_load_data_change_nothing(stopped, toy_corpus, tmp_path):
    commands.train(
        toy_corpus / "joined",
        tmp_path,
        share_all_embeddings=True,
        num_workers=2,
        max_update=10,
        validate_interval=1000,
        save_interval=1000,
    )
    expected, actual = (parameters(path / "checkpoint_last.pt") for path in (stopped, tmp_path))
    assert_same(actual, expected)


@pytest.mark.parametrize("name", ["sparsemixer", "default-moe"])
def test_on_a_cpu_the_flag_changes_nothing(name, trained, one_thread):
    (without, _) = trained(name)
    assert not torch.are_deterministic_algorithms_enabled()
    (with_it, _) = trained(name, **{"model.deterministic": True})
    assert torch.are_deterministic_algorithms_enabled()
    assert_same(with_it, without)
    trained(name)  # the next one of a sweep
    assert not torch.are_deterministic_algorithms_enabled()


def test_who_has_asked_pytorch_for_it_keeps_it(trained):
    torch.use_deterministic_algorithms(True)
    try:
        trained("switch")
        trained("switch", **{"model.deterministic": True})
        trained("switch")
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def test_an_operator_without_a_deterministic_form_is_refused(build_trainer, monkeypatch):
    trainer, batches = build_trainer(deterministic=True)
    index, value = torch.tensor([0]), torch.ones(1)
    monkeypatch.setattr(trainer.criterion, "forward", lambda *_: torch.zeros(2).put_(index, value))
    with pytest.raises(UserError, match=r"^--deterministic: PyTorch has no .* of put_: train wi"):
        training.step(trainer, batches[0])
