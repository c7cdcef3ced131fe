"""The exported model against fairseq's: every router and every setting, with cache and without."""

import pytest
import torch
from support.exported import exported
from support.models import Task, batch, build
from support.reference_routers import fits
from support.routers import random_layer

from fairseq_sparsemixer.errors import UserError
from fairseq_sparsemixer.export.description import describe, describe_router
from fairseq_sparsemixer.export.modeling_sparsemixer import Mixture, SparseMixerConfig
from fairseq_sparsemixer.moe import ROUTERS
from fairseq_sparsemixer.moe.routers.composed import ComposedRouter

pytestmark = pytest.mark.usefixtures("one_thread")


ROUTING = [
    *((name, k, {}) for name in ROUTERS for k in (1, 2, 4) if fits(name, 4, k)),
    ("topk", 2, {"renormalise": True}),
    ("topk", 2, {"balance_bias_rate": 0.1}),
    ("sparsemixer-v2", 2, {"gate": "full", "balance_bias_rate": 0.1}),
    ("sparsemixer-v2-star", 3, {"jitter_eps": 1e9}),
    ("sparsemixer", 1, {"gate": "full"}),
    ("sparsemixer", 1, {"omega": False, "bias": False}),
    ("reinmax", 1, {"balance_bias_rate": 0.1}),
    ("hash", 1, {"gate": "full", "seed": 7}),
    *(
        ("composed", 1, {"gate": gate, "choice": choice, "estimator": estimator})
        for gate in ComposedRouter.gates
        for choice, estimator in (("masked-sample", "midpoint"), ("full-sample", "midpoint"))
        if (gate, choice) != ("masked", "full-sample")
    ),
]


@pytest.mark.parametrize(("name", "top_k", "options"), ROUTING)
def test_a_mixture_is_that_of_evaluation(name, top_k, options):
    torch.manual_seed(top_k)
    layer = random_layer(name, 4, top_k, **options).eval()
    rule = layer.router.evaluation_rule()
    if name in ("expert-choice", "language"):
        assert rule is None
        return
    config = SparseMixerConfig(num_experts=4, router=describe_router(layer.router))
    mixture = Mixture(config, 6, 10)
    mixture.load_state_dict(layer.state_dict(), strict=False)
    x, ids = torch.randn(3, 50, 6), torch.randint(100, (3, 50))
    expected, routing = layer(x, token_ids=ids)
    index, gate, _ = mixture.router(x.flatten(0, 1), ids.flatten())
    assert torch.equal(index, routing.expert_index)
    torch.testing.assert_close(gate, routing.gate)
    torch.testing.assert_close(mixture(x, ids), expected)


def test_a_router_that_no_rule_describes_is_refused():
    model = build(router="expert-choice", decoder_moe_layers="none")
    with pytest.raises(UserError, match="'expert-choice' cannot be exported: a token's experts do"):
        describe(model, Task())


MODELS = [
    {},
    {"encoder_moe_layers": "none", "decoder_moe_layers": "none"},
    {"arch": "transformer", "share_decoder_input_output_embed": True},
    {"share_all_embeddings": True, "encoder_normalize_before": True, "router": "default-moe"},
    {"decoder_normalize_before": True, "no_decoder_final_norm": True, "router": "hash"},
    {"encoder_learned_pos": True, "decoder_learned_pos": True, "layernorm_embedding": True},
    {"no_token_positional_embeddings": True, "no_scale_embedding": True, "router": "random"},
    {"encoder_embed_dim": 18, "decoder_embed_dim": 16, "decoder_output_dim": 10},
    {"encoder_layers_to_keep": "0,2", "decoder_layers_to_keep": "1,2"},
    *({"activation_fn": name} for name in ("gelu", "gelu_accurate", "tanh", "linear")),
]


@pytest.mark.parametrize("settings", MODELS, ids=str)
@torch.no_grad()
def test_logits_are_fairseqs(settings):
    """With padding on either side, at once and token by token."""
    model = build(**{"max_source_positions": 20, "max_target_positions": 20, **settings}).eval()
    ours = exported(model)
    inputs = batch(lengths=((3, 4), (5, 2), (1, 0)))
    source, target = inputs["src_tokens"], inputs["prev_output_tokens"]
    expected, _ = model(**inputs)
    real = target != 1
    got = ours(input_ids=source, decoder_input_ids=target).logits
    torch.testing.assert_close(got[real], expected[real], atol=1e-5, rtol=1e-4)
    # Padding on the right, with its mask, and the encoder run before.
    right = torch.stack([torch.cat([row[row != 1], row[row == 1]]) for row in source])
    mask = (right != 1).long()
    memory = ours.encoder(right, mask)
    cache, steps = None, []
    for place in range(target.shape[1]):
        step = ours(
            attention_mask=mask,
            encoder_outputs=memory,
            decoder_input_ids=target[:, place : place + 1],
            past_key_values=cache,
            use_cache=True,
        )
        cache = step.past_key_values
        steps.append(step.logits)
    torch.testing.assert_close(torch.cat(steps, 1)[real], expected[real], atol=1e-5, rtol=1e-4)
    assert cache.get_seq_length() == target.shape[1]


@torch.no_grad()
def test_labels_give_the_mean_loss():
    model = build().eval()
    inputs = batch()
    target = inputs["prev_output_tokens"]
    labels = torch.cat([target[:, 1:], torch.ones(len(target), 1, dtype=torch.long)], 1)
    given = labels.masked_fill(labels == 1, -100)
    loss = exported(model)(input_ids=inputs["src_tokens"], labels=given).loss
    log_probs = model(**inputs)[0].log_softmax(-1)
    expected = -log_probs.gather(-1, labels.unsqueeze(-1)).squeeze(-1)[labels != 1].mean()
    torch.testing.assert_close(loss, expected)


def test_parameters_that_it_has_no_place_for_are_refused():
    model = build()
    model.decoder.layers[0].w_resid = torch.nn.Parameter(torch.ones(16))
    with pytest.raises(UserError, match=r"model\.pt cannot .* has decoder\.layers\.0\.w_resid"):
        exported(model)
    with pytest.raises(UserError, match=r"its model has no decoder\.layers\.0\.encoder_attn"):
        exported(build(no_cross_attention=True))


def test_what_is_missing_is_said():
    ours = exported(build())
    with pytest.raises(ValueError, match="decoder_input_ids or labels"):
        ours(input_ids=torch.tensor([[4, 2]]))
    with pytest.raises(ValueError, match="input_ids or encoder_outputs"):
        ours(decoder_input_ids=torch.tensor([[2]]))


def test_half_precision_routes_in_float32():
    model = build(router="sparsemixer")
    ours = exported(model).to(torch.bfloat16)
    mixture = ours.encoder.layers[0].moe
    x = torch.randn(40, 16).to(torch.bfloat16)
    _, gate, logits = mixture.router(x, torch.zeros(40, dtype=torch.long))
    assert gate.dtype == logits.dtype == torch.float32
    assert ours(**{"input_ids": torch.tensor([[5, 2]]), "decoder_input_ids": torch.tensor([[2]])})
