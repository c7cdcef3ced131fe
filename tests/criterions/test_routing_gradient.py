"""Balance and z-loss: the router's gradient equals a formula and is not zero, whatever wraps it."""

import copy
from types import SimpleNamespace

import pytest
import torch
from fairseq.criterions.label_smoothed_cross_entropy import LabelSmoothedCrossEntropyCriterion
from fairseq.models.ema.ema import EMA
from support.models import TargetTask, build, sample
from support.routers import OF_ANY_TEXT

from fairseq_sparsemixer.criterions import (
    LabelSmoothedCrossEntropyWithRouting,
    RoutingLossesConfig,
)
from fairseq_sparsemixer.moe import ROUTERS, MoEFeedForward

LENGTHS = ((3, 4), (5, 2), (1, 6), (4, 4))
BALANCE, Z = 0.7, 0.3
N = 4


def model_of(encoder_moe_layers="1", **settings):
    return build(
        router="switch",
        jitter_eps=0.0,
        dropout=0.0,
        num_experts=N,
        encoder_moe_layers=encoder_moe_layers,
        decoder_moe_layers="none",
        **settings,
    )


def criterion(balance_weight, z_loss_weight):
    built = LabelSmoothedCrossEntropyWithRouting(TargetTask(), False, 0.1)
    built.configure(RoutingLossesConfig(balance_weight=balance_weight, z_loss_weight=z_loss_weight))
    return built


def routers(model):
    return [module.router for module in model.modules() if isinstance(module, MoEFeedForward)]


def gradients(model, data, wrap=lambda model: model, seed=None):
    """Of each router's weight: what balance and z-loss add to the gradient."""
    found = []
    for weights in ((BALANCE, Z), (0.0, 0.0)):
        model.zero_grad()
        if seed is not None:
            torch.manual_seed(seed)
        criterion(*weights)(wrap(model), data)[0].backward()
        found.append([_gradient(router.weight) for router in routers(model)])
    return [with_losses - without for with_losses, without in zip(*found)]


def _gradient(parameter):
    """Zero where LayerDrop left the layer out."""
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()


def inputs(model, data):
    """(T, D) of each layer with experts: the tokens that are no padding."""
    seen = []
    handles = [
        module.register_forward_pre_hook(lambda _, args: seen.append(args[0][~args[1]].detach()))
        for module in model.modules()
        if isinstance(module, MoEFeedForward)
    ]
    model(**data["net_input"])
    for handle in handles:
        handle.remove()
    return seen


def formula(router, x_TD, sample_size):
    """d/dW of sample_size (BALANCE N sum_i F_i P_i + Z mean logsumexp(z)^2), for one layer."""
    z_TN = (x_TD @ router.weight.t() + router.bias).detach()
    p_TN, tokens = z_TN.softmax(-1), len(z_TN)
    share_N = z_TN.argmax(-1).bincount(minlength=N) / tokens
    balance_TN = N / tokens * p_TN * (share_N - (p_TN * share_N).sum(-1, keepdim=True))
    z_loss_TN = 2 / tokens * z_TN.logsumexp(-1, keepdim=True) * p_TN
    return sample_size * (BALANCE * balance_TN + Z * z_loss_TN).t() @ x_TD


def check(gradient, expected):
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-4)


def compiled(backend):
    def wrap(model):
        torch._dynamo.reset()
        return torch.compile(model, backend=backend)

    return wrap


WAYS = {
    "plain": ({}, lambda model: model),
    "activation checkpointing": ({"checkpoint_activations": True}, lambda model: model),
    "torch.compile": ({}, compiled("aot_eager")),
    "inductor": ({}, compiled("inductor")),
}


@pytest.mark.parametrize(
    "way", [*list(WAYS)[:-1], pytest.param("inductor", marks=pytest.mark.slow)]
)
def test_gradient_by_its_formula(way):
    settings, wrap = WAYS[way]
    model, data = model_of(encoder_layers=2, decoder_layers=1, **settings), sample(LENGTHS)
    (gradient,) = gradients(model, data, wrap)
    check(gradient, formula(routers(model)[0], inputs(model, data)[0], data["ntokens"]))


def test_a_layer_left_out_by_layerdrop_does_not_count():
    """The mean is over the layers that ran, and here one of two does."""
    model, data = model_of("0,2", encoder_layerdrop=0.5), sample(LENGTHS)
    ran = set()
    for seed in range(20):
        torch.manual_seed(seed)
        seen = inputs(model, data)
        if len(seen) == 1:
            torch.manual_seed(seed)
            logs = criterion(BALANCE, Z)(model, data)[2]
            tokens = [logs[f"routing_statistics/encoder.{number}"][0].item() for number in (0, 2)]
            layer = tokens.index(max(tokens))
            difference = gradients(model, data, seed=seed)
            check(difference[layer], formula(routers(model)[layer], seen[0], data["ntokens"]))
            assert not difference[1 - layer].any()
            ran.add(layer)
    assert ran == {0, 1}


def test_two_workers_have_the_gradient_of_the_whole_batch(monkeypatch):
    """Played one after the other; the sum over workers, which DDP forms."""
    model, whole = model_of(encoder_layers=2, decoder_layers=1), sample(LENGTHS)
    halves = []
    for rows in (slice(0, 1), slice(1, 4)):
        net_input = {key: value[rows] for key, value in whole["net_input"].items()}
        target = whole["target"][rows]
        ntokens = int(target.ne(1).sum())
        halves.append({"net_input": net_input, "target": target, "ntokens": ntokens})
    module = "fairseq_sparsemixer.criterions.routing_losses"
    utils = f"{module}.distributed_utils"
    monkeypatch.setattr(f"{utils}.get_data_parallel_world_size", lambda: 2)
    monkeypatch.setattr(f"{utils}.get_data_parallel_group", lambda: None)
    sums = []
    monkeypatch.setattr(f"{utils}.all_reduce", lambda buffer, group: sums.append(buffer.clone()))
    for half in halves:
        criterion(BALANCE, Z)(model, half)
    total = sums[0] + sums[1]
    monkeypatch.setattr(f"{utils}.all_reduce", lambda buffer, group: buffer.copy_(total))
    parts = [gradients(model, half)[0] for half in halves]
    expected = formula(routers(model)[0], inputs(model, whole)[0], whole["ntokens"])
    check(sum(parts), expected)
    # In validation nothing is summed up over workers: logging does that.
    monkeypatch.setattr(f"{utils}.all_reduce", lambda buffer, group: pytest.fail("in validation"))
    criterion(BALANCE, Z)(model.eval(), halves[0])


def ema_of(model):
    config = SimpleNamespace(
        ema_decay=0.75,
        ema_fp32=True,
        ema_start_update=0,
        ema_update_freq=1,
        ema_seed_model=None,
    )
    return EMA(model, config)


@pytest.mark.parametrize("ours", [True, False])
def test_gradient_where_a_moving_average_is_kept(ours):
    """fairseq copies the model when it first needs the average, after forward and backward."""
    model, data = model_of(encoder_layers=2, decoder_layers=1), sample(LENGTHS)
    if not ours:
        loss = LabelSmoothedCrossEntropyCriterion(TargetTask(), False, 0.1)(model, data)[0]
        average = ema_of(model)
        loss.backward()
        average.step(model, 1)
        for name, value in average.get_model().named_parameters():
            assert torch.equal(value, dict(model.named_parameters())[name]), name
        return
    averages = []

    def wrap(model):
        averages.append(ema_of(model))
        return model

    (gradient,) = gradients(model, data, wrap)
    averages[-1].step(model, 1)
    check(gradient, formula(routers(model)[0], inputs(model, data)[0], data["ntokens"]))
    averages.append(ema_of(model))


@pytest.mark.parametrize("router", [*OF_ANY_TEXT, "sparsemixer-cv linear"])
def test_every_router_has_a_moving_average(router):
    """fairseq multiplies everything that a checkpoint holds, in float32."""
    name, _, prediction = router.partition(" ")
    kind = ROUTERS[name]
    settings = {"balance_bias_rate": 0.001} if kind.takes_balance_bias else {}
    if prediction:
        settings["router_options"] = '{"prediction": "linear"}'
    if not kind.causal:
        settings["decoder_moe_layers"] = "none"
    model = build(router=name, top_k=kind.min_top_k, **settings)
    average = ema_of(model)
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        for value in model.state_dict().values():
            value += 1
    average.step(model, 1)
    for key, value in average.get_model().state_dict().items():
        if ".router." in key:
            torch.testing.assert_close(value, before[key] + 0.25, msg=key)
