"""What is learnt without a gradient, and output masking."""

import math

import pytest
import torch
from support.reference import expert_output
from support.routers import chi_square, random_layer

from fairseq_sparsemixer.moe import ROUTERS, MoEFeedForward, RoutingStatistics, build_router
from fairseq_sparsemixer.moe.adaptation import ExpertLines, ExpertMeans

BIASED = sorted(name for name, router in ROUTERS.items() if router.takes_balance_bias)


@pytest.mark.parametrize("name", BIASED)
def test_balance_bias_moves_by_the_sign_of_the_missing_load(name):
    torch.manual_seed(0)
    layer = random_layer(name, 5, balance_bias_rate=0.25)
    expected = layer.router.balance_bias.bias.tolist()
    for _ in range(3):
        load = [0] * 5
        for _ in range(2):  # batches of one update
            x, mask = torch.randn(11, 6), torch.rand(11) < 0.3
            before = layer.router.balance_bias.bias.clone()
            _, routing = layer(x, mask)
            assert torch.equal(layer.router.balance_bias.bias, before)
            for row in routing.chosen.tolist():
                for i in row:
                    if i >= 0:
                        load[i] += 1
        layer.end_update()
        for i in range(5):
            missing = sum(load) / 5 - load[i]
            expected[i] += 0.25 * ((missing > 0) - (missing < 0))
        assert layer.router.balance_bias.bias.tolist() == pytest.approx(expected, abs=1e-5)
    layer.end_update()  # nothing routed: nothing to balance
    assert layer.router.balance_bias.bias.tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("name", BIASED)
def test_balance_bias_balances(name):
    torch.manual_seed(0)
    layer = MoEFeedForward(
        6, 4, 4, router=name, top_k=ROUTERS[name].min_top_k, balance_bias_rate=0.05
    )
    with torch.no_grad():
        layer.router.bias.copy_(torch.tensor([2.0, 0.0, 0.0, -2.0]))
    x = torch.randn(200, 6)
    shares = []
    for _ in range(150):
        _, routing = layer(x)
        chosen = routing.chosen[routing.chosen >= 0]
        shares.append(chosen.bincount(minlength=4) / len(chosen))
        layer.end_update()
    assert shares[0].max() > 0.45, "no choice: takes_balance_bias = False says so"
    late = torch.stack(shares[-20:]).mean(0)
    assert late.max() < 0.35
    assert late.min() > 0.15


def test_bias_of_the_choice_does_not_touch_the_gate_of_topk():
    torch.manual_seed(0)
    router = build_router(
        "topk", embed_dim=4, num_experts=4, top_k=2, jitter_eps=0.0, balance_bias_rate=0.1
    )
    router.balance_bias.bias.copy_(torch.tensor([0.0, 0.0, 0.0, 100.0]))
    z = torch.tensor([[3.0, 2.0, 1.0, -1.0]])
    routing = router.route(z)
    assert sorted(routing.expert_index[0].tolist()) == [0, 3]
    torch.testing.assert_close(routing.gate, z.softmax(-1).gather(1, routing.expert_index))
    torch.testing.assert_close(routing.probs, z.softmax(-1))


WITH_MEANS = ["default-moe", "sparsemixer-cv"]


@pytest.mark.parametrize("decay", [0.0, 0.6, 0.99])
@pytest.mark.parametrize("name", WITH_MEANS)
@pytest.mark.parametrize("backend", ["sorted", "loop"])
def test_running_means_by_their_formula(name, decay, backend):
    torch.manual_seed(0)
    layer = MoEFeedForward(6, 10, 5, router=name, mean_decay=decay, backend=backend)
    torch.nn.init.normal_(layer.router.weight)
    means, updates = torch.zeros(5, 6), [0] * 5
    for step in range(4):
        got = [[] for _ in range(5)]
        for _ in range(2):
            x, mask = torch.randn(1 + 2 * step, 6), torch.rand(1 + 2 * step) < 0.3
            _, routing = layer(x, mask)
            for t, i in enumerate(routing.expert_index[:, 0].tolist()):
                if i >= 0:
                    got[i].append(expert_output(layer.experts, i, x[t]).detach())
        torch.testing.assert_close(layer.router.expert_means.mean, means)
        layer.end_update()
        for i in range(5):
            if got[i]:
                updates[i] += 1
                rate = max(1 / updates[i], 1 - decay)
                means[i] += rate * (sum(got[i]) / len(got[i]) - means[i])
        torch.testing.assert_close(layer.router.expert_means.mean, means)
    assert layer.router.expert_means.updates.tolist() == updates


ADAPTIVE = [("topk", {}), *((name, {}) for name in WITH_MEANS)]


def adaptive_layer(name):
    layer = random_layer(name, 4, balance_bias_rate=0.1)
    layer(torch.randn(9, 6))
    layer.end_update()
    layer(torch.randn(5, 6))  # in the middle of an update
    return layer


def buffers(layer):
    return {name: value.clone() for name, value in layer.router.named_buffers()}


@pytest.mark.parametrize(("name", "options"), ADAPTIVE)
@pytest.mark.parametrize("mode", ["no_grad", "inference", "evaluation", "padding", "routed"])
def test_only_a_training_forward_of_the_layer_is_observed(name, options, mode):
    torch.manual_seed(0)
    layer = adaptive_layer(name)
    x, before = torch.randn(7, 6), buffers(layer)
    if mode == "no_grad":
        with torch.no_grad():
            layer(x)
    elif mode == "inference":
        with torch.inference_mode():
            layer(x)
    elif mode == "evaluation":
        layer.eval()(x)
        layer.train()
    elif mode == "padding":
        layer(x, torch.ones(7, dtype=torch.bool))
    else:
        layer.router(x)
    for key, value in buffers(layer).items():
        assert torch.equal(value, before[key]), key
    layer(x)
    assert any(not torch.equal(value, before[key]) for key, value in buffers(layer).items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("name", "options"), ADAPTIVE)
def test_buffers_stay_float32_in_half_precision(name, options, dtype):
    torch.manual_seed(0)
    layer = adaptive_layer(name).to(dtype)
    assert all(value.dtype == torch.float32 for value in buffers(layer).values())
    layer(torch.randn(7, 6, dtype=dtype))
    layer.end_update()
    assert all(value.dtype == torch.float32 for value in buffers(layer).values())
    assert layer.router.weight.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("name", "options"), ADAPTIVE)
def test_a_cast_to_half_precision_rounds_no_buffer(name, options, dtype):
    torch.manual_seed(0)
    layer = adaptive_layer(name)
    for part in (layer.router.balance_bias, layer.router.expert_means):
        if part is not None:
            part.token_count += 70_001  # half precision ends at 65,504
    before = buffers(layer)
    layer.to(dtype)
    for key, value in buffers(layer).items():
        torch.testing.assert_close(value, before[key], rtol=0, atol=0, msg=key)


def cast_by_set_attribute(layer, dtype):
    """As fairscale casts buffers for --ddp-backend fully_sharded."""
    for module in layer.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, buffer.to(dtype))


def cast_by_fairscale(layer, dtype):
    data_parallel = pytest.importorskip("fairscale.nn.data_parallel")
    wrapper = data_parallel.FullyShardedDataParallel
    # Its constructor wants a process group; the cast needs none of what it sets up.
    wrapped = wrapper.__new__(wrapper)
    torch.nn.Module.__init__(wrapped)
    wrapped._fsdp_wrapped_module = layer
    wrapped.compute_device, wrapped.buffer_dtype = torch.device("cpu"), dtype
    wrapped._cast_buffers()
    wrapped._cast_buffers(dtype=torch.float32)  # for a checkpoint, and back
    wrapped._cast_buffers()


def cast_by_apply(layer, dtype):
    layer.to(dtype)


CASTS = [cast_by_set_attribute, cast_by_fairscale, cast_by_apply]
LINES = {"prediction": "linear"}


@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize(("name", "options"), [*ADAPTIVE, ("sparsemixer-cv", LINES)])
def test_counters_stay_exact_whatever_casts_them(cast, name, options):
    torch.manual_seed(0)
    layer = random_layer(name, 4, balance_bias_rate=0.1, **options)
    for _ in range(2):
        layer(torch.randn(9, 6))
        layer.end_update()
    bias = layer.router.balance_bias
    for _ in range(3):
        bias.observe(torch.full((32_000, 1), 2))  # half precision ends at 65,504
    before = buffers(layer)
    cast(layer, torch.float16)
    for key, value in buffers(layer).items():
        torch.testing.assert_close(value, before[key], rtol=0, atol=0, msg=key)
    layer.end_update()
    assert bias.bias[2] == before["balance_bias.bias"][2] - 0.1, "the busiest gets less"


def test_a_value_in_half_precision_can_be_assigned():
    layer = random_layer("topk", 4, balance_bias_rate=0.1)
    layer.router.balance_bias.bias = torch.tensor([1, 2, 3, 4], dtype=torch.float16)
    assert layer.router.balance_bias.bias.dtype == torch.float32
    assert layer.router.balance_bias.bias.tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize(("name", "options"), [*ADAPTIVE, ("sparsemixer-cv", LINES)])
def test_buffers_whose_data_were_cast_count_in_float32(name, options):
    """As torch's own FullyShardedDataParallel casts them."""
    layer = random_layer(name, 4, balance_bias_rate=0.1, **options)
    for buffer in layer.router.buffers():
        buffer.data = buffer.half()
    for _ in range(3):
        layer(torch.randn(9, 6))
        layer.router.balance_bias.observe(torch.full((32_000, 1), 2))
    assert layer.router.balance_bias.token_count.sum() == 3 * 32_009
    layer.end_update()
    assert {value.dtype for value in layer.router.buffers()} == {torch.float32}


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("name", "options"), [*ADAPTIVE, ("sparsemixer-cv", LINES)])
def test_counters_are_float32_whatever_the_default(name, options, default):
    torch.set_default_dtype(default)
    try:
        layer = MoEFeedForward(6, 4, 4, router=name, balance_bias_rate=0.1, **options)
        x = torch.randn(300, 6)
        _, routing = layer(x)
        sums = RoutingStatistics.from_routing(routing)
        assert sums.pack().dtype == sums.expert_tokens.dtype == torch.float32
        layer.router.balance_bias.observe(torch.zeros(257, 1, dtype=torch.long))
        assert layer.router.balance_bias.token_count.sum() == 557
        layer.end_update()
        assert {value.dtype for value in layer.router.buffers()} == {torch.float32}
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_outputs_that_are_not_finite_leave_the_running_mean_as_it_was(bad):
    """Sum and count go together; other experts learn."""
    means = random_layer("default-moe", 4).router.expert_means
    experts, outputs = torch.tensor([0, 0, 1]), torch.randn(3, 6)
    means.observe(outputs, experts, outputs)
    means.end_update()
    before = means.mean.clone()
    outputs[0, 3] = bad
    means.observe(outputs, experts, outputs + 1)
    means.end_update()
    assert torch.equal(means.mean[0], before[0])
    assert means.updates.tolist() == [1, 2, 0, 0]
    torch.testing.assert_close(means.mean[1], (outputs[2] + outputs[2] + 1) / 2)
    assert not means.output_sum.any()


@pytest.mark.parametrize("where", ["input", "output"])
def test_rows_that_are_not_finite_leave_the_lines_as_they_were(where):
    lines = random_layer("sparsemixer-cv", 4, prediction="linear").router.expert_means
    experts, x, y = torch.tensor([0, 0, 1]), torch.randn(3, 6), torch.randn(3, 6)
    lines.observe(x, experts, y)
    lines.end_update()
    gram, cross = lines.gram.clone(), lines.cross.clone()
    bad = {"input": x, "output": y}[where]
    bad[0, 2] = float("nan")
    lines.observe(x, experts, y)
    lines.end_update()
    assert torch.equal(lines.gram[0], gram[0]) and torch.equal(lines.cross[0], cross[0])
    torch.testing.assert_close(lines.gram[1], (lines.decay + 1) * gram[1])
    lines.solve()
    assert lines.weight.isfinite().all()


def test_an_expert_that_starves_keeps_its_lines():
    """Faded at each update, they would end as denormal numbers that cannot be solved."""
    torch.manual_seed(0)
    lines = ExpertLines(2, 4, decay=0.5)
    x = torch.randn(50, 4)
    lines.observe(x, torch.arange(50) % 2, 2 * x)
    lines.end_update()
    lines.solve()
    before = lines.weight.clone()
    for _ in range(300):
        lines.observe(x, torch.zeros(50, dtype=torch.long), 3 * x)
        lines.end_update()
    lines.solve()
    assert torch.equal(lines.weight[1], before[1])
    assert (lines.weight[0] - before[0]).abs().max() > 0.5


def test_an_update_can_be_dropped():
    torch.manual_seed(0)
    layer = random_layer("default-moe", 4, balance_bias_rate=0.1)
    before = buffers(layer)
    layer(torch.randn(9, 6))
    layer.drop_update()
    layer.end_update()
    for key, value in buffers(layer).items():
        assert torch.equal(value, before[key]), key


@pytest.mark.parametrize(("name", "options"), ADAPTIVE)
def test_state_dict_holds_what_was_learnt_and_collected(name, options):
    torch.manual_seed(0)
    layer = adaptive_layer(name)
    copy = random_layer(name, 4, balance_bias_rate=0.1)
    copy.load_state_dict(layer.state_dict())
    for each in (layer, copy):
        each.end_update()
    for key, value in buffers(copy).items():
        assert torch.equal(value, buffers(layer)[key]), key
    x = torch.randn(8, 6)
    assert torch.equal(copy.eval()(x)[0], layer.eval()(x)[0])


@pytest.mark.parametrize(("name", "options"), ADAPTIVE)
def test_two_workers_agree_with_one(name, options):
    """all_reduce sums over workers; the result is that of one worker with both batches."""
    torch.manual_seed(0)
    start = adaptive_layer(name)
    start.end_update()
    whole, *workers = (random_layer(name, 4, balance_bias_rate=0.1) for _ in range(3))
    for each in (whole, *workers):
        each.load_state_dict(start.state_dict())
        each.router.jitter_eps = 0.0  # no choice is left to chance
    batches = torch.randn(2, 7, 6)
    for worker, batch in zip(workers, batches):
        worker(batch)
        whole(batch)
    sums = []
    workers[0].end_update(lambda value: sums.append(value.clone()))  # takes a copy, adds nothing
    workers[0].load_state_dict(start.state_dict())
    workers[0](batches[0])
    others = iter(sums)
    workers[1].end_update(lambda value: value.add_(next(others)))
    whole.end_update()
    for key, value in buffers(workers[1]).items():
        torch.testing.assert_close(value, buffers(whole)[key], msg=key)


@pytest.mark.parametrize(("name", "top_k"), [("topk", 2), ("switch", 1), ("default-moe", 2)])
def test_output_masking_drops_slots_and_scales_the_rest(name, top_k):
    torch.manual_seed(0)
    layer = MoEFeedForward(6, 4, 4, router=name, top_k=top_k, jitter_eps=1e-7, output_masking=0.3)
    x = torch.randn(8000, 6)
    mask = torch.arange(8000) < 100
    y, routing = layer(x, mask)
    plain = layer.router(x, mask)
    assert torch.equal(routing.expert_index, plain.expert_index)
    kept = routing.gate != 0
    torch.testing.assert_close(routing.gate, plain.gate / 0.7 * kept, rtol=1e-5, atol=1e-6)
    assert not kept[:100].any()
    assert (y[:100] == 0).all()
    # Each slot by itself.
    cells = (kept[100:].long() * torch.tensor([2, 1])[:top_k]).sum(-1)
    chance = torch.tensor([0.3, 0.7]) if top_k == 1 else torch.tensor([0.09, 0.21, 0.21, 0.49])
    if top_k == 1:
        cells = cells // 2
    chi_square(cells.bincount(minlength=2**top_k), chance)
    for t in range(100, 140):
        row = torch.zeros(6)
        for k in range(top_k):
            i = int(routing.expert_index[t, k])
            if kept[t, k]:
                row = row + plain.gate[t, k] / 0.7 * expert_output(layer.experts, i, x[t])
        torch.testing.assert_close(y[t], row)
    layer.eval()
    y, _ = layer(x)
    layer.output_masking = 0.0
    assert torch.equal(layer(x)[0], y)


def test_a_dropped_output_gives_no_gradient():
    torch.manual_seed(0)
    layer = MoEFeedForward(6, 4, 3, router="switch", jitter_eps=0.0, output_masking=0.5)
    x = torch.randn(40, 6, requires_grad=True)
    y, routing = layer(x)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    dropped = routing.gate[:, 0] == 0
    assert 0 < dropped.sum() < 40
    assert (gradient[dropped] == 0).all()
    assert (gradient[~dropped].abs().sum(-1) > 0).all()


def test_lines_forget_at_the_rate_of_their_decay():
    """Two updates of one expert's tokens: X'X and X'Y of the first count by the decay."""
    decay = 0.25
    lines = ExpertLines(num_experts=2, embed_dim=3, decay=decay)
    torch.manual_seed(0)
    batches = [(torch.randn(5, 3), torch.randn(5, 3)) for _ in range(2)]
    for x, out in batches:
        lines.observe(x, torch.zeros(5, dtype=torch.int64), out)
        lines.end_update()
    with_one = [torch.cat([x, torch.ones(5, 1)], -1) for x, _ in batches]
    gram = [x.t() @ x for x in with_one]
    cross = [x.t() @ out for x, (_, out) in zip(with_one, batches)]
    torch.testing.assert_close(lines.gram[0], decay * gram[0] + gram[1])
    torch.testing.assert_close(lines.cross[0], decay * cross[0] + cross[1])
    assert not lines.gram[1].any() and not lines.cross[1].any()


@pytest.mark.parametrize("kind", [ExpertMeans, ExpertLines])
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_an_output_that_is_no_number_does_not_stay(kind, value):
    """What overflows in half precision; fairseq skips that update, and goes on."""
    part = kind(num_experts=2, embed_dim=3, decay=0.5)
    torch.manual_seed(0)
    for update in range(12):
        out = torch.randn(4, 3)
        if update == 0:
            out[0, 0] = value
        part.observe(torch.randn(4, 3), torch.tensor([0, 0, 1, 1]), out)
        part.end_update()
    for name, buffer in part.named_buffers():
        assert buffer.isfinite().all(), name
    assert part.predict(torch.randn(2, 3)).isfinite().all()


def test_lines_solve_a_ridge_regression():
    """By its normal equations, for the expert with tokens; the one without any predicts 0."""
    lines = ExpertLines(num_experts=2, embed_dim=3, decay=0.9)
    torch.manual_seed(0)
    x, out = torch.randn(6, 3), torch.randn(6, 3)
    lines.observe(x, torch.zeros(6, dtype=torch.int64), out)
    lines.end_update()
    lines.solve()
    with_one = torch.cat([x, torch.ones(6, 1)], -1)
    gram = with_one.t() @ with_one
    ridge = ExpertLines.RIDGE * gram.diagonal().mean() * torch.eye(4)
    expected = torch.linalg.solve(gram + ridge, with_one.t() @ out)
    torch.testing.assert_close(lines.weight[0], expected)
    assert not lines.predict(x)[:, 1].any()


def test_lines_are_solved_at_every_tenth_update():
    lines = ExpertLines(num_experts=2, embed_dim=3, decay=0.9)
    torch.manual_seed(0)
    solved = []
    for update in range(1, 21):
        before = lines.weight.clone()
        lines.observe(torch.randn(5, 3), torch.tensor([0, 0, 1, 1, 1]), torch.randn(5, 3))
        lines.end_update()
        assert lines.updates == update
        if not torch.equal(lines.weight, before):
            solved.append(update)
    assert solved == [10, 20]
