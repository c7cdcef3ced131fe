"""Models laid out for a CPU, and the search over them, beside fairseq's own."""

import copy
import itertools

import pytest
import torch
from fairseq.models.transformer import TransformerModelBase
from fairseq.search import Sampling
from fairseq.sequence_generator import SequenceGenerator
from omegaconf import OmegaConf
from support.models import Task, batch, build

from fairseq_sparsemixer.models import laid_out
from fairseq_sparsemixer.models.beam_search import _largest
from fairseq_sparsemixer.models.laid_out import lay_out, obstacle
from fairseq_sparsemixer.models.watching import watch_routing
from fairseq_sparsemixer.moe.backends import products

pytestmark = pytest.mark.usefixtures("one_thread")

LENGTHS = ((3, 1), (9, 1), (5, 1), (1, 1), (7, 1))
PREFIX = torch.tensor([[5, 6], [7, 7], [4, 11], [9, 3], [8, 8]])


@pytest.fixture(autouse=True)
def large_enough(monkeypatch):
    """Models this small are packed, too."""
    monkeypatch.setattr(products, "LEAST_WEIGHTS", 0)
    monkeypatch.setattr(products, "LEAST_PRODUCTS", 0)
    monkeypatch.setattr(laid_out, "FIRST_TOKENS", 3)


def translate(models, layout, lengths=LENGTHS, beam=4, steps=None, **settings):
    """fairseq's hypotheses, of models that are laid out or not.

    ``steps`` gets an entry for each that fairseq's decoders make.
    """
    for model in models:
        model.eval()
        model.layout = None
        if layout is not None:
            lay_out(model, layout)
    given = {name: settings.pop(name, None) for name in ("prefix_tokens", "bos_token")}
    settings = {"max_len_b": 12, **settings}
    generator = SequenceGenerator(models, Task().target_dictionary, beam_size=beam, **settings)
    if steps is not None:
        original = generator.model.forward_decoder
        generator.model.forward_decoder = lambda *args: steps.append(1) or original(*args)
    return generator.generate(models, {"net_input": batch(lengths)}, **given)


def assert_same_search(models, **settings):
    """The same hypotheses, and none of them found by fairseq's decoder."""
    steps = []
    expected = translate(models, None, steps=steps, **settings)
    assert steps
    steps.clear()
    found = translate(models, torch.float32, steps=steps, **settings)
    assert not steps
    assert_same(found, expected)


def assert_same(found, expected):
    assert [len(each) for each in found] == [len(each) for each in expected]
    for one, other in zip(itertools.chain(*found), itertools.chain(*expected)):
        assert one["tokens"].tolist() == other["tokens"].tolist()
        for name in ("score", "positional_scores"):
            torch.testing.assert_close(one[name], other[name], rtol=1e-5, atol=1e-5)


def dense(**settings):
    """fairseq's own model."""
    model = build(encoder_moe_layers="none", decoder_moe_layers="none", **settings)
    assert isinstance(model, TransformerModelBase)
    return model


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"beam": 1},
        {"beam": 5, "len_penalty": 0.3, "unk_penalty": 0.7, "temperature": 1.3},
        {"normalize_scores": False, "min_len": 4},
        {"max_len_b": 3},
        {"max_len_a": 1.0, "max_len_b": 2, "tokens_to_suppress": ("a", "c")},
        {"prefix_tokens": PREFIX},
        {"prefix_tokens": PREFIX, "max_len_b": 1},
        {"bos_token": 6, "prefix_tokens": PREFIX[:, :1], "beam": 2},
        {"lengths": ((4, 1),)},
    ],
    ids=str,
)
def test_searches_find_what_fairseq_finds(settings):
    assert_same_search([build(seed=3)], **settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"router": "switch"},
        {"router": "hash"},
        {"router": "topk", "top_k": 2},
        {"router": "expert-choice", "decoder_moe_layers": "none"},
        {"router": "sparsemixer-cv", "encoder_normalize_before": True},
        {"moe_backend": "loop", "activation_fn": "gelu"},
        {"encoder_normalize_before": True, "decoder_normalize_before": True},
        {"encoder_learned_pos": True, "decoder_learned_pos": True, "layernorm_embedding": True},
        {"no_token_positional_embeddings": True, "no_scale_embedding": True},
        {"decoder_input_dim": 8, "decoder_output_dim": 8, "decoder_embed_dim": 32},
        {"share_all_embeddings": True, "encoder_layerdrop": 0.5, "decoder_layerdrop": 0.5},
        {"decoder_attention_heads": 4, "encoder_layers": 1, "dropout": 0.5},
        {"checkpoint_activations": True},
    ],
    ids=str,
)
def test_models_put_out_what_fairseq_puts_out(settings):
    assert_same_search([build(**settings)])


def test_routers_see_what_they_see_in_fairseq():
    model = build(seed=3)
    seen = []
    for name, module in model.named_modules():
        if name.endswith("moe.router"):
            module.register_forward_hook(
                lambda _, args, routing: seen.append((args[0].shape, routing.expert_index.tolist()))
            )
    translate([model], None, lengths=((3, 1), (6, 1)), max_len_b=1)
    expected, seen[:] = list(seen), []
    translate([model], torch.float32, lengths=((3, 1), (6, 1)), max_len_b=1)
    assert seen == expected and len({shape for shape, _ in seen}) == 2


def test_dense_models_and_ensembles():
    assert_same_search([dense(activation_fn="tanh")])
    assert_same_search([build(), dense(seed=1), build(seed=2, encoder_layers=1)])


def test_hypotheses_do_not_depend_on_their_batch():
    model = build(seed=5)
    together = translate([model], torch.float32)
    tokens = batch(LENGTHS)["src_tokens"]
    for row, expected in zip(tokens, together):
        own = row[row.ne(1)].unsqueeze(0)
        sample = {"net_input": {"src_tokens": own}}
        generator = SequenceGenerator([model], Task().target_dictionary, beam_size=4, max_len_b=12)
        assert_same(generator.generate([model], sample), [expected])


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"no_cross_attention": True}, "unusual layers"),
        ({"no_cross_attention": True, "moe_every": 1}, "unusual layers"),
        ({"cross_self_attention": True}, "both sides at once"),
        ({"adaptive_softmax_cutoff": [6, 9]}, "adaptive softmax"),
    ],
    ids=str,
)
def test_other_models_are_left_to_fairseq(settings, reason):
    model = build(**settings)
    assert reason in obstacle(model)
    steps = []
    translate([model], torch.float32, steps=steps)
    assert steps


def test_hooks_are_called():
    """Those that change what passes, too; the routing is watched without leaving this search."""
    model = build(seed=2)
    plain = translate([model], torch.float32)
    with watch_routing(model):
        assert obstacle(model) is None
    layer = model.encoder.layers[1]
    handle = layer.register_forward_hook(lambda _, __, output: torch.zeros_like(output))
    assert "hooks" in obstacle(model)
    changed = translate([model], torch.float32)
    assert_same(changed, translate([model], None))
    handle.remove()
    assert obstacle(model) is None
    assert any(
        not torch.equal(one[0]["tokens"], other[0]["tokens"]) for one, other in zip(plain, changed)
    )


def test_models_made_in_inference_mode_are_left_to_fairseq():
    with torch.inference_mode():
        model = build()
    assert "inference mode" in obstacle(model)
    assert "float32" in obstacle(build().double())
    assert "NoneType is not fairseq's transformer" in obstacle(torch.nn.Linear(2, 2))


def test_dropout_in_translating_is_left_to_fairseq():
    model = build(dropout=0.1)
    options = {"generation": {"beam": 4, "retain_dropout": True, "retain_dropout_modules": None}}
    model.prepare_for_inference_(OmegaConf.create(options))
    assert "drops out" in obstacle(model)


@pytest.mark.parametrize(
    "settings",
    [
        {"search_strategy": Sampling(Task().target_dictionary)},
        {"no_repeat_ngram_size": 2},
        {"prefix_tokens": torch.tensor([[5, 2]] * len(LENGTHS))},  # one that ends
        {"beam": 6},  # of 12 words
    ],
    ids=str,
)
def test_other_searches_are_left_to_fairseq(settings):
    model = build()
    torch.manual_seed(0)
    expected = translate([model], None, **settings)
    torch.manual_seed(0)
    assert_same(translate([model], torch.float32, **settings), expected)


def test_models_that_are_not_prepared_are_left_to_fairseq():
    model = build().eval()
    generator = SequenceGenerator([model], Task().target_dictionary, beam_size=2, max_len_b=5)
    (best, *_), *_ = generator.generate([model], {"net_input": batch()})
    assert best["attention"].numel() > 0


def test_weights_of_8_bits_stay_where_a_model_is_prepared_again():
    """As for each pair of languages."""
    model = build()
    lay_out(model, torch.int8)
    kept = model.layout
    model.prepare_for_inference_(OmegaConf.create({"generation": {"beam": 4}}))
    assert model.layout is kept


def test_it_follows_the_parameters():
    model = build()
    model.prepare_for_inference_(OmegaConf.create({"generation": {"beam": 4}}))
    before = model.layout.of(model)
    assert model.layout.of(model) is before
    with torch.no_grad():
        model.decoder.layers[1].fc1.weight.add_(1.0)
    assert model.layout.of(model) is not before
    other = copy.deepcopy(model)
    assert other.layout.of(other) is not model.layout.of(model)
    assert_same(translate([other], torch.float32), translate([model], torch.float32))


def test_without_onednn(monkeypatch):
    expected = translate([build()], torch.float32)
    monkeypatch.setattr(products, "_LINEAR", None)
    monkeypatch.setattr(products, "_PACK", None)
    assert_same(translate([build()], torch.float32), expected)


@pytest.mark.parametrize("width", [5, 64, 1000, 1024])
def test_largest_of_a_row(width):
    values = torch.randn(7, width).round(decimals=2)
    values[3] = -torch.inf
    values[3, -1] = 0.0
    for count in (1, 4):
        places = _largest(values, count)
        found = values.gather(1, places).sort(descending=True).values
        assert torch.equal(found, values.topk(count).values)
        assert all(len(set(row)) == count for row in places.tolist())


# 8 bits


@pytest.mark.skipif(not products.has_int8(), reason="this PyTorch has no oneDNN")
@pytest.mark.parametrize("relu", [False, True])
def test_products_of_8_bits(relu):
    x, w, b = torch.randn(9, 48), torch.randn(80, 48), torch.randn(80)
    x[4] = 0.0
    x[5] *= 1000.0  # in no other row's way
    packed = products.packed(w, torch.int8)
    y = products.linear(x, packed, b, relu)
    exact = torch.nn.functional.linear(x, w, b)
    exact = exact.relu() if relu else exact
    error = (y - exact).norm(dim=-1) / exact.norm(dim=-1)
    assert 0 < error.max() < 0.03  # of older CPUs, which have 7 bits for x
    assert torch.equal(y[4], b.relu() if relu else b)
    for row in range(len(x)):
        assert torch.equal(products.linear(x[row : row + 1], packed, b, relu)[0], y[row])


@pytest.mark.skipif(not products.has_int8(), reason="this PyTorch has no oneDNN")
def test_translations_of_8_bits():
    model = build(seed=3)
    exact, rounded = (translate([model], dtype) for dtype in (torch.float32, torch.int8))
    experts = [m.experts.packed.dtype for m in model.modules() if hasattr(m, "experts")]
    assert set(experts) == {torch.int8}
    for one, other in zip(exact, rounded):
        assert one[0]["score"] == pytest.approx(float(other[0]["score"]), abs=0.1)
        assert not torch.equal(one[0]["positional_scores"], other[0]["positional_scores"])
    assert_same(translate([model], torch.float32), exact)  # nothing of it is left
