"""The fairseq seam: settings, architectures, layers and what they must leave as it was."""

import argparse
import copy
import math

import pytest
import torch
from fairseq.models import ARCH_CONFIG_REGISTRY, ARCH_MODEL_REGISTRY, build_model
from fairseq.models.transformer import TransformerConfig, TransformerModelBase
from omegaconf import OmegaConf
from support.models import Task, batch, build, copy_into_dense, draw_alike
from support.routers import OF_ANY_TEXT

from fairseq_sparsemixer.models import SwitchTransformerConfig, SwitchTransformerModel
from fairseq_sparsemixer.models.architectures import ARCHITECTURES
from fairseq_sparsemixer.models.config import EXPERT_FIELDS, ConfigError
from fairseq_sparsemixer.models.layers import SwitchLayer, routing_statistics
from fairseq_sparsemixer.moe import ROUTERS, MoEFeedForward, RoutingStatistics
from fairseq_sparsemixer.moe.backends import products


def dense_transformer(cfg):
    torch.manual_seed(0)
    return TransformerModelBase.build_model(cfg, Task())


def moe_layers(model):
    return [m.layer_name for m in model.modules() if isinstance(m, SwitchLayer)]


def test_sizes_of_the_demo():
    args = argparse.Namespace(decoder_layers=2)
    ARCHITECTURES["switch_transformer_demo"](args)
    for side, layers in (("encoder", 3), ("decoder", 2)):
        sizes = (192, 768, 4, True, layers)
        names = ("embed_dim", "ffn_embed_dim", "attention_heads", "normalize_before", "layers")
        assert tuple(getattr(args, f"{side}_{name}") for name in names) == sizes


def test_every_setting_of_ours_has_a_help_text():
    for name, field in EXPERT_FIELDS.items():
        assert field.metadata["help"], name


@pytest.mark.parametrize(("side", "other"), [("encoder", "decoder"), ("decoder", "encoder")])
def test_a_side_that_is_not_pruned_keeps_its_layers(side, other):
    whole, kept = build(seed=1), {f"{side}_layers_to_keep": "1"}
    pruned = build(seed=2, **kept)
    settings = {"_name": "switch_transformer", f"{other}_layers_to_keep": None, **kept}
    pruned.load_state_dict(whole.state_dict(), model_cfg=OmegaConf.create(settings))
    expected = whole.state_dict()
    for name, value in pruned.state_dict().items():
        source = name.replace(f"{side}.layers.0.", f"{side}.layers.1.")
        assert torch.equal(value, expected[source]), name


def test_experts_lie_in_layers_0_2_4_by_default():
    model = build(encoder_layers=6, decoder_layers=5)
    names = ["encoder.0", "encoder.2", "encoder.4", "decoder.0", "decoder.2", "decoder.4"]
    assert moe_layers(model) == names


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (
            {"moe_every": 1},
            ["encoder.0", "encoder.1", "encoder.2", "decoder.0", "decoder.1", "decoder.2"],
        ),
        ({"moe_every": 3, "moe_offset": 1}, ["encoder.1", "decoder.1"]),
        ({"encoder_moe_layers": "none"}, ["decoder.0", "decoder.2"]),
        (
            {"encoder_moe_layers": "2,1", "decoder_moe_layers": "0"},
            ["encoder.1", "encoder.2", "decoder.0"],
        ),
        ({"encoder_layers_to_keep": "1,2"}, ["encoder.2", "decoder.0", "decoder.2"]),
    ],
)
def test_layers_with_experts_can_be_chosen(settings, expected):
    assert moe_layers(build(**settings)) == expected


def test_expert_parameters_read_well():
    names = [name for name in build().state_dict() if name.startswith("encoder.layers.0.moe")]
    assert names == [
        f"encoder.layers.0.moe.{name}"
        for name in (
            "router.weight", "router.bias", "router.output_scale",
            "experts.w1", "experts.b1", "experts.w2", "experts.b2",
        )
    ]  # fmt: skip
    assert not [name for name in build().state_dict() if "layers.0.fc" in name]


@pytest.mark.parametrize("normalize_before", [True, False])
def test_without_experts_it_is_fairseqs_transformer(normalize_before):
    settings = {
        "encoder_normalize_before": normalize_before,
        "decoder_normalize_before": normalize_before,
    }
    model = build(encoder_moe_layers="none", decoder_moe_layers="none", **settings).eval()
    cfg = copy.deepcopy(model.cfg)
    dense = dense_transformer(cfg).eval()
    assert {k: v.shape for k, v in model.state_dict().items()} == {
        k: v.shape for k, v in dense.state_dict().items()
    }
    for name, value in dense.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    assert torch.equal(model(**batch())[0], dense(**batch())[0])


@pytest.mark.parametrize("router", ["switch", "sparsemixer"])
@pytest.mark.parametrize("training", [False, True])
def test_one_expert_with_gate_one_equals_fairseqs_transformer(router, training):
    """One expert: softmax over one logit is 1, and m is 1 where the arg-max is drawn."""
    settings = {"dropout": 0.2, "attention_dropout": 0.1, "activation_dropout": 0.0}
    model = build(num_experts=1, router=router, **settings).train(training)
    dense = dense_transformer(copy.deepcopy(model.cfg)).train(training)
    copy_into_dense(model, dense)
    draw_alike(model, dense)
    # Padding is not routed, so its own outputs, which nobody reads, are others.
    keep = batch()["prev_output_tokens"].ne(1)
    torch.testing.assert_close(model(**batch())[0][keep], dense(**batch())[0][keep])


def test_padding_changes_neither_outputs_nor_statistics_nor_gradients():
    model = build(router="switch", jitter_eps=0.0, dropout=0.0)
    lengths = [(3, 4), (5, 2), (1, 6)]
    padded = batch(lengths)

    def run(net_inputs):
        model.zero_grad()
        logits, sums = [], 0
        for net_input in net_inputs:
            output = model(**net_input)
            keep = net_input["prev_output_tokens"].ne(1)
            logits.append(output[0][keep])
            sums = sums + torch.stack(list(routing_statistics(model, output).values()))
        statistics = RoutingStatistics.unpack(sums)
        losses = statistics.load_balance_loss.mean(), statistics.z_loss.mean()
        out = torch.cat(logits)
        (out.square().mean() + sum(losses)).backward()
        return out, losses, [p.grad.clone() for p in model.parameters()]

    alone = []
    for row, (source, target) in enumerate(lengths):
        alone.append(
            {
                "src_tokens": padded["src_tokens"][row : row + 1, -source - 1 :],
                "src_lengths": padded["src_lengths"][row : row + 1],
                "prev_output_tokens": padded["prev_output_tokens"][row : row + 1, : target + 1],
            }
        )
    torch.testing.assert_close(run([padded]), run(alone), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("offload", [False, True])
def test_activation_checkpointing_keeps_the_gradient_of_the_routing_losses(offload):
    def gradients(**settings):
        model = build(dropout=0.1, **settings)
        torch.manual_seed(3)
        output = model(**batch())
        packed = routing_statistics(model, output)
        assert len(packed) == 4
        statistics = RoutingStatistics.unpack(torch.stack(list(packed.values())))
        losses = statistics.load_balance_loss.sum() + statistics.z_loss.sum()
        (output[0].square().mean() + losses).backward()
        return output[0], losses, {n: p.grad for n, p in model.named_parameters()}

    plain = gradients()
    checkpointed = gradients(checkpoint_activations=True, offload_activations=offload)
    torch.testing.assert_close(checkpointed, plain, rtol=1e-5, atol=1e-7)
    assert plain[2]["encoder.layers.0.moe.router.weight"].abs().sum() > 0


@pytest.mark.parametrize("router", ["sparsemixer", "hash", "default-moe", "sparsemixer-v2"])
def test_incremental_decoding_equals_the_whole_sequence(router):
    model = build(router=router, top_k=2 if router == "sparsemixer-v2" else 1).eval()
    net_input = batch(((4, 6),))
    whole = model(**net_input)[0]
    encoder_out = model.encoder(net_input["src_tokens"], net_input["src_lengths"])
    state = {}
    tokens = net_input["prev_output_tokens"]
    steps = [
        model.decoder(tokens[:, : i + 1], encoder_out=encoder_out, incremental_state=state)
        for i in range(tokens.shape[1])
    ]
    torch.testing.assert_close(torch.cat([out for out, _ in steps], 1), whole)
    assert not any("routing_statistics" in extra for _, extra in steps)


def smallest(router, **settings):
    """The model with that router; the settings that it cannot do without are filled in."""
    kind = ROUTERS[router]
    if not kind.causal:
        settings["decoder_moe_layers"] = "none"
    return build(router=router, top_k=kind.min_top_k, **settings)


def end_update(model):
    """As fairseq's trainer does at each update, see compat.py."""
    for module in model.modules():
        if isinstance(module, MoEFeedForward):
            module.end_update()


@pytest.mark.parametrize("router", OF_ANY_TEXT)
def test_every_router_trains_in_the_model(router):
    model = smallest(router, balance_bias_rate=0.001 if ROUTERS[router].takes_balance_bias else 0.0)
    packed = []
    for _ in range(3):
        output = model(**batch())
        packed = list(routing_statistics(model, output).values())
        statistics = RoutingStatistics.unpack(torch.stack(packed))
        (output[0].square().mean() + 0.01 * statistics.load_balance_loss.sum()).backward()
        end_update(model)
    # Data-parallel training waits for a gradient of every parameter.
    assert not [name for name, p in model.named_parameters() if p.grad is None]
    assert (statistics.tokens > 0).all()
    torch.testing.assert_close(statistics.expert_share.sum(-1), torch.ones(len(packed)))
    first, second = model.eval()(**batch())[0], model(**batch())[0]
    assert torch.equal(first, second)


def test_hash_router_sends_equal_words_to_equal_experts():
    model = build(router="hash").eval()
    seen = {}

    def note(module, args, output):
        ids, index = args[2].reshape(-1), output[1].expert_index.flatten()
        for token, expert in zip(ids.tolist(), index.tolist()):
            if token != 1:
                assert seen.setdefault(token, expert) == expert

    layers = [m for m in model.modules() if isinstance(m, SwitchLayer)]
    for layer in layers:
        layer.moe.register_forward_hook(note)
    model(**batch())
    assert len(set(seen.values())) > 1
    # Features alone, without a forward before.
    fresh = build(router="hash").eval()
    features = fresh.extract_features(**batch())[0]
    torch.testing.assert_close(fresh.output_layer(features), model(**batch())[0])


def test_expert_choice_is_refused_in_the_decoder():
    with pytest.raises(ConfigError, match="pass --decoder-moe-layers none"):
        build(router="expert-choice")
    assert moe_layers(build(router="expert-choice", decoder_moe_layers="none"))


@pytest.mark.parametrize("checkpoint", [False, True])
def test_running_means_see_each_batch_once_and_change_between_updates(checkpoint):
    model = build(router="default-moe", checkpoint_activations=checkpoint)
    router = next(m for m in model.modules() if isinstance(m, SwitchLayer)).moe.router
    means = router.expert_means

    def run():
        model(**batch())[0].sum().backward()

    run()
    run()  # a second micro-batch of the same update
    words = batch()["src_lengths"].sum()
    assert means.token_count.sum() == 2 * words
    assert not means.mean.any()
    end_update(model)
    assert means.token_count.sum() == 0
    assert means.mean.any()
    before = means.mean.clone()
    model.eval()
    with torch.no_grad():
        model(**batch())
    end_update(model)
    assert torch.equal(means.mean, before)


@pytest.mark.parametrize("arch", sorted(ARCHITECTURES))
def test_flags_and_hydra_agree_on_every_architecture(arch, monkeypatch):
    from fairseq import options
    from fairseq.dataclass.utils import convert_namespace_to_omegaconf

    monkeypatch.setattr(torch.nn.Module, "apply", lambda self, _: self)  # needs storage in BERT's
    task = {"encoder": "masked_lm", "decoder": "language_modeling"}
    task = task.get("".join(ARCH_MODEL_REGISTRY[arch].sides), "translation")
    flags = ["data", "--arch", arch, "--task", task, "--num-experts", "3", "--dropout", "0.25"]
    args = options.parse_args_and_arch(options.get_training_parser(), flags)
    of_flags = convert_namespace_to_omegaconf(args)
    from_flags = of_flags.model
    model = {"_name": arch, "num_experts": 3, "dropout": 0.25}
    of_hydra = {"model": model, "task": of_flags.task, "common": of_flags.common}
    from_hydra = OmegaConf.create(of_hydra).model
    with torch.device("meta"):  # sizes only
        a, b = build_model(from_flags, Task()), build_model(from_hydra, Task())
    assert vars(a.cfg) == vars(b.cfg)
    assert a.cfg.dropout == 0.25
    assert a.cfg.experts.num_experts == 3
    fairseq_name = arch.removeprefix("switch_")
    if fairseq_name in ARCH_CONFIG_REGISTRY:
        args = argparse.Namespace(dropout=0.25)
        ARCH_CONFIG_REGISTRY[fairseq_name](args)
        dense = TransformerConfig.from_namespace(args)
        for side in a.sides:
            assert getattr(a.cfg, side).embed_dim == getattr(dense, side).embed_dim
            assert getattr(a.cfg, side).layers == getattr(dense, side).layers
            assert getattr(a.cfg, side).normalize_before == getattr(dense, side).normalize_before


def test_every_flag_of_fairseqs_transformer_is_there():
    ours, theirs = (argparse.ArgumentParser(argument_default=argparse.SUPPRESS) for _ in range(2))
    SwitchTransformerModel.add_args(ours)
    from fairseq.models.transformer import TransformerModel

    TransformerModel.add_args(theirs)
    flags = [{o for action in p._actions for o in action.option_strings} for p in (ours, theirs)]
    assert flags[1] <= flags[0]
    assert {"--router", "--num-experts", "--jitter-eps", "--top-k"} <= flags[0]


def test_activation_dropout_of_experts_has_its_own_rate():
    for settings, expected in (
        ({"activation_dropout": 0.2}, 0.2),
        ({"relu_dropout": 0.3}, 0.3),
        ({"activation_dropout": 0.2, "expert_activation_dropout": 0.0}, 0.0),
        ({"expert_activation_dropout": 0.4}, 0.4),
    ):
        layers = build(**settings).encoder.layers
        assert layers[0].moe.experts.activation_dropout == expected
        assert layers[1].activation_dropout_module.p == settings.get(
            "activation_dropout", settings.get("relu_dropout", 0.0)
        )


def test_router_settings_reach_the_router():
    model = build(
        jitter_eps=0.3,
        no_router_bias=True,
        router_init_scale=0.0,
        router_options='{"first_order_on_argmax": false}',
        moe_backend="loop",
        moe_recompute=True,
    )
    moe = model.decoder.layers[2].moe
    assert moe.router.jitter_eps == 0.3
    assert moe.router.bias is None
    assert moe.router.weight.abs().sum() == 0
    assert moe.router.first_order_on_argmax is False
    assert moe.backend == "loop"
    assert moe.experts.recompute
    assert not build().decoder.layers[2].moe.experts.recompute


def test_a_backend_of_old_checkpoints_that_is_gone_is_auto():
    assert build(moe_backend="grouped").decoder.layers[2].moe.backend == "auto"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_experts_are_laid_out_when_fairseq_prepares_to_translate(dtype, monkeypatch):
    monkeypatch.setattr(products, "LEAST_WEIGHTS", 0)
    model = build(moe_inference_dtype=dtype).eval()
    sample = batch()
    with torch.no_grad():
        expected, _ = model(**sample)
        model.prepare_for_inference_(OmegaConf.create({"generation": {"beam": 4}}))
        packed = [m.experts.packed.dtype for m in model.modules() if isinstance(m, MoEFeedForward)]
        rounded = dtype == "bfloat16" and products.has_bfloat16()
        taken = torch.bfloat16 if rounded else torch.float32
        assert packed == [taken] * len(moe_layers(model))
        assert not any(layer.need_attn for layer in model.decoder.layers)
        logits, _ = model(**sample)
    tolerance = 0.05 if rounded else 1e-5
    torch.testing.assert_close(logits, expected, rtol=tolerance, atol=tolerance)
    assert rounded != torch.allclose(logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"router": "swich"}, "--router swich: .*did you mean 'switch'"),
        ({"num_experts": 0}, "--num-experts must be at least 1 .*, not 0"),
        ({"top_k": 5}, r"--top-k must be 1 to --num-experts \(4\), not 5"),
        ({"top_k": 0}, "--top-k must be at least 1"),
        ({"top_k": 2}, "--router sparsemixer: --top-k must be 1"),
        ({"jitter_eps": -1.0}, "--jitter-eps must be a number of at least 0"),
        ({"router": "switch", "jitter_eps": 1.5}, "--router switch: --jitter-eps must be"),
        ({"jitter_eps": 0.0}, "--router sparsemixer: --jitter-eps must be at least 1e-06"),
        ({"encoder_moe_layers": "7"}, "--encoder-moe-layers: there is no layer 7; .* 0 to 2"),
        ({"decoder_moe_layers": "0;2"}, "--decoder-moe-layers must be 'none' or"),
        ({"encoder_layers_to_keep": "0,9"}, "--encoder-layers-to-keep: there is no layer 9"),
        ({"moe_every": 0}, "--moe-every must be at least 1"),
        ({"moe_offset": -1}, "--moe-offset must be at least 0"),
        ({"moe_offset": 3}, "--moe-offset 3 leaves no layer with experts"),
        ({"num_experts": 1 << 31}, r"--num-experts must be at least 1 and below 2\*\*31"),
        ({"router_options": '{"seed": 2147483648}'}, r"seed must be a number below 2\*\*31"),
        ({"router_options": '{"num_languages": 2}'}, "must not hold num_languages: pass --langs"),
        ({"quant_noise_pq": 0.1}, "--quant-noise-pq must be 0"),
        ({"quant_noise_scalar": 0.1}, "--quant-noise-scalar must be 0"),
        ({"scale_fc": True}, "--scale-fc must be off"),
        ({"encoder_attention_heads": 3}, "must be a multiple of --encoder-attention-heads"),
        ({"encoder_ffn_embed_dim": 0}, "--encoder-ffn-embed-dim must be at least 1"),
        ({"share_all_embeddings": True, "decoder_embed_dim": 8}, "--share-all-embeddings"),
        ({"expert_activation_dropout": 2.0}, "--expert-activation-dropout must be 0 to 1"),
        ({"router_init_scale": -1.0}, "--router-init-scale must be"),
        ({"router_init_scale": 1e30}, "--router-init-scale must be .* below 10000, not 1e"),
        ({"router_init_scale": math.nan}, "--router-init-scale must be"),
        ({"balance_bias_rate": 1e30}, "--balance-bias-rate must be .* below 10000"),
        ({"num_experts": 10**30}, "--num-experts must be at least 1"),
        ({"encoder_embed_dim": 10**30}, "--encoder-embed-dim must be at least 1"),
        ({"router_options": '{"x": NaN}'}, "--router-options: x must be a number .*, not nan"),
        ({"router_options": '{"x": 1e999}'}, "--router-options: x must be a number .*, not inf"),
        ({"router_options": "[" * 100_000}, "--router-options is not JSON"),
        ({"router_options": "{"}, "--router-options is not JSON"),
        (
            {"router_options": '{"omega": "false"}'},
            "--router sparsemixer: omega must be true or false, not 'false'",
        ),
        (
            {"router": "hash", "router_options": '{"seed": 1.5}'},
            "--router hash: seed must be a whole number, not 1.5",
        ),
        ({"router_options": "[]"}, "--router-options must be a JSON object"),
        ({"router_options": '{"x": 1}'}, "--router-options for --router sparsemixer: .*'x'"),
        ({"moe_backend": "fast"}, "--moe-backend: unknown backend 'fast'; choose from auto"),
        ({"moe_inference_dtype": "int8"}, "--moe-inference-dtype must be float32 or bfloat16"),
        ({"nonsense": 1}, "model settings: .*nonsense"),
    ],
)
def test_bad_settings_give_one_line(settings, message):
    with pytest.raises(ConfigError, match=message) as info:
        build("switch_transformer_wmt_en_de", **settings)
    assert "\n" not in str(info.value)


def test_checkpoint_of_another_shape():
    with pytest.raises(ConfigError, match=r"router.weight is \(8, 16\) there and \(4, 16\) here"):
        build().load_state_dict(build(num_experts=8).state_dict())
    with pytest.raises(ConfigError, match=r"it has no encoder.layers.0.moe.router.weight"):
        build().load_state_dict(build(encoder_moe_layers="1").state_dict())
    with pytest.raises(ConfigError, match=r"the model has no encoder.layers.2.self_attn"):
        build(encoder_layers=2).load_state_dict(build().state_dict())
    with pytest.raises(ConfigError, match=r"the model has no encoder.layers.0.moe.router.bias"):
        build(no_router_bias=True).load_state_dict(build().state_dict())


def test_config_defaults_are_those_of_fairseq():
    ours = SwitchTransformerConfig()
    assert ours.max_source_positions == TransformerConfig().max_source_positions
    assert ours.encoder_embed_dim is None, "left to the architecture"
