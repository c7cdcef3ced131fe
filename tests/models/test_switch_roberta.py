"""RoBERTa with experts: what it is made of, and that it is fairseq's where it has one."""

import argparse
import copy

import pytest
import torch
from fairseq.models.roberta import RobertaHubInterface, RobertaModel
from support.models import Task, build, copy_into_dense, draw_alike

from fairseq_sparsemixer.models.config import ConfigError
from fairseq_sparsemixer.models.layers import routing_statistics, switch_layers
from fairseq_sparsemixer.moe import RoutingStatistics

PAD = 1
TOKENS = torch.tensor([[0, 5, 7, 4, 9, 2], [0, 8, 4, 2, PAD, PAD]])


def roberta(**settings):
    return build("switch_roberta_base", **settings)


def dense_of(model):
    args = copy.deepcopy(model.args)
    del args.cfg
    return RobertaModel.build_model(args, Task())


@pytest.mark.parametrize("router", ["switch", "sparsemixer"])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("prenorm", [False, True])
def test_one_expert_with_gate_one_equals_fairseqs_roberta(router, training, prenorm):
    model = roberta(
        num_experts=1, router=router, dropout=0.2, encoder_normalize_before=prenorm
    ).train(training)
    dense = dense_of(model).train(training)
    copy_into_dense(model, dense)
    draw_alike(model, dense)
    keep = TOKENS.ne(PAD)  # padding is not routed, and nobody reads what becomes of it
    torch.testing.assert_close(model(TOKENS)[0][keep], dense(TOKENS)[0][keep])
    for head_of in (model, dense):
        torch.manual_seed(3)
        head_of.register_classification_head("topic", num_classes=3)
    actual, expected = (
        each(TOKENS, classification_head_name="topic")[0] for each in (model, dense)
    )
    torch.testing.assert_close(actual, expected)
    assert actual.shape == (2, 3)


def test_without_experts_it_is_fairseqs_roberta_from_the_same_draws():
    model = roberta(seed=4, encoder_moe_layers="none").eval()
    torch.manual_seed(4)
    dense = dense_of(model).eval()
    expected = dense.state_dict()
    assert model.state_dict().keys() == expected.keys()
    for name, value in model.state_dict().items():
        assert torch.equal(value, expected[name]), name
    assert torch.equal(model(TOKENS)[0], dense(TOKENS)[0])


def test_experts_begin_as_fairseqs_feed_forward_network():
    """BERT's N(0, 0.02) without bias, every expert its own."""
    model = roberta(encoder_ffn_embed_dim=2048, num_experts=3)
    experts = switch_layers(model)["encoder.0"].moe.experts
    for weight in (*experts.w1, *experts.w2):
        assert weight.std().item() == pytest.approx(0.02, rel=0.02)
        assert weight.mean().abs() < 0.001
    assert not experts.b1.any() and not experts.b2.any()
    assert not torch.equal(experts.w1[0], experts.w1[1])


def test_statistics_are_of_the_tokens_that_are_no_padding():
    model = roberta()
    packed = routing_statistics(model, model(TOKENS, features_only=True))
    assert list(packed) == ["encoder.0", "encoder.2"]
    statistics = RoutingStatistics.unpack(torch.stack(list(packed.values())))
    assert statistics.tokens.tolist() == [10, 10]
    statistics.load_balance_loss.sum().backward()
    for layer in switch_layers(model).values():
        assert layer.moe.router.weight.grad.any()


@pytest.mark.parametrize("settings", [{"checkpoint_activations": True}, {"encoder_layerdrop": 0.5}])
def test_other_ways_of_fairseq_are_kept(settings):
    torch.manual_seed(1)
    same = {"router": "switch", "jitter_eps": 0.0, "dropout": 0.0, "attention_dropout": 0.0}
    model, plain = roberta(**same, **settings), roberta(**same)
    plain.load_state_dict(model.state_dict())
    if "encoder_layerdrop" in settings:
        model.eval()
    output = model(TOKENS)
    torch.testing.assert_close(output[0], plain(TOKENS)[0])
    assert len(routing_statistics(model, output)) == 2


def test_layers_that_are_left_out_by_pruning():
    whole = roberta(seed=1)
    pruned = roberta(seed=2, encoder_layers_to_keep="0,2")
    assert list(switch_layers(pruned)) == ["encoder.0", "encoder.2"]
    settings = argparse.Namespace(arch="switch_roberta_base", encoder_layers_to_keep="0,2")
    pruned.load_state_dict(whole.state_dict(), model_cfg=settings)
    left, right = (each.encoder.sentence_encoder.layers for each in (whole, pruned))
    assert torch.equal(left[2].moe.experts.w1, right[1].moe.experts.w1)


def test_hash_routes_by_the_token():
    model = roberta(router="hash").eval()
    for layer in switch_layers(model).values():
        seen = []
        layer.moe.register_forward_hook(lambda _, __, output, seen=seen: seen.append(output[1]))
        model(torch.tensor([[0, 5, 7, 5, 2]]))
        chosen = seen[0].expert_index[:, 0].tolist()
        assert chosen[1] == chosen[3]


def test_heads_of_a_checkpoint():
    """They are left out, or made, as fairseq does; a new one begins as it was drawn."""
    trained = roberta(seed=1)
    trained.register_classification_head("topic", num_classes=3)
    state = trained.state_dict()
    fresh = roberta(seed=2)
    fresh.register_classification_head("other", num_classes=5)
    fresh.load_state_dict(dict(state))
    assert list(fresh.classification_heads) == ["other"]
    loaded = roberta(seed=2, load_checkpoint_heads=True)
    loaded.load_state_dict(dict(state))
    assert torch.equal(
        loaded.classification_heads["topic"].out_proj.weight,
        trained.classification_heads["topic"].out_proj.weight,
    )


def test_a_head_that_does_not_exist():
    model = roberta()
    model.register_classification_head("topic", num_classes=3)
    message = r"--classification-head-name: the model has no head 'topci', but 'topic'; give "
    with pytest.raises(ConfigError, match=message):
        model(TOKENS, classification_head_name="topci")


def test_the_interface_of_hub(monkeypatch):
    from fairseq.data import encoders

    monkeypatch.setattr(encoders, "build_bpe", lambda _: None)
    model = roberta().eval()
    model.register_classification_head("topic", num_classes=3)
    interface = RobertaHubInterface(argparse.Namespace(bpe=None), Task(), model)
    features = interface.extract_features(TOKENS)
    assert features.shape == (2, 6, 16)
    assert interface.predict("topic", TOKENS).exp().sum(-1).tolist() == pytest.approx([1, 1])
    with pytest.raises(ConfigError, match="no head 'none'"):
        interface.predict("none", TOKENS)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quant_noise_pq": 0.1}, "--quant-noise-pq must be 0"),
        ({"ffn_reg_scale_factor": 0.1}, "--ffn-reg-scale-factor must be 0"),
        ({"ffn_blocks_to_remove": 2}, "--ffn-blocks-to-remove must be -1"),
        ({"encoder_attention_heads": 3}, "--encoder-attention-heads"),
        ({"encoder_moe_layers": "7"}, "the layers are 0 to 2"),
        ({"decoder_moe_layers": "0"}, "model settings: .*decoder_moe_layers"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(ConfigError, match=message):
        roberta(**settings)


def test_another_vocabulary_or_length_is_named():
    model, state = roberta(), roberta().state_dict()
    embedding = "encoder.sentence_encoder.embed_tokens.weight"
    larger = {**state, embedding: torch.zeros(20, 16)}
    with pytest.raises(ConfigError, match=r"is \(20, 16\) there .* --srcdict"):
        model.load_state_dict(larger)
    with pytest.raises(ConfigError, match=r"embed_positions.* give the --max-positions "):
        roberta(max_positions=32).load_state_dict(state)
    with pytest.raises(ConfigError, match="give the --arch"):
        roberta(encoder_embed_dim=32).load_state_dict(state)
