"""What is learnt without a gradient follows the updates that fairseq counts."""

import logging

import pytest
import torch
from support.training import BALANCE_BIAS_RATE, step

from fairseq_sparsemixer import compat
from fairseq_sparsemixer.moe import MoEFeedForward


def overflow(trainer, times, error=None):
    """Let the norm of the gradients be infinite, or fairseq's scaler raise, so many times."""
    original = trainer.optimizer.clip_grad_norm
    left = [times]

    def clip_grad_norm(*args, **kwargs):
        norm = original(*args, **kwargs)
        if not left[0]:
            return norm
        left[0] -= 1
        if error is not None:
            raise error
        for parameter in trainer.model.parameters():
            parameter.grad.zero_()  # what is skipped on a GPU changes nothing
        return torch.tensor(float("inf"))

    trainer.optimizer.clip_grad_norm = clip_grad_norm


def routers(trainer):
    modules = trainer.model.modules()
    return [module.router for module in modules if isinstance(module, MoEFeedForward)]


def biases(trainer):
    return [router.balance_bias.bias.clone() for router in routers(trainer)]


def test_an_update_moves_the_balance_bias_by_one_step(build_trainer):
    trainer, (batch, *_) = build_trainer()
    step(trainer, batch)
    for bias in biases(trainer):
        assert set(bias.abs().tolist()) <= {0.0, BALANCE_BIAS_RATE}
        assert bias.any()
    trainer.set_num_updates(2)  # as where a checkpoint is loaded
    for router, bias in zip(routers(trainer), biases(trainer)):
        assert torch.equal(router.balance_bias.bias, bias)


@pytest.mark.filterwarnings("ignore:.*GradScaler")
def test_a_batch_that_overflows_under_amp_is_not_adapted_to(build_trainer):
    """fairseq tries it again, twice, before it goes on to the next."""
    expected, (batch, *_) = build_trainer()
    step(expected, batch)
    trainer, (batch, *_) = build_trainer(amp=True)
    overflow(trainer, 2)
    step(trainer, batch)
    assert trainer.get_num_updates() == 1
    for bias, once in zip(biases(trainer), biases(expected)):
        assert torch.equal(bias, once)
    overflow(trainer, 3)  # this batch is skipped
    step(trainer, batch)
    assert trainer.get_num_updates() == 1
    for bias, once in zip(biases(trainer), biases(expected)):
        assert torch.equal(bias, once)


def test_a_batch_that_overflows_under_fp16_does_not_count_for_the_next(build_trainer, monkeypatch):
    expected, (_, batch, *_) = build_trainer("default-moe")
    step(expected, batch)
    trainer, (skipped, batch, *_) = build_trainer("default-moe")
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self: self)
    overflow(trainer, 1, OverflowError("played"))
    step(trainer, skipped)
    assert trainer.get_num_updates() == 0
    assert not any(bias.any() for bias in biases(trainer))
    step(trainer, batch)
    for router, other in zip(routers(trainer), routers(expected)):
        for (name, value), once in zip(router.named_buffers(), other.buffers()):
            torch.testing.assert_close(value, once, rtol=0, atol=0, msg=name)


def test_a_moving_average_holds_the_bias_of_its_update(build_trainer):
    trainer, batches = build_trainer(store_ema=True, ema_decay=0.75, ema_fp32=True)
    name = "encoder.layers.0.moe.router.balance_bias.bias"
    found = []
    for batch in batches[:2]:
        step(trainer, batch)
        found.append(biases(trainer)[0])
    assert not torch.equal(*found)
    average = trainer.ema.get_model().state_dict()[name]  # a copy of the first, at first
    torch.testing.assert_close(average, 0.75 * found[0] + 0.25 * found[1])


@pytest.mark.filterwarnings("ignore:.*GradScaler")
def test_amp_divides_by_the_loss_scale_once(build_trainer):
    trainer, _ = build_trainer(amp=True)
    optimiser = trainer.optimizer
    optimiser._grad_scaler = torch.amp.GradScaler("cpu", init_scale=128)
    (weight, *_) = optimiser.params
    found = []

    def step(**_):
        found.append(weight.grad.clone())

    optimiser.optimizer.step = step
    optimiser.zero_grad()
    optimiser.backward((weight * torch.arange(weight.numel()).view_as(weight)).sum())
    optimiser.clip_grad_norm(0.0)
    optimiser.step()
    (gradient,) = found
    assert gradient.flatten().tolist() == list(range(weight.numel()))


PLAIN = {"criterion": "label_smoothed_cross_entropy", "label-smoothing": 0.1}


@pytest.mark.parametrize("plain", [True, False])
def test_a_criterion_that_ignores_the_routing_losses_is_reported_once(plain, build_trainer, caplog):
    compat._warn_of_missing_balance.cache_clear()
    settings = {"criterion": PLAIN} if plain else {}
    trainer, batches = build_trainer(balance_bias_rate=0.0, **settings)
    with caplog.at_level(logging.WARNING):
        for batch in batches:
            trainer.model.eval()
            trainer.get_model().encoder(batch["net_input"]["src_tokens"])  # as in validation
            step(trainer, batch)
    messages = [r.message for r in caplog.records if "ignores the routing losses" in r.message]
    assert len(messages) == plain
    assert all("--criterion label_smoothed_cross_entropy_with_routing" in m for m in messages)


@pytest.mark.parametrize(("router", "rate"), [("hash", 0.0), ("switch", 0.001)])
def test_nothing_is_reported_where_experts_are_balanced(router, rate, build_trainer, caplog):
    compat._warn_of_missing_balance.cache_clear()
    trainer, (batch, *_) = build_trainer(router, criterion=PLAIN, balance_bias_rate=rate)
    with caplog.at_level(logging.WARNING):
        step(trainer, batch)
    assert "ignores the routing losses" not in caplog.text


@pytest.mark.parametrize("router", ["sparsemixer", "default-moe"])
def test_any_criterion_trains_with_a_moving_average(router, build_trainer):
    trainer, batches = build_trainer(router, criterion=PLAIN, store_ema=True, ema_fp32=True)
    for batch in batches:
        step(trainer, batch)
    assert trainer.get_num_updates() == len(batches)
