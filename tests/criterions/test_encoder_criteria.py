"""The criteria of masked words and of sentences: scaled by what fairseq divides by."""

import math
from types import SimpleNamespace

import pytest
import torch
from fairseq.criterions.masked_lm import MaskedLmLoss
from fairseq.criterions.sentence_prediction import SentencePredictionCriterion
from fairseq.data import Dictionary
from fairseq.logging import metrics
from support.models import TargetTask, build

from fairseq_sparsemixer.criterions import (
    LabelSmoothedCrossEntropyWithRouting,
    MaskedLmWithRouting,
    MaskedLmWithRoutingConfig,
    SentencePredictionWithRouting,
    SentencePredictionWithRoutingConfig,
)
from fairseq_sparsemixer.models.config import ConfigError
from fairseq_sparsemixer.models.layers import routing_statistics
from fairseq_sparsemixer.moe import RoutingStatistics

PAD, HEAD = 1, "sentence_classification_head"
TOKENS = torch.tensor([[0, 5, 7, 4, 9, 2], [0, 8, 4, 2, PAD, PAD]])
MASKED = torch.tensor([[PAD, 6, PAD, PAD, 9, PAD], [PAD, PAD, 5, PAD, PAD, PAD]])
OFF = {"balance_weight": 0.0, "z_loss_weight": 0.0}
ON = {"balance_weight": 0.3, "z_loss_weight": 0.2}


class LabelTask(TargetTask):
    @property
    def label_dictionary(self):
        return self.target_dictionary


def sample(target):
    return {
        "net_input": {"src_tokens": TOKENS, "src_lengths": TOKENS.ne(PAD).sum(1)},
        "target": target,
        "ntokens": int(TOKENS.ne(PAD).sum()),
        "nsentences": len(TOKENS),
    }


def masked_lm(**settings):
    cfg = MaskedLmWithRoutingConfig(tpu=False, **settings)
    return MaskedLmWithRouting.build_criterion(cfg, TargetTask())


def sentence_prediction(**settings):
    cfg = SentencePredictionWithRoutingConfig(**settings)
    return SentencePredictionWithRouting.build_criterion(cfg, LabelTask())


def plain_masked_lm():
    return MaskedLmLoss(SimpleNamespace(tpu=False), TargetTask())


def plain_sentence_prediction():
    return SentencePredictionCriterion(SentencePredictionWithRoutingConfig(), LabelTask())


KINDS = {
    "masked_lm": (masked_lm, plain_masked_lm, sample(MASKED), 3),
    "sentence_prediction": (
        sentence_prediction,
        plain_sentence_prediction,
        sample(torch.tensor([[2], [0]])),
        2,
    ),
}


def model_of(**settings):
    model = build(
        "switch_roberta_base",
        router="switch",
        jitter_eps=0.0,
        dropout=0.0,
        attention_dropout=0.0,
        **settings,
    )
    model.register_classification_head(HEAD, num_classes=3)
    return model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("training", [True, False])
def test_routing_losses_are_weighted_by_what_fairseq_divides_by(kind, training):
    ours, plain, data, size = KINDS[kind]
    model = model_of().train(training)
    loss, sample_size, logs = ours(**ON)(model, data)
    packed = routing_statistics(model, model(**data["net_input"]))
    statistics = RoutingStatistics.unpack(torch.stack(list(packed.values())))
    assert statistics.tokens.tolist() == [10, 10], "every token that is no padding is routed"
    extra = 0.3 * statistics.load_balance_loss.mean() + 0.2 * statistics.z_loss.mean()
    expected, _, of_fairseq = plain()(model, data)
    assert sample_size == size
    torch.testing.assert_close(loss, expected + size * extra)
    assert logs["loss"] == loss
    torch.testing.assert_close(logs["nll_loss"], of_fairseq["loss"])


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_of_a_router_by_its_formula(kind):
    ours, _, data, size = KINDS[kind]
    model = model_of(encoder_moe_layers="1")
    (moe,) = [layer.moe for layer in model.encoder.sentence_encoder.layers if hasattr(layer, "moe")]
    seen = []
    moe.register_forward_pre_hook(lambda _, args: seen.append(args[0][~args[1]].detach()))

    def gradient(**weights):
        model.zero_grad()
        ours(**weights)(model, data)[0].backward()
        return moe.router.weight.grad.clone()

    difference = gradient(**ON) - gradient(**OFF)
    x_TD = seen[0]
    z_TN = (x_TD @ moe.router.weight.t() + moe.router.bias).detach()
    p_TN, tokens = z_TN.softmax(-1), len(x_TD)
    share_N = z_TN.argmax(-1).bincount(minlength=4) / tokens
    balance_TN = 4 / tokens * p_TN * (share_N - (p_TN * share_N).sum(-1, keepdim=True))
    z_loss_TN = 2 / tokens * z_TN.logsumexp(-1, keepdim=True) * p_TN
    expected = size * (0.3 * balance_TN + 0.2 * z_loss_TN).t() @ x_TD
    assert expected.abs().max() > 0.01
    torch.testing.assert_close(difference, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_logged(kind):
    """In base 2: loss is what is trained on, nll_loss is fairseq's, and ppl is of that."""
    ours, plain, data, _ = KINDS[kind]
    model, criterion = model_of().eval(), ours(**ON)
    outputs = [criterion(model, data)[2] for _ in range(2)]
    with metrics.aggregate(new_root=True) as found:
        type(criterion).reduce_metrics(outputs)
        found = found.get_smoothed_values()
    with metrics.aggregate(new_root=True) as expected:
        type(plain()).reduce_metrics([plain()(model, data)[2]])
        expected = expected.get_smoothed_values()
    assert found["nll_loss"] == pytest.approx(expected["loss"])
    total = sum(o["loss"] for o in outputs) / sum(o["sample_size"] for o in outputs) / math.log(2)
    assert found["loss"] == pytest.approx(float(total), abs=1e-3)
    assert found["loss"] > found["nll_loss"] + 0.3
    for name in ("ppl", "accuracy"):
        assert (name in found) == (name in expected)
        assert found.get(name) == pytest.approx(expected.get(name))
    assert set(found) >= {"balance_loss/encoder.0", "router_entropy/encoder.2"}


def test_a_batch_without_masked_tokens_has_no_loss():
    loss, sample_size, _ = masked_lm(**ON)(model_of(), sample(torch.full_like(TOKENS, PAD)))
    assert sample_size == 0
    assert loss == 0


def test_regression_has_the_routing_losses_too():
    model = model_of()
    model.register_classification_head(HEAD, num_classes=1)
    data = sample(torch.tensor([0.5, -1.0]))
    with_losses, without = (
        sentence_prediction(regression_target=True, **weights)(model, data)[0]
        for weights in (ON, OFF)
    )
    assert with_losses > without + 0.3


class NumberTask(TargetTask):
    """Whose classes are numbers, as those of GLUE's that need more than their share."""

    def __init__(self):
        super().__init__()
        self.label_dictionary = Dictionary()
        for label in ("1", "0"):
            self.label_dictionary.add_symbol(label)


MEASURES = {
    # Of targets 1 1 1 1 0 0 and predictions 1 1 1 0 1 0: three found, one more named, one missed.
    "report_mcc": {"mcc": 100 * (3 * 1 - 1 * 1) / (4 * 4 * 2 * 2) ** 0.5},
    "report_acc_and_f1": {"f1": 75.0, "acc_and_f1": 70.8, "accuracy": 66.7},
    # Of 1 2 3 and 1 3 2: deviations -1 0 1 and -1 1 0, which are the ranks', too.
    "report_pearson_and_spearman": {"pearson": 50.0, "spearman": 50.0},
}


@pytest.mark.parametrize("measure", MEASURES)
def test_measures_of_glue_by_hand(measure):
    """Of all batches together, and, where there are several workers, of all of them."""
    scores = measure == "report_pearson_and_spearman"
    cfg = SentencePredictionWithRoutingConfig(regression_target=scores, **{measure: True})
    criterion = SentencePredictionWithRouting.build_criterion(cfg, NumberTask())
    assert not criterion.logging_outputs_can_be_summed()
    assert sentence_prediction().logging_outputs_can_be_summed()
    model = model_of().eval()
    model.register_classification_head(HEAD, num_classes=1 if scores else 2)
    if scores:
        batches = [([[1.0]], [1.0]), ([[3.0], [2.0]], [2.0, 3.0])]
    else:
        one, none = [2.0, -2.0], [-2.0, 2.0]  # "1" is the first class
        batches = [([one, one, one, none], [0, 0, 0, 0]), ([one, none], [1, 1])]
    outputs = []
    for logits, targets in batches:
        head = torch.nn.Module()
        head.forward = lambda _, logits=logits: torch.tensor(logits)
        model.classification_heads[HEAD] = head
        outputs.append(criterion(model, sample(torch.tensor(targets)))[2])
    with metrics.aggregate(new_root=True) as found:
        type(criterion).reduce_metrics(outputs)
        found = found.get_smoothed_values()
    for name, expected in MEASURES[measure].items():
        assert found[name] == pytest.approx(expected, abs=0.06), name


# What does not go together


def test_a_criterion_of_another_kind_of_model():
    message = "choose masked_lm_with_routing or sentence_prediction_with_routing"
    with pytest.raises(ConfigError, match=message):
        LabelSmoothedCrossEntropyWithRouting(TargetTask(), False, 0.1)(model_of(), sample(MASKED))
    with pytest.raises(ConfigError, match="choose label_smoothed_cross_entropy_with_routing"):
        masked_lm()(build(), sample(MASKED))


def test_a_criterion_of_another_task():
    with pytest.raises(ConfigError, match="needs --task sentence_prediction"):
        SentencePredictionWithRouting.build_criterion(
            SentencePredictionWithRoutingConfig(), TargetTask()
        )
    with pytest.raises(ConfigError, match="needs --task masked_lm"):
        MaskedLmWithRouting.build_criterion(MaskedLmWithRoutingConfig(), LabelTask())


def test_a_head_that_does_not_exist():
    criterion = sentence_prediction(classification_head_name="topci")
    with pytest.raises(ConfigError, match=f"has no head 'topci', but '{HEAD}'"):
        criterion(model_of(), KINDS["sentence_prediction"][2])
