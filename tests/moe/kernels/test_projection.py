"""The routers' logits by kernels against products in float64."""

import pytest
import torch

from fairseq_sparsemixer.moe import build_router
from fairseq_sparsemixer.moe.kernels import projection
from fairseq_sparsemixer.moe.kernels import router as fused_router

pytestmark = pytest.mark.skipif(
    projection.triton is None or torch.cuda.is_available(),
    reason="needs Triton, and is for its interpreter",
)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several programs in each direction although everything is small."""
    for name in ("BLOCK_T", "BLOCK_D", "MOST_EXPERTS"):
        monkeypatch.setattr(projection, name, 16)
    monkeypatch.setattr(projection, "PARTS", 3)


@pytest.mark.parametrize("tokens", [100, 1, 0])
@pytest.mark.parametrize("experts", [3, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_logits_and_gradients(tokens, experts, dtype):
    torch.manual_seed(0)
    x = torch.randn(24, tokens).t().to(dtype).requires_grad_()
    weight = torch.randn(experts, 24).requires_grad_()
    bias = torch.randn(experts).requires_grad_()
    upstream = torch.randn(tokens, experts)
    logits = projection.project(x, weight, bias)
    gradients = torch.autograd.grad(logits, (x, weight, bias), upstream)

    exact = [leaf.detach().double().requires_grad_() for leaf in (x, weight, bias)]
    expected = exact[0] @ exact[1].t() + exact[2]
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits.double(), expected, rtol=1e-6, atol=1e-5)
    for actual, leaf, wanted in zip(
        gradients, (x, weight, bias), torch.autograd.grad(expected, exact, upstream.double())
    ):
        assert actual.dtype == leaf.dtype
        torch.testing.assert_close(actual, wanted.to(actual.dtype))


def test_routers_take_it(monkeypatch):
    """Without bias and with weights in half precision; tokens that need no gradient get none."""
    monkeypatch.setattr(fused_router, "DEVICES", ("cpu",))
    calls = []
    monkeypatch.setattr(
        projection, "logits_of", lambda *args, op=projection.logits_of: calls.append(1) or op(*args)
    )
    torch.manual_seed(0)
    router = build_router("switch", embed_dim=24, num_experts=3, bias=False, jitter_eps=0.0)
    router.bfloat16()
    x = torch.randn(9, 24, dtype=torch.bfloat16)
    routing = router(x)
    routing.gate.sum().backward()
    assert calls
    expected = x.float() @ router.weight.float().t()
    torch.testing.assert_close(routing.logits, expected)
    assert router.weight.grad.dtype == torch.bfloat16
    assert router.weight.grad.abs().sum() > 0
