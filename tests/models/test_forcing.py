"""Experts chosen by hand: their gates, their outputs, and where they hold."""

import itertools

import pytest
import torch
from support.models import batch, build
from support.reference import expert_output, softmax
from support.reference_routers import fits, softmax_over, within
from support.routers import random_layer

from fairseq_sparsemixer.models.forcing import force_choices, gates_of
from fairseq_sparsemixer.models.layers import switch_layers
from fairseq_sparsemixer.models.watching import watch_routing
from fairseq_sparsemixer.moe import ROUTERS

pytestmark = pytest.mark.usefixtures("one_thread")

ROUTERS_OF_TOKENS = [
    *(
        (name, k, {})
        for name in ROUTERS
        for k in (1, 2)
        if ROUTERS[name].causal and fits(name, 4, k)
    ),
    ("topk", 2, {"renormalise": True, "balance_bias_rate": 0.1}),
    ("sparsemixer-v2-star", 3, {"gate": "full"}),
    ("hash", 1, {"gate": "full"}),
    ("composed", 1, {"gate": "one"}),
]


@pytest.mark.parametrize(("name", "top_k", "options"), ROUTERS_OF_TOKENS)
def test_gates_of_what_the_router_chooses_are_its_own(name, top_k, options):
    torch.manual_seed(0)
    router = random_layer(name, 4, top_k, **options).eval().router
    routing = router(torch.randn(60, 6), token_ids=torch.randint(100, (60,)))
    rule = router.evaluation_rule()
    for row, experts in enumerate(routing.expert_index.tolist()):
        gate = gates_of(rule, routing.logits[row : row + 1], experts)
        torch.testing.assert_close(gate, routing.gate[row : row + 1])


def naive_gate(router, z, expert, left):
    """The gate of one expert, chosen among those that are left."""
    if router.name == "hash":
        return torch.ones(())
    if router.name.startswith("sparsemixer"):
        kept = sorted({*within(router, z, left), expert})
        return softmax_over(z, kept, router.temperature)[expert]
    return softmax(z)[expert]


@pytest.mark.parametrize(
    ("name", "top_k"),
    [
        ("switch", 1),
        ("sparsemixer", 1),
        ("sparsemixer-v2-star", 2),
        ("hash", 1),
        ("default-moe", 2),
    ],
)
def test_outputs_are_those_of_the_experts_that_were_forced(name, top_k):
    """For every choice of experts, at one token of two sentences; the other tokens stay."""
    torch.manual_seed(1)
    model = build(router=name, top_k=top_k).eval()
    layer = model.encoder.layers[0].moe
    for parameter in layer.router.parameters():
        torch.nn.init.normal_(parameter)
    if layer.router.expert_means is not None:
        torch.nn.init.normal_(layer.router.expert_means.mean)
    x, ids = torch.randn(5, 2, 16), torch.randint(100, (5, 2))
    plain, _ = layer(x, token_ids=ids)
    place = 3
    for experts in itertools.permutations(range(4), top_k):
        with force_choices(model, {"encoder.0": {place: experts}}):
            y, routing = layer(x, token_ids=ids)
        assert routing.expert_index.view(5, 2, -1)[place].tolist() == [list(experts)] * 2
        others = [row for row in range(5) if row != place]
        torch.testing.assert_close(y[others], plain[others])
        for column in range(2):
            token = x[place, column]
            z = list(layer.router.logits(token[None])[0])
            expected, left = torch.zeros(16), [0, 1, 2, 3]
            for expert in experts:
                gate = naive_gate(layer.router, z, expert, left)
                expected = expected + gate * expert_output(layer.experts, expert, token)
                left.remove(expert)
            if name == "default-moe":
                means = layer.router.expert_means.mean
                expected = expected + sum(softmax(z)[i] * means[i] for i in left)
            if layer.router.output_scale is not None:
                expected = expected * layer.router.output_scale
            torch.testing.assert_close(y[place, column], expected, atol=1e-5, rtol=1e-4)
    assert torch.equal(layer(x, token_ids=ids)[0], plain)  # the block has ended


@pytest.mark.parametrize("name", ["sparsemixer", "switch"])
def test_the_routers_own_choice_changes_no_bit(name):
    model = build(router=name, seed=3).eval()
    inputs = batch(lengths=((4, 5),))
    with watch_routing(model) as seen, torch.no_grad():
        plain = model(**inputs)[0]
        own = {
            layer: dict(enumerate(routing.expert_index.tolist())) for layer, routing in seen.items()
        }
        with force_choices(model, own):
            assert torch.equal(model(**inputs)[0], plain)


def test_a_step_of_the_decoder_is_a_position():
    """Step by step, and for several hypotheses, as at once."""
    model = build(seed=4).eval()
    inputs = batch(lengths=((4, 5),))
    read = inputs["prev_output_tokens"]
    forced = {"decoder.0": {2: [3], 4: [1]}, "decoder.2": {2: [0]}, "encoder.0": {1: [2]}}
    with torch.no_grad():
        with force_choices(model, forced), watch_routing(model) as seen:
            at_once = model(**inputs)[0]
            assert seen["decoder.0"].expert_index[[2, 4], 0].tolist() == [3, 1]
            assert seen["encoder.0"].expert_index[1, 0] == 2
        state, steps = {}, []
        with force_choices(model, forced):
            encoded = model.encoder(inputs["src_tokens"], inputs["src_lengths"])
            encoded = model.encoder.reorder_encoder_out(encoded, torch.zeros(3, dtype=torch.long))
            for step in range(read.shape[1]):
                so_far = read[:, : step + 1].expand(3, -1)
                steps.append(model.decoder.forward(so_far, encoded, incremental_state=state)[0])
        assert (model(**inputs)[0] - at_once).abs().max() > 1e-3
    stepwise = torch.cat(steps, dim=1)
    torch.testing.assert_close(stepwise, at_once.expand_as(stepwise), atol=1e-5, rtol=1e-4)
    assert not any(layer.moe.router._forward_hooks for layer in switch_layers(model).values())
