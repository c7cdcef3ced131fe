"""The language model with experts, and that it is fairseq's where it has one."""

import argparse
import functools

import pytest
import torch
from fairseq.models.transformer_lm import TransformerLanguageModel, TransformerLanguageModelConfig
from support.models import Task, build, copy_into_dense, draw_alike

from fairseq_sparsemixer.models.config import ConfigError
from fairseq_sparsemixer.models.layers import routing_statistics, switch_layers
from fairseq_sparsemixer.moe import RoutingStatistics

PAD = 1
TOKENS = torch.tensor([[2, 5, 7, 4, 9], [2, 8, 4, PAD, PAD]])
OWN = {"tokens_per_sample": 64, "max_target_positions": 64, "add_bos_token": False, "tpu": False}


def language_model(**settings):
    return build("switch_transformer_lm", **OWN, **settings)


def test_offloading_activations_is_checkpointing():
    layers = language_model(offload_activations=True).decoder.layers
    assert isinstance(layers[0].forward, functools.partial)


def dense_of(model, **settings):
    args = argparse.Namespace(**vars(TransformerLanguageModelConfig()))
    for name, value in {**OWN, **settings}.items():
        setattr(args, name, value)
    for name in ("embed_dim", "ffn_embed_dim", "attention_heads", "layers"):
        setattr(args, f"decoder_{name}", getattr(model.cfg.decoder, name))
    return TransformerLanguageModel.build_model(args, Task())


WAYS = {
    "plain": {},
    "shared": {"share_decoder_input_output_embed": True, "decoder_output_dim": 16},
    "prenorm": {"decoder_normalize_before": True, "scale_attn": True},
    "adaptive": {
        "adaptive_softmax_cutoff": "6",
        "adaptive_input": True,
        "adaptive_input_cutoff": "6",
        "decoder_output_dim": 16,
        "decoder_input_dim": 16,
        "tie_adaptive_weights": True,
    },
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("training", [False, True])
def test_one_expert_with_gate_one_equals_fairseqs_transformer_lm(way, training):
    settings = {"decoder_input_dim": 16, "dropout": 0.2, **WAYS[way]}
    model = language_model(num_experts=1, router="sparsemixer", **settings).train(training)
    dense = dense_of(model, **settings).train(training)
    copy_into_dense(model, dense)
    draw_alike(model, dense)
    keep = TOKENS.ne(PAD)
    output, expected = model(TOKENS), dense(TOKENS)
    torch.testing.assert_close(output[0][keep], expected[0][keep])
    of_both = [
        each.get_normalized_probs(out, log_probs=True)
        for each, out in ((model, output), (dense, expected))
    ]
    torch.testing.assert_close(of_both[0][keep], of_both[1][keep])


def test_without_experts_it_is_fairseqs_transformer_lm():
    model = language_model(decoder_moe_layers="none").eval()
    dense = dense_of(model).eval()
    dense.load_state_dict(model.state_dict())
    assert torch.equal(model(TOKENS)[0], dense(TOKENS)[0])


def test_statistics_come_with_the_output():
    model = language_model()
    packed = routing_statistics(model, model(TOKENS))
    assert list(packed) == ["decoder.0", "decoder.2"]
    statistics = RoutingStatistics.unpack(torch.stack(list(packed.values())))
    assert statistics.tokens.tolist() == [8, 8]


@pytest.mark.parametrize("router", ["sparsemixer", "hash"])
def test_writing_step_by_step_equals_the_whole(router):
    model = language_model(router=router).eval()
    tokens, state = TOKENS[:1], {}
    steps = [
        model.decoder(tokens[:, : i + 1], incremental_state=state)[0]
        for i in range(tokens.shape[1])
    ]
    torch.testing.assert_close(torch.cat(steps, 1), model(tokens)[0])


def test_layers_that_are_left_out_by_pruning():
    whole, pruned = language_model(seed=1), language_model(seed=2, decoder_layers_to_keep="0,2")
    assert list(switch_layers(pruned)) == ["decoder.0", "decoder.2"]
    settings = argparse.Namespace(arch="switch_transformer_lm", decoder_layers_to_keep="0,2")
    pruned.load_state_dict(whole.state_dict(), model_cfg=settings)
    left, right = (each.decoder.layers for each in (whole, pruned))
    assert torch.equal(left[2].moe.experts.w1, right[1].moe.experts.w1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scale_fc": True}, "--scale-fc must be off"),
        ({"router": "expert-choice"}, "--router expert-choice looks at all words"),
        ({"quant_noise_scalar": 0.1}, "--quant-noise-scalar must be 0"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(ConfigError, match=message):
        language_model(**settings)


def test_there_is_no_encoder_to_give_experts_to():
    with pytest.raises(ConfigError, match=r"model settings: .*encoder_moe_layers"):
        build("switch_transformer_lm_gpt", **OWN, encoder_moe_layers="0")
