"""The criterion: what it adds to the loss, and what it logs."""

import math

import pytest
import torch
from fairseq.criterions.label_smoothed_cross_entropy import LabelSmoothedCrossEntropyCriterion
from fairseq.logging import metrics
from support.models import TargetTask, build, sample

from fairseq_sparsemixer.criterions import (
    LabelSmoothedCrossEntropyWithRouting,
    RoutingLossesConfig,
)
from fairseq_sparsemixer.models.config import ConfigError
from fairseq_sparsemixer.models.layers import routing_statistics
from fairseq_sparsemixer.moe import RoutingStatistics

LENGTHS = [(3, 4), (5, 2), (1, 6), (4, 4)]


def criterion(sentence_avg=False, **settings):
    built = LabelSmoothedCrossEntropyWithRouting(TargetTask(), sentence_avg, 0.1)
    built.configure(RoutingLossesConfig(**settings))
    return built


def deterministic_model(**settings):
    return build(router="switch", jitter_eps=0.0, dropout=0.0, **settings)


def statistics_of(model, data):
    packed = routing_statistics(model, model(**data["net_input"]))
    return RoutingStatistics.unpack(torch.stack(list(packed.values())))


def plain_loss(model, data):
    return LabelSmoothedCrossEntropyCriterion(TargetTask(), False, 0.1)(model, data)[0]


@pytest.mark.parametrize("training", [True, False])
def test_corrected_loss_is_weighted_by_sample_size_and_averaged_over_layers(training):
    model, data = deterministic_model().train(training), sample(LENGTHS)
    loss, sample_size, logs = criterion(balance_weight=0.3, z_loss_weight=0.2)(model, data)
    statistics = statistics_of(model, data)
    assert sample_size == sum(target + 1 for _, target in LENGTHS)
    extra = 0.3 * statistics.load_balance_loss.mean() + 0.2 * statistics.z_loss.mean()
    torch.testing.assert_close(loss, plain_loss(model, data) + sample_size * extra)
    assert logs["loss"] == loss
    assert statistics.tokens.tolist() == [17, 17, 20, 20], "source and target tokens, no padding"


def test_released_loss_is_a_sum_over_layers_without_sample_size():
    model, data = deterministic_model(), sample(LENGTHS)
    loss, _, _ = criterion(routing_loss="released", balance_weight=0.3)(model, data)
    extra = 0.3 * statistics_of(model, data).sampling_load_balance_loss.sum()
    torch.testing.assert_close(loss, plain_loss(model, data) + extra)


def test_released_loss_reads_the_masked_probabilities():
    model, data = build(dropout=0.0, router_init_scale=9.0).eval(), sample(LENGTHS)
    statistics = statistics_of(model, data)
    assert (statistics.probs - statistics.sampling_probs).abs().max() > 0.1
    loss = criterion(routing_loss="released", balance_weight=1.0)(model, data)[0]
    f, p = statistics.expert_share, statistics.sampling_probs / statistics.tokens.unsqueeze(-1)
    torch.testing.assert_close(loss - plain_loss(model, data), 4 * (f * p).sum())


def gradients(model, losses):
    model.zero_grad()
    for loss in losses:
        loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def test_accumulated_gradient_is_that_of_the_whole_batch():
    """--update-freq: cross-entropy and z-loss add up; micro-batches of one composition."""
    model = deterministic_model()
    loss_of = criterion(balance_weight=0.0, z_loss_weight=0.5)
    halves = [sample(tuple(LENGTHS), seed) for seed in (1, 2)]
    whole = {
        "net_input": {
            key: torch.cat([half["net_input"][key] for half in halves])
            for key in halves[0]["net_input"]
        },
        "target": torch.cat([half["target"] for half in halves]),
        "ntokens": sum(half["ntokens"] for half in halves),
    }
    accumulated = gradients(model, (loss_of(model, half)[0] for half in halves))
    at_once = gradients(model, [loss_of(model, whole)[0]])
    torch.testing.assert_close(accumulated, at_once, rtol=1e-5, atol=1e-5)


def test_accumulated_balance_loss_is_the_sum_over_micro_batches():
    """Each micro-batch has its own shares; with equal ones that is the whole batch."""
    model = deterministic_model()
    loss_of = criterion(balance_weight=2.0)
    half = sample(LENGTHS)
    whole = {
        "net_input": {k: torch.cat([v, v]) for k, v in half["net_input"].items()},
        "target": torch.cat([half["target"]] * 2),
        "ntokens": 2 * half["ntokens"],
    }
    accumulated = gradients(model, (loss_of(model, half)[0] for _ in range(2)))
    at_once = gradients(model, [loss_of(model, whole)[0]])
    torch.testing.assert_close(accumulated, at_once, rtol=1e-5, atol=1e-5)
    different = [sample(tuple(LENGTHS), seed) for seed in (1, 2)]
    separate = gradients(model, (loss_of(model, half)[0] for half in different))
    summed = gradients(model, [sum(loss_of(model, half)[0] for half in different)])
    torch.testing.assert_close(separate, summed, rtol=1e-5, atol=1e-5)


def test_importance_loss_is_that_of_noisy_topk():
    model = build(router="noisy-topk", top_k=2, dropout=0.0)
    data = sample(LENGTHS)
    torch.manual_seed(5)
    loss = criterion(balance_weight=0.3, balance_loss="importance")(model, data)[0]
    torch.manual_seed(5)
    plain = plain_loss(model, data)
    torch.manual_seed(5)
    statistics = statistics_of(model, data)
    words = sum(target + 1 for _, target in LENGTHS)
    squared = [
        (sums.std(-1, unbiased=False) / sums.mean(-1)) ** 2
        for sums in (statistics.sampling_probs, statistics.load)
    ]
    expected = plain + 0.3 * words * (squared[0] + squared[1]).mean()
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("balance_loss", ["switch", "importance"])
@pytest.mark.parametrize("scope", ["all-workers", "worker"])
def test_scope_of_the_balance_loss(balance_loss, scope, monkeypatch):
    """Two workers, played one after the other: all-workers is the gradient of the whole batch."""
    model = deterministic_model()
    whole, halves = sample(LENGTHS), [sample(LENGTHS[:2]), sample(LENGTHS[2:])]
    # Of one random stream, so that the halves together are the whole.
    for key in ("src_tokens", "prev_output_tokens"):
        for half, rows in zip(halves, (slice(0, 2), slice(2, 4))):
            half["net_input"][key] = whole["net_input"][key][rows]
    for half, rows in zip(halves, (slice(0, 2), slice(2, 4))):
        half["net_input"]["src_lengths"] = whole["net_input"]["src_lengths"][rows]
        half["target"] = whole["target"][rows]
        half["ntokens"] = int(half["target"].ne(1).sum())
    settings = {"balance_weight": 2.0, "balance_loss": balance_loss, "balance_scope": scope}

    def balance_gradient(data):
        with_loss = criterion(**settings)(model, data)[0] - plain_loss(model, data)
        return torch.cat(
            [
                g.flatten()
                for g in torch.autograd.grad(with_loss, model.parameters(), allow_unused=True)
                if g is not None
            ]
        )

    expected = balance_gradient(whole)
    assert expected.abs().max() > 1e-3
    module = "fairseq_sparsemixer.criterions.routing_losses"
    utils = f"{module}.distributed_utils"
    sums = []
    monkeypatch.setattr(f"{utils}.get_data_parallel_world_size", lambda: 2)
    monkeypatch.setattr(f"{utils}.get_data_parallel_group", lambda: None)
    monkeypatch.setattr(f"{utils}.all_reduce", lambda buffer, group: sums.append(buffer.clone()))
    for half in halves:
        balance_gradient(half)
    if scope == "worker":
        assert not sums
        return
    total = sums[0] + sums[1]
    monkeypatch.setattr(f"{utils}.all_reduce", lambda buffer, group: buffer.copy_(total))
    torch.testing.assert_close(
        sum(balance_gradient(half) for half in halves), expected, rtol=1e-4, atol=1e-5
    )


class Workers:
    """The workers of one batch, played one after the other: each sums what all of them have."""

    def __init__(self, monkeypatch, count):
        module = "fairseq_sparsemixer.criterions.routing_losses"
        utils = f"{module}.distributed_utils"
        self.sums, self.total = [], None
        monkeypatch.setattr(f"{utils}.get_data_parallel_world_size", lambda: count)
        monkeypatch.setattr(f"{utils}.get_data_parallel_group", lambda: None)
        monkeypatch.setattr(f"{utils}.all_reduce", self.all_reduce)

    def all_reduce(self, buffer, group):
        self.sums.append(buffer.clone())
        if self.total is not None:
            buffer.copy_(self.total)

    def losses(self, loss_of, batches):
        """Of each worker, once all have said what they have."""
        self.sums, self.total = [], None
        for batch_of_worker in batches:
            loss_of(batch_of_worker)
        self.total = sum(self.sums)
        return [loss_of(batch_of_worker) for batch_of_worker in batches]


@pytest.mark.parametrize("balance_loss", ["switch", "importance"])
def test_all_workers_together_count_a_balance_loss_once(balance_loss, monkeypatch):
    """In value too: fairseq logs the sum over workers. Equal batches, so equal shares."""
    model, data = deterministic_model(), sample()
    loss_of = criterion(balance_weight=2.0, balance_loss=balance_loss)

    def balance_of(batch_of_worker):
        return (loss_of(model, batch_of_worker)[0] - plain_loss(model, batch_of_worker)).item()

    alone = balance_of(data)
    assert alone > 0.1
    of_workers = Workers(monkeypatch, 3).losses(balance_of, [data] * 3)
    # Three times the tokens at the same value for each of them.
    assert sum(of_workers) == pytest.approx(3 * alone, rel=1e-4)


def test_validation_needs_no_other_worker(monkeypatch):
    """Whose number of batches may be another: who waited for it would wait for ever."""
    model, data = deterministic_model(), sample()
    workers = Workers(monkeypatch, 2)
    criterion(balance_weight=2.0)(model.eval(), data)
    assert not workers.sums
    criterion(balance_weight=2.0)(model.train(), data)
    assert len(workers.sums) == 1


def test_the_mean_is_over_the_layers_that_ran():
    """LayerDrop leaves out all of the encoder here."""
    model, data = deterministic_model(encoder_layerdrop=1.0).train(), sample(LENGTHS)
    loss = criterion(balance_weight=0.3, z_loss_weight=0.2)(model, data)[0]
    statistics = statistics_of(model, data)
    assert statistics.tokens.tolist() == [0, 0, 20, 20]
    per_layer = 0.3 * statistics.load_balance_loss + 0.2 * statistics.z_loss
    assert per_layer[0] == 0
    torch.testing.assert_close(loss, plain_loss(model, data) + 20 * per_layer[2:].sum() / 2)


@pytest.mark.parametrize("settings", [{"balance_weight": 3.0}, {"z_loss_weight": 0.7}])
def test_the_gradient_that_the_router_gets_of_its_losses(settings):
    """By the formulas, at the last layer, which no other layer's loss goes through."""
    model, data = deterministic_model(), sample(LENGTHS)
    router = model.decoder.layers[-1].moe.router
    seen = []
    router.register_forward_pre_hook(lambda module, args: seen.append(args))
    loss_of = criterion(**{"balance_weight": 0.0, **settings})
    difference = loss_of(model, data)[0] - plain_loss(model, data)
    weights = [p for name, p in model.named_parameters() if name.endswith("router.weight")]
    gradients = torch.autograd.grad(difference, weights)
    assert len(gradients) == 4 and all(gradient.abs().max() > 1e-3 for gradient in gradients)

    x, padding = seen[0][:2]
    x = x[~padding].detach()
    tokens, num_experts = len(x), router.num_experts
    z = x @ router.weight.detach().t() + router.bias.detach()
    p = z.softmax(-1)
    if "balance_weight" in settings:
        share = torch.nn.functional.one_hot(z.argmax(-1), num_experts).float().mean(0)
        d_z = 3.0 * num_experts / tokens * p * (share - (p * share).sum(-1, keepdim=True))
    else:
        d_z = 0.7 * 2 / tokens * z.logsumexp(-1, keepdim=True) * p
    expected = tokens * d_z.t() @ x / 4  # sample_size; the mean over four layers
    torch.testing.assert_close(gradients[-1], expected, rtol=1e-3, atol=1e-5)


def test_a_dense_model_gets_the_plain_loss():
    model, data = (
        build(encoder_moe_layers="none", decoder_moe_layers="none").eval(),
        sample(LENGTHS),
    )
    loss, _, logs = criterion(balance_weight=5.0)(model, data)
    torch.testing.assert_close(loss, plain_loss(model, data))
    assert not [key for key in logs if key.startswith("routing")]


def reduce(logging_outputs):
    with metrics.aggregate(new_root=True) as aggregate:
        for outputs in logging_outputs:
            LabelSmoothedCrossEntropyWithRouting.reduce_metrics(outputs)
    return aggregate.get_smoothed_values()


def test_logged_routing_is_right_over_batches_and_workers():
    model = deterministic_model().eval()
    loss_of = criterion()
    parts = [sample(((3, 4), (5, 2)), 1), sample(((1, 6), (4, 4), (2, 2)), 2)]
    statistics = [statistics_of(model, part) for part in parts]
    logs = [loss_of(model, part)[2] for part in parts]
    names = ["encoder.0", "encoder.2", "decoder.0", "decoder.2"]
    packed = sum(s.pack() for s in statistics)
    whole = RoutingStatistics.unpack(packed.detach())
    # Two workers of one batch: their sums add up to the whole batch.
    values = reduce([logs])
    expected = {
        "balance_loss": whole.load_balance_loss,
        "z_loss": whole.z_loss,
        "router_entropy": whole.mean_entropy,
        "max_expert_share": whole.expert_share.amax(-1),
        "min_expert_share": whole.expert_share.amin(-1),
    }
    for key, by_layer in expected.items():
        for name, value in zip(names, by_layer.tolist()):
            assert values[f"{key}/{name}"] == pytest.approx(value, abs=1e-4)
    assert values["balance_loss"] == pytest.approx(whole.load_balance_loss.mean().item(), abs=1e-4)
    assert values["max_expert_share"] == pytest.approx(whole.expert_share.max().item(), abs=1e-4)
    assert values["min_expert_share"] == pytest.approx(whole.expert_share.min().item(), abs=1e-4)
    assert 0 < values["router_entropy"] <= math.log(4)
    # Two batches of one worker, as in validation: the same tokens, the same numbers.
    one_by_one = reduce([[log] for log in logs])
    for key in values:
        if "loss" not in key or key.startswith(("balance_loss", "z_loss")):
            assert one_by_one[key] == pytest.approx(values[key], abs=1e-3), key
    assert not [key for key in one_by_one if key.startswith("_")]


def test_sums_of_a_long_validation_stay_exact():
    """float32 would not count a token after 16,777,216."""
    log = criterion()(deterministic_model(), sample())[2]
    key = "routing_statistics/encoder.0"
    many, one = (torch.full_like(log[key], value) for value in (2.0**24, 1.0))
    with metrics.aggregate(new_root=True) as aggregate:
        for packed in (many, one):
            LabelSmoothedCrossEntropyWithRouting.reduce_metrics([{**log, key: packed}])
    assert aggregate[f"_{key}"].sum.tolist() == [2.0**24 + 1] * len(one)


def test_a_layer_that_did_not_run_has_no_value():
    log = criterion()(deterministic_model(), sample(LENGTHS))[2]
    name = "routing_statistics/encoder.0"
    rest = {**log, name: torch.zeros_like(log[name])}
    with metrics.aggregate(new_root=True) as aggregate:
        LabelSmoothedCrossEntropyWithRouting.reduce_metrics([log])
        with_all = aggregate.get_smoothed_values()
        aggregate.reset()
        LabelSmoothedCrossEntropyWithRouting.reduce_metrics([rest])
        without_one = aggregate.get_smoothed_values()
    for metric in ("balance_loss", "router_entropy", "max_expert_share", "min_expert_share"):
        assert without_one[f"{metric}/encoder.0"] is None
        assert without_one[f"{metric}/decoder.2"] == with_all[f"{metric}/decoder.2"]
        assert without_one[metric] is not None


def test_logging_outputs_are_sums():
    assert LabelSmoothedCrossEntropyWithRouting.logging_outputs_can_be_summed()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"balance_weight": -1.0}, "--balance-weight must be"),
        ({"z_loss_weight": 1e30}, "--z-loss-weight must be .* below 10000"),
        ({"z_loss_weight": math.nan}, "--z-loss-weight must be"),
        ({"routing_loss": "released", "z_loss_weight": 0.1}, "--z-loss-weight must be 0 with"),
        ({"routing_loss": "released", "balance_loss": "importance"}, "--balance-loss must be"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ConfigError, match=message):
        criterion(**settings)


def test_losses_stay_float32_in_half_precision():
    model, data = build(dropout=0.0).to(torch.bfloat16), sample(LENGTHS)
    packed = routing_statistics(model, model(**data["net_input"]))
    assert {value.dtype for value in packed.values()} == {torch.float32}


def test_sentence_average_weights_by_sentences():
    model, data = deterministic_model(), sample(LENGTHS)
    by_sentence = criterion(sentence_avg=True, balance_weight=1.0)
    loss, sample_size, _ = by_sentence(model, data)
    assert sample_size == len(LENGTHS)
    balance = statistics_of(model, data).load_balance_loss.mean()
    torch.testing.assert_close(loss, plain_loss(model, data) + sample_size * balance)


def test_losses_of_single_words_are_fairseqs():
    """reduce=False, by which fairseq scores words; no routing loss belongs to one of them."""
    model, data = deterministic_model().eval(), sample(LENGTHS)
    loss, _, logs = criterion(balance_weight=3.0)(model, data, reduce=False)
    plain = LabelSmoothedCrossEntropyCriterion(TargetTask(), False, 0.1)
    expected = plain(model, data, reduce=False)[0]
    assert loss.numel() == data["target"].numel()
    torch.testing.assert_close(loss, expected)
    assert torch.equal(logs["loss"], loss)
    assert [key for key in logs if key.startswith("routing_statistics/")]
