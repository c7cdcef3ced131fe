"""What holds for every function that launches kernels."""

import pytest
import torch

from fairseq_sparsemixer.moe.kernels import products, projection, router, sorting, statistics

pytestmark = pytest.mark.skipif(
    products.triton is None or torch.cuda.is_available(),
    reason="needs Triton, and is for its interpreter",
)

TOKENS, EXPERTS, WIDTH, TILE = 9, 3, 20, 16
SLOPES = (2.0, 0.5, 0.0, 1.5, 1.0, 0.75)


class Given:
    """A tensor that a caller may give in any layout; the others are of our own making."""

    def __init__(self, tensor):
        self.tensor = tensor


def random(*size):
    return Given(torch.randn(*size))


def arguments(name):
    """Of one operator."""
    torch.manual_seed(0)
    logits, probs, masked = (random(TOKENS, EXPERTS) for _ in range(3))
    expert = torch.randint(-1, EXPERTS, (TOKENS,))
    slot, end, _, tiles = sorting.sort_slots(expert, EXPERTS, TILE)
    x, weight, bias = random(TOKENS, WIDTH), random(EXPERTS, WIDTH), random(EXPERTS)
    w1, b1, w2 = random(EXPERTS, 24, WIDTH), random(EXPERTS, 24), random(EXPERTS, WIDTH, 24)
    gate, scale, d_inner = random(TOKENS, 1), random(WIDTH), random(TOKENS, 24)
    padding = Given(torch.arange(TOKENS) % 4 == 0)
    chosen = Given(expert.unsqueeze(-1))
    noise, uniform = torch.rand(TOKENS, EXPERTS), torch.rand(TOKENS, 1)
    index = torch.randint(EXPERTS, (TOKENS, 1))
    return {
        "logits_of": (x, weight, bias),
        "token_gradient": (logits, weight, torch.bfloat16),
        "logits_weight_gradient": (logits, x),
        "route": (logits, noise, uniform, 0.1, 1.0, 0.5, 0.5, True, "chance", ()),
        "route full": (logits, noise, uniform, 0.1, 2.0, 0.5, 0.5, True, "full", SLOPES),
        "route_backward": (
            *(index, probs.tensor.softmax(-1), masked.tensor.softmax(-1), None),
            *(gate, logits, probs, 1.0, 2.0, "chance"),
        ),
        "route_backward full": (
            *(index, probs.tensor.softmax(-1), masked.tensor.softmax(-1), torch.rand(TOKENS, 2)),
            *(gate, logits, probs, 2.0, 1.0, "full"),
        ),
        "sum_tokens": (logits, probs, masked, random(TOKENS, EXPERTS), chosen, padding),
        "sum_tokens_backward": (logits, padding, random(3 + 4 * EXPERTS), True, True),
        "sort_slots": (Given(expert), EXPERTS, TILE),
        "sorted_product": (x, w1, False, b1, None, d_inner, tiles, TILE, 0.5, True, True),
        "placed_product": (x, w1, False, b1, slot, gate, random(24), tiles, TILE, True, True),
        "weight_gradient": (d_inner, x, end),
        "sum_groups": (x, end, torch.bfloat16),
        "weigh_backward": (x, torch.randn(TOKENS, WIDTH), slot, gate, scale, end),
        # Of transposed weights, and where what may be missing is.
        "sorted_product back": (
            *(x, w2, True, None, torch.tensor([5]), None),
            *(tiles, TILE, 0.5, False, False),
        ),
        "placed_product back": (
            *(d_inner, w1, True, None, slot, None, None),
            *(tiles, TILE, False, False),
        ),
        "weigh_backward alone": (x, torch.randn(TOKENS, WIDTH), slot, gate, None, end),
        "sum_tokens alone": (logits, probs, None, None, chosen, None),
        "sum_tokens_backward alone": (logits, None, random(3 + 4 * EXPERTS), False, False),
        "route_backward alone": (
            *(index, probs.tensor.softmax(-1), None, None, gate, None, None, 1.0, 1.0, "chance"),
        ),
        "route alone": (logits, None, None, None, 1.0, 1.0, 1.0, False, "chance", ()),
        "logits_of alone": (x, weight, None),
    }[name]


NAMES = [
    *("logits_of", "token_gradient", "logits_weight_gradient", "route", "route_backward"),
    *("sum_tokens", "sum_tokens_backward", "sort_slots", "sorted_product", "placed_product"),
    *("weight_gradient", "sum_groups", "weigh_backward"),
]
LESS = ["sorted_product back", "placed_product back", "weigh_backward alone", "sum_tokens alone"]
LESS += ["sum_tokens_backward alone", "route_backward alone", "route alone", "logits_of alone"]
LESS += ["route full", "route_backward full"]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several programs in each direction although everything is small."""
    monkeypatch.setattr(products, "BLOCK", 16)
    monkeypatch.setattr(router, "CELLS", 16)


def function(name):
    name = name.split()[0]
    modules = (projection, router, statistics, sorting, products)
    return next(getattr(module, name) for module in modules if hasattr(module, name))


def spaced(tensor):
    """The same numbers, with others between them."""
    return torch.stack([tensor, torch.full_like(tensor, 1)], dim=-1)[..., 0]


def laid_out(given, layout):
    return [layout(each.tensor) if isinstance(each, Given) else each for each in given]


def as_list(result):
    return [result] if isinstance(result, torch.Tensor) else list(result)


def test_all_operators_are_here():
    registered = torch.ops.fairseq_sparsemixer
    assert set(NAMES) == {
        name for name in dir(registered) if hasattr(getattr(registered, name), "overloads")
    }


@pytest.mark.parametrize("name", NAMES + LESS)
def test_tensors_in_any_layout(name):
    given = arguments(name)
    expected = function(name)(*laid_out(given, torch.clone))
    spread = laid_out(given, spaced)
    assert any(not each.is_contiguous() for each in spread if isinstance(each, torch.Tensor))
    for value, wanted in zip(as_list(function(name)(*spread)), as_list(expected)):
        torch.testing.assert_close(value, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("name", NAMES + LESS)
def test_results_are_what_compilers_are_told(name):
    """Sizes and dtypes, and that no argument changes."""
    operator = getattr(torch.ops.fairseq_sparsemixer, name.split()[0]).default
    given = tuple(laid_out(arguments(name), torch.clone))
    torch.library.opcheck(operator, given, test_utils=("test_schema", "test_faketensor"))


def test_programs_work_on_few_logits_whatever_the_number_of_experts(monkeypatch):
    monkeypatch.setattr(router, "CELLS", 2048)
    for experts in (1, 3, 64, 100, 2048, 5000):
        rows, columns = router.blocks(experts)
        assert columns >= experts and rows >= 1
        assert rows * columns == max(2048, columns)
