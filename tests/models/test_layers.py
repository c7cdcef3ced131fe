"""What belongs to one call of the model lies on no module, and what leaves it arrives."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from fairseq.models.transformer import TransformerModelBase
from support.models import Task, batch, build

from fairseq_sparsemixer.models.layers import routing_statistics, switch_layers
from fairseq_sparsemixer.models.switch_transformer import SwitchTransformerEncoder
from fairseq_sparsemixer.moe import MoEFeedForward


def tensors_on(model):
    """What lies on the modules besides parameters and buffers."""
    return [
        f"{name}.{key}"
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, torch.Tensor) and key != "_future_mask"
    ]


@pytest.mark.parametrize("router", ["sparsemixer", "hash"])
def test_a_forward_leaves_nothing_on_the_layers(router):
    model = build(router=router)
    model(**batch())
    model.encoder(batch()["src_tokens"])  # as a translation during validation does
    assert not tensors_on(model)


def test_model_can_be_copied_at_any_time():
    """fairseq's EMA copies the model, whatever the criterion; what has a graph cannot be copied."""
    model = build()
    output = model(**batch())
    clone = copy.deepcopy(model)
    output[0].sum().backward()
    copy.deepcopy(model)
    model.encoder(batch()["src_tokens"])
    copy.deepcopy(model)
    torch.testing.assert_close(clone.eval()(**batch())[0], model.eval()(**batch())[0])


@pytest.mark.parametrize("activation", ["relu", "gelu", "tanh", "linear"])
def test_experts_can_be_pickled_whatever_the_activation(activation):
    experts = build(activation_fn=activation).encoder.layers[0].moe.eval()
    x = torch.randn(3, 2, 16)
    for layer in (experts, MoEFeedForward(16, 8, 2, activation_fn=activation).eval()):
        assert torch.equal(pickle.loads(pickle.dumps(layer))(x)[0], layer(x)[0])


@pytest.mark.parametrize("router", ["sparsemixer", "hash"])
def test_one_model_in_several_threads(router):
    model = build(router=router).eval()
    batches = [batch(lengths=((n, 2), (3 + n, 4)), seed=n) for n in range(1, 5)]
    with torch.no_grad():
        outputs = [model(**sample) for sample in batches]
        expected = [(output[0], routing_statistics(model, output)) for output in outputs]

    def wrong(number):
        found = 0
        with torch.no_grad():
            for _ in range(30):
                output = model(**batches[number])
                try:
                    torch.testing.assert_close(
                        (output[0], routing_statistics(model, output)), expected[number]
                    )
                except AssertionError:
                    found += 1
        return found

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(wrong, range(4))) == [0] * 4


@pytest.mark.parametrize("router", ["switch", "hash"])
def test_two_forwards_before_one_backward_under_activation_checkpointing(router):
    """Layers run again in the backward pass; what they then read is of their own batch."""

    def gradients(**settings):
        model = build(router=router, jitter_eps=0.0, dropout=0.0, **settings)
        losses = []
        for seed in (1, 2):
            output = model(**batch(seed=seed))
            sums = torch.stack(list(routing_statistics(model, output).values()))
            losses.append(output[0].square().mean() + sums.square().mean())
        sum(losses).backward()
        return {name: parameter.grad for name, parameter in model.named_parameters()}

    torch.testing.assert_close(gradients(checkpoint_activations=True), gradients())


def test_under_amp_a_layer_computed_again_chooses_as_before():
    """fairseq's trainer leaves autocast before the backward pass."""

    def routings(model):
        seen = []
        for layer in switch_layers(model).values():
            layer.moe.register_forward_hook(lambda _, __, output: seen.append(output[1]))
        sample = batch(seed=3)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**sample)[0].float().square().mean()
        before = [routing.logits.clone() for routing in seen]
        seen.clear()
        loss.backward()
        return before, [routing.logits for routing in seen]

    model = build(checkpoint_activations=True)
    for each in (model, copy.deepcopy(model)):
        before, after = routings(each)
        assert len(before) == len(after) > 0
        # Backwards: the last layer is computed again first.
        torch.testing.assert_close(after, before[::-1], rtol=0, atol=0)


def test_encoder_puts_out_what_its_feed_forward_networks_do_where_it_is_asked_to():
    """As fairseq's data2vec asks its encoder: of layers with experts and of dense ones."""
    model = build().eval()
    embeddings = model.encoder.embed_tokens
    encoder = SwitchTransformerEncoder(model.cfg, Task().source_dictionary, embeddings, True).eval()
    seen = [[] for _ in encoder.layers]
    for layer, outputs in zip(encoder.layers, seen):
        last = layer.moe if hasattr(layer, "moe") else layer.fc2
        last.register_forward_hook(lambda _, __, output, outputs=outputs: outputs.append(output))
    found = encoder(batch()["src_tokens"], return_all_hiddens=True)["fc_results"]
    assert [hasattr(layer, "moe") for layer in encoder.layers] == [True, False, True]
    for result, (output,) in zip(found, seen):
        assert torch.equal(result, output[0] if isinstance(output, tuple) else output)
    # Without being asked, as any encoder of fairseq.
    assert model.encoder(batch()["src_tokens"], return_all_hiddens=True)["fc_results"] == [None] * 3


def test_torchscript_of_a_model_without_experts():
    """As of fairseq's own."""
    model = build(encoder_moe_layers="none", decoder_moe_layers="none").eval()
    torch.manual_seed(0)
    dense = TransformerModelBase.build_model(copy.deepcopy(model.cfg), Task()).eval()
    scripted, expected = torch.jit.script(model), torch.jit.script(dense)
    for _ in range(2):  # the second run is that of the compiled graph
        assert torch.equal(scripted(**batch())[0], expected(**batch())[0])
    torch.testing.assert_close(scripted(**batch())[0], model(**batch())[0])
