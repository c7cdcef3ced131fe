"""ELECTRA with experts: its two halves, and the words that the one draws for the other."""

import copy

import pytest
import torch
from support.electra import MASKED, PAD, QUIET, TARGET, TOKENS, criterion, electra, sample
from support.models import build

from fairseq_sparsemixer.models.config import ConfigError
from fairseq_sparsemixer.models.layers import STATISTICS, switch_layers
from fairseq_sparsemixer.models.switch_electra import REPLACED, sample_words, uniform_draws

DRAWS = uniform_draws(1, 0, torch.arange(2), TOKENS.size(1))


def seen_by(model):
    """What the discriminator is given, call after call."""
    seen = []
    model.encoder.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    return seen


def run(model, draws=DRAWS):
    return model(TOKENS, masked_tokens=MASKED, target=TARGET, draws=draws)


# The words that are replaced


def test_masked_words_alone_become_those_of_the_generator():
    model = electra(**QUIET)
    seen = seen_by(model)
    predicted, extra = run(model)
    assert predicted.shape == (3, 12)
    expected = TOKENS.clone()
    expected[MASKED] = sample_words(predicted, DRAWS[MASKED], PAD)
    assert torch.equal(seen[0], expected)
    logits, replaced = extra[REPLACED]
    assert torch.equal(replaced, MASKED & expected.ne(TARGET))
    torch.testing.assert_close(logits, model(expected)[0])


def test_a_word_that_is_drawn_as_it_was_is_not_replaced():
    model = electra(**QUIET)
    with torch.no_grad():
        model.generator.lm_head.bias[5] = 100.0
    replaced = run(model)[1][REPLACED][1]
    assert replaced.tolist() == [[False] * 4 + [True, False], [False, False, True] + [False] * 3]


@pytest.mark.parametrize("masked_tokens", [None, torch.ones_like(MASKED)])
def test_a_batch_without_masked_words_is_left_as_it_is(masked_tokens):
    """fairseq then has all words predicted."""
    model = electra(**QUIET)
    seen = seen_by(model)
    nothing = torch.full_like(TARGET, PAD)
    _, extra = model(TOKENS, masked_tokens=masked_tokens, target=nothing, draws=DRAWS)
    assert torch.equal(seen[0], TOKENS)
    assert not extra[REPLACED][1].any()


def test_words_are_drawn_as_often_as_is_likely():
    logits = torch.tensor([0.5, 9.0, -1.0, 2.0, -30.0])
    draws = (torch.arange(20_000) + 0.5) / 20_000
    found = sample_words(logits.expand(20_000, 5), draws, never=1).bincount(minlength=5) / 20_000
    likely = logits.exp()
    likely[1] = 0
    torch.testing.assert_close(found, likely / likely.sum(), atol=1e-4, rtol=0)
    assert not found[1]


def test_words_can_be_drawn_from_half_precision_and_after_an_overflow():
    logits = torch.full((3, 8), 5.0, dtype=torch.float16)
    logits[1], logits[2, 4] = float("nan"), float("inf")
    found = sample_words(logits, torch.tensor([0.0, 0.5, 1 - 2**-53], dtype=torch.float64), PAD)
    assert found.ge(0).all() and found.lt(8).all()


def test_draws_follow_from_what_they_are_for():
    sentences = torch.tensor([3, 9, 2**40])
    draws = uniform_draws(1, 7, sentences, 400)
    assert torch.equal(draws[:, :50], uniform_draws(1, 7, sentences, 50))
    assert torch.equal(draws[1:2], uniform_draws(1, 7, sentences[1:2], 400))
    assert draws.ge(0).all() and draws.lt(1).all()
    others = [uniform_draws(*key, sentences, 400) for key in ((2, 7), (1, 8))]
    columns = torch.stack([each.flatten() for each in (draws, *others)])
    quantiles = columns.sort().values - (torch.arange(1200) + 0.5) / 1200
    assert quantiles.abs().max() < 1.63 / 1200**0.5  # Kolmogorov and Smirnov's, at 1 %
    for rows in (columns, draws):
        assert (rows.corrcoef() - torch.eye(3)).abs().max() < 0.15


def test_draws_are_those_of_splitmix():
    """By numbers without a sign, as it is published."""

    def mixed(x):
        x = (x + 0x9E3779B97F4A7C15) % 2**64
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
        return x ^ x >> 31

    state = 5
    for part in (11, 9, 2):
        state = (mixed(state) + part) % 2**64
    expected = (mixed(state) >> 11) / 2**53
    assert uniform_draws(5, 11, torch.tensor([9]), 3)[0, 2].item() == expected


# The two halves


def test_embeddings_are_shared_and_learn_from_both():
    model = electra(**QUIET)
    shared = model.encoder.sentence_encoder
    for name in ("embed_tokens", "embed_positions", "layernorm_embedding"):
        assert getattr(model.generator, name) is getattr(shared, name)
    assert model.generator.lm_head.weight is shared.embed_tokens.weight
    predicted, extra = run(model)
    for part in (predicted, extra[REPLACED][0]):
        weights = (shared.embed_tokens.weight, shared.embed_positions.weight)
        of_tokens, of_positions = torch.autograd.grad(part.square().sum(), weights)
        assert of_tokens[7].any() and of_positions[3].any()


def test_no_gradient_goes_through_the_draw():
    model = electra(**QUIET)
    logits = run(model)[1][REPLACED][0]
    logits.sum().backward()
    own = dict(model.generator.named_parameters())
    for name in ("embed_tokens", "embed_positions", "layernorm_embedding"):
        own = {key: value for key, value in own.items() if not key.startswith(name)}
    assert own.pop("lm_head.weight", None) is None
    assert len(own) > 40
    assert all(value.grad is None for value in own.values())


def test_statistics_are_of_the_discriminators_experts():
    model = electra(**QUIET)
    assert list(switch_layers(model)) == ["encoder.0", "encoder.2"]
    assert list(run(model)[1][STATISTICS]) == ["encoder.0", "encoder.2"]
    assert len(model.generator.layers) == 3


def test_sizes_of_the_generator():
    model = build("switch_electra", encoder_embed_dim=32, generator_layers=1)
    (layer,) = model.generator.layers
    assert layer.fc1.weight.shape == (32, 8)
    assert layer.self_attn.num_heads == 1
    assert electra(generator_embed_dim=16).generator.layers[0].self_attn.num_heads == 2
    prenorm = electra(encoder_normalize_before=True)
    assert prenorm.generator.layer_norm.weight.shape == (8,)
    assert run(prenorm)[0].isfinite().all()


def test_of_fairseqs_checkpointing_the_same_gradient():
    plain, again = electra(**QUIET), electra(**QUIET, checkpoint_activations=True)
    again.load_state_dict(plain.state_dict())
    for model in (plain, again):
        criterion()(model, sample())[0].backward()
    others = dict(again.named_parameters())
    for name, value in plain.named_parameters():
        torch.testing.assert_close(others[name].grad, value.grad, msg=name)


def test_copies_share_within_themselves_alone():
    """As the moving average is one."""
    model = electra(**QUIET)
    twin = copy.deepcopy(model)
    assert twin.generator.embed_tokens is twin.encoder.sentence_encoder.embed_tokens
    assert twin.generator.embed_tokens is not model.generator.embed_tokens


def test_hash_routes_by_the_words_that_are_there():
    model = electra(**{**QUIET, "router": "hash"})
    seen = seen_by(model)
    chosen = []
    layer = switch_layers(model)["encoder.0"]
    layer.moe.register_forward_hook(lambda _, __, output: chosen.append(output[1].expert_index))
    run(model)
    model(seen[0])
    assert torch.equal(*chosen)


# What it is afterwards


def test_what_is_left_of_it_in_a_roberta():
    trained, tuned = electra(seed=1), build("switch_roberta_base", seed=2)
    before = copy.deepcopy(tuned.encoder.lm_head.dense.state_dict())
    tuned.register_classification_head("topic", num_classes=3)
    tuned.load_state_dict(dict(trained.state_dict()))
    for model in (trained, tuned):
        model.eval()
    expected = trained(TOKENS, features_only=True)[0]
    assert expected.shape == (2, 6, 16)
    torch.testing.assert_close(tuned(TOKENS, features_only=True)[0], expected)
    assert tuned.encoder.lm_head.weight is tuned.encoder.sentence_encoder.embed_tokens.weight
    for name, value in tuned.encoder.lm_head.dense.state_dict().items():
        assert torch.equal(value, before[name])


def test_its_own_checkpoint():
    trained, fresh = electra(seed=1), electra(seed=2)
    fresh.load_state_dict(dict(trained.state_dict()))
    for name, value in trained.state_dict().items():
        assert torch.equal(value, fresh.state_dict()[name]), name


def test_what_does_not_fit():
    state = electra().state_dict()
    embedding = "encoder.sentence_encoder.embed_tokens.weight"
    larger = {**state, embedding: torch.zeros(20, 16)}
    with pytest.raises(ConfigError, match=r"is \(20, 16\) there .* --srcdict"):
        build("switch_roberta_base").load_state_dict(larger)
    with pytest.raises(
        ConfigError, match=r"it has no encoder\.lm_head\.out_proj.* give the --arch"
    ):
        electra().load_state_dict(build("switch_roberta_base").state_dict())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"generator_embed_dim": 0}, "--generator-embed-dim must be at least 1, not 0"),
        ({"generator_layers": -1}, "--generator-layers must be at least 1, not -1"),
        ({"generator_embed_dim": 17}, r"--generator-embed-dim \(17\) must be a multiple of"),
        ({"encoder_layers_to_keep": "0,2"}, "--encoder-layers-to-keep must not be given"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(ConfigError, match=message):
        electra(**settings)


def test_it_predicts_no_masked_words_alone():
    with pytest.raises(ConfigError, match="--criterion electra_with_routing"):
        electra()(TOKENS, masked_tokens=MASKED)
