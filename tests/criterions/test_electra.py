"""ELECTRA's loss: that of transformers, by what fairseq divides by, and what is logged."""

import math

import pytest
import torch
from fairseq.logging import metrics
from support.electra import (
    MASKED,
    OFF,
    PAD,
    QUIET,
    TARGET,
    TOKENS,
    criterion,
    electra,
    sample,
)
from support.models import TargetTask, build
from support.transformers_models import modeling

from fairseq_sparsemixer.criterions import (
    ElectraWithRouting,
    LabelSmoothedCrossEntropyWithRouting,
    MaskedLmWithRouting,
    MaskedLmWithRoutingConfig,
)
from fairseq_sparsemixer.models.config import ConfigError
from fairseq_sparsemixer.models.layers import routing_statistics
from fairseq_sparsemixer.models.switch_electra import REPLACED, uniform_draws
from fairseq_sparsemixer.moe import RoutingStatistics

ON = {"balance_weight": 0.3, "z_loss_weight": 0.2}


def output_of(model, update=0, seed=1):
    draws = uniform_draws(seed, update, torch.tensor([3, 9]), TOKENS.size(1))
    return model(TOKENS, masked_tokens=MASKED, target=TARGET, draws=draws)


# transformers' own


LAYER = {
    "self_attn.q_proj": "attention.self.query",
    "self_attn.k_proj": "attention.self.key",
    "self_attn.v_proj": "attention.self.value",
    "self_attn.out_proj": "attention.output.dense",
    "self_attn_layer_norm": "attention.output.LayerNorm",
    "fc1": "intermediate.dense",
    "fc2": "output.dense",
    "final_layer_norm": "output.LayerNorm",
}


def transformers_config(theirs, width, layers, heads):
    return theirs.ElectraConfig(
        vocab_size=12,
        embedding_size=16,
        hidden_size=width,
        intermediate_size=24 if width == 16 else 4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=66,
        pad_token_id=PAD,
        layer_norm_eps=1e-5,
    )


def renamed(ours, prefix, heads):
    """The parameters of one of our halves under the names of transformers'."""
    state = {}
    for name, value in ours.items():
        place, _, kind = name.rpartition(".")
        if place == "embed_tokens":
            state["electra.embeddings.word_embeddings.weight"] = value
        elif place == "embed_positions":
            state["electra.embeddings.position_embeddings.weight"] = value
        elif place == "layernorm_embedding":
            state[f"electra.embeddings.LayerNorm.{kind}"] = value
        elif place == "embed_projection":
            state[f"electra.embeddings_project.{kind}"] = value
        elif place.startswith("layers."):
            _, number, part = place.split(".", 2)
            if part == "moe.experts":  # the only one
                part, kind, value = (
                    {"1": "fc1", "2": "fc2"}[kind[1]],
                    {"w": "weight", "b": "bias"}[kind[0]],
                    value[0],
                )
            if not part.startswith("moe."):
                state[f"electra.encoder.layer.{number}.{LAYER[part]}.{kind}"] = value
        elif place in heads:
            state[f"{heads[place]}{kind}"] = value
    state["electra.embeddings.token_type_embeddings.weight"] = torch.zeros(2, 16)
    return state


def test_it_is_the_loss_of_transformers_from_the_same_weights():
    """Of ElectraForMaskedLM and ElectraForPreTraining, with one expert whose gate is 1."""
    theirs = modeling("electra")
    model = electra(num_experts=1, **QUIET).eval()
    generator = theirs.ElectraForMaskedLM(transformers_config(theirs, 8, 3, 1)).eval()
    discriminator = theirs.ElectraForPreTraining(transformers_config(theirs, 16, 3, 2)).eval()
    own = model.generator.state_dict()
    heads = {
        "lm_head.dense": "generator_predictions.dense.",
        "lm_head.layer_norm": "generator_predictions.LayerNorm.",
        "lm_head": "generator_lm_head.",
    }
    generator.load_state_dict(renamed(own, "", heads))
    own = {**model.encoder.sentence_encoder.state_dict()}
    head = model.encoder.lm_head.state_dict()
    own.update({f"lm_head.{name}": value for name, value in head.items()})
    heads = {
        "lm_head.dense": "discriminator_predictions.dense.",
        "lm_head.out_proj": "discriminator_predictions.dense_prediction.",
    }
    discriminator.load_state_dict(renamed(own, "", heads))

    given = {
        "attention_mask": TOKENS.ne(PAD).long(),
        # fairseq counts from the number of padding, which has a place of its own.
        "position_ids": torch.where(TOKENS.ne(PAD), torch.arange(6) + 2, PAD),
    }
    labels = TARGET.masked_fill(~MASKED, -100)
    of_words = generator(input_ids=TOKENS, labels=labels, **given)
    predicted, extra = output_of(model)
    torch.testing.assert_close(predicted, of_words.logits[MASKED])
    logits, replaced = extra[REPLACED]
    words = TOKENS.clone()
    words[MASKED] = seen_words(model)[MASKED]
    of_tokens = discriminator(input_ids=words, labels=replaced.long(), **given)
    keep = TOKENS.ne(PAD)
    torch.testing.assert_close(logits[keep], of_tokens.logits[keep])

    loss, sample_size, logs = criterion(**OFF)(model, sample())
    torch.testing.assert_close(loss / sample_size, of_words.loss + 50 * of_tokens.loss)
    torch.testing.assert_close(logs["nll_loss"] / 3, of_words.loss)
    torch.testing.assert_close(logs["discriminator_loss"] / 10, of_tokens.loss)


def seen_words(model):
    seen = []
    hook = model.encoder.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    output_of(model)
    hook.remove()
    return seen[0]


# Ours


@pytest.mark.parametrize("training", [True, False])
def test_routing_losses_of_the_discriminator_are_weighted_by_the_masked_tokens(training):
    model = electra(**QUIET).train(training)
    with_losses, without = (criterion(**weights)(model, sample())[0] for weights in (ON, OFF))
    packed = routing_statistics(model, output_of(model))
    statistics = RoutingStatistics.unpack(torch.stack(list(packed.values())))
    assert statistics.tokens.tolist() == [10, 10]
    extra = 0.3 * statistics.load_balance_loss.mean() + 0.2 * statistics.z_loss.mean()
    torch.testing.assert_close(with_losses - without, 3 * extra, rtol=1e-3, atol=1e-4)


def test_the_weight_of_the_discriminator():
    model = electra(**QUIET)
    losses = [criterion(**OFF, discriminator_weight=w)(model, sample())[0] for w in (0, 1, 3)]
    torch.testing.assert_close(losses[2] - losses[0], 3 * (losses[1] - losses[0]))
    with pytest.raises(ConfigError, match="--discriminator-weight must be a number of at least 0"):
        criterion(discriminator_weight=-1.0)


def test_draws_change_with_updates_and_not_with_validations():
    model, loss = electra(**QUIET), criterion(**OFF)
    model.set_num_updates(5)
    expected = output_of(model, update=5)[1][REPLACED][1]

    def replaced(model):
        return loss(model, sample())[2]["discriminator_loss"]

    fifth = replaced(model.train())
    assert torch.equal(replaced(model), fifth), "nothing else is drawn"
    assert loss(model, sample())[2]["replaced"] == expected.sum()
    valid = replaced(model.eval())
    others = []
    for update in range(6, 9):
        model.set_num_updates(update)
        others.append(replaced(model.train()))
        assert torch.equal(replaced(model.eval()), valid)
    assert any(not torch.equal(other, fifth) for other in others)


def test_the_discriminator_learns_which_words_are_the_generators():
    """Of one that writes the same word everywhere, which is nowhere else."""
    model, loss = electra(**QUIET), criterion(discriminator_weight=1.0)
    with torch.no_grad():
        model.generator.lm_head.bias[10] = 1e4
    optimizer = torch.optim.Adam(model.encoder.parameters(), lr=0.01)
    for update in range(30):
        model.set_num_updates(update)
        optimizer.zero_grad()
        total, sample_size, _ = loss(model, sample())
        (total / sample_size).backward()
        optimizer.step()
    logs = loss(model.eval(), sample())[2]
    assert logs["replaced"] == logs["named"] == logs["found"] == 3
    assert logs["correct"] == logs["counted"] == 10


def test_validation_leaves_the_state_of_random_numbers_alone():
    model = electra(**QUIET).eval()
    before = torch.get_rng_state()
    criterion()(model, sample())
    assert torch.equal(torch.get_rng_state(), before)


def test_what_is_logged():
    model, loss = electra(**QUIET).eval(), criterion(**ON)
    outputs = [loss(model, sample(numbers))[2] for numbers in ((3, 9), (4, 700))]
    logits, replaced = [], []
    for numbers in ((3, 9), (4, 700)):
        draws = uniform_draws(1, 0, torch.tensor(numbers), 6)
        _, extra = model(TOKENS, masked_tokens=MASKED, target=TARGET, draws=draws)
        for found, values in zip((logits, replaced), extra[REPLACED]):
            found += values[TOKENS.ne(PAD)].tolist()
    with metrics.aggregate(new_root=True) as found:
        ElectraWithRouting.reduce_metrics(outputs)
        found = found.get_smoothed_values()
    named = [value > 0 for value in logits]
    both = sum(map(all, zip(named, replaced)))
    right = sum(one == other for one, other in zip(named, replaced))
    bits = [
        math.log2(1 + math.exp(-value if is_replaced else value))
        for value, is_replaced in zip(logits, replaced)
    ]
    assert 0 < both < sum(named)
    assert found["discriminator_loss"] == pytest.approx(sum(bits) / 20, abs=1e-4)
    assert found["accuracy"] == pytest.approx(100 * right / 20)
    assert found["replaced"] == pytest.approx(100 * sum(replaced) / 20)
    assert found["precision"] == pytest.approx(100 * both / sum(named), abs=0.01)
    assert found["recall"] == pytest.approx(100 * both / sum(replaced), abs=0.01)
    nll_loss = sum(output["nll_loss"].item() for output in outputs) / 6 / math.log(2)
    assert found["nll_loss"] == pytest.approx(nll_loss, abs=1e-3)
    assert found["ppl"] == pytest.approx(2**nll_loss, abs=0.02)
    assert found["loss"] > found["nll_loss"] + 50 * found["discriminator_loss"]
    assert set(found) >= {"balance_loss/encoder.0", "router_entropy/encoder.2"}


def test_of_no_token_that_is_taken_for_replaced():
    model = electra(**QUIET).eval()
    with torch.no_grad():
        model.encoder.lm_head.out_proj.bias.fill_(-100.0)
    with metrics.aggregate(new_root=True) as found:
        ElectraWithRouting.reduce_metrics([criterion()(model, sample())[2]])
        found = found.get_smoothed_values()
    assert found["precision"] == found["recall"] == 0
    assert found["accuracy"] == pytest.approx(100 - found["replaced"])


def test_a_batch_without_masked_tokens_has_no_loss():
    data = {**sample(), "target": torch.full_like(TARGET, PAD)}
    loss, sample_size, _ = criterion(**ON)(electra(**QUIET), data)
    assert sample_size == 0
    assert loss == 0


def test_half_precision_is_finite():
    model = electra(**QUIET).half()
    loss, _, logs = criterion(**ON)(model, sample())
    loss.backward()
    assert loss.dtype == torch.float32 and loss.isfinite()
    assert logs["discriminator_loss"].dtype == torch.float32
    assert all(value.grad.isfinite().all() for value in model.parameters())


def test_without_experts():
    loss, _, logs = criterion(**ON)(electra(encoder_moe_layers="none"), sample())
    assert loss.isfinite()
    assert not any("routing" in key for key in logs)


# What does not go together


def test_a_criterion_of_another_kind_of_model():
    masked = MaskedLmWithRouting.build_criterion(MaskedLmWithRoutingConfig(tpu=False), TargetTask())
    with pytest.raises(ConfigError, match="choose electra_with_routing"):
        masked(electra(), sample())
    with pytest.raises(ConfigError, match="choose electra_with_routing"):
        LabelSmoothedCrossEntropyWithRouting(TargetTask(), False, 0.1)(electra(), sample())
    with pytest.raises(ConfigError, match="choose masked_lm_with_routing or sentence_prediction"):
        criterion()(build("switch_roberta_base"), sample())
    with pytest.raises(ConfigError, match="choose label_smoothed_cross_entropy_with_routing"):
        criterion()(build(), sample())
