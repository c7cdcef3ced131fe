"""What a layer cannot be asked for is said in one line."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from fairseq_sparsemixer.moe import MoEFeedForward, RoutingStatistics, limits


def layer(router="sparsemixer", backend="auto", device="cpu"):
    torch.manual_seed(0)
    return MoEFeedForward(8, 16, 4, router=router, backend=backend).to(device)


X = torch.randn(5, 3, 8)


@pytest.mark.parametrize("backend", ["auto", "sorted", "loop"])
@pytest.mark.parametrize("router", ["sparsemixer", "switch", "expert-choice"])
def test_transformations_that_cannot_be(router, backend):
    moe = layer(router, backend)
    with pytest.raises(ValueError, match=r"torch\.export cannot take .*: use torch\.compile"):
        torch.export.export(moe, (X,), strict=False)
    with pytest.raises(ValueError, match=r"torch\.jit\.trace would keep .*: use torch\.compile"):
        torch.jit.trace(moe, (X,))
    for randomness in ("error", "different"):
        with pytest.raises(ValueError, match=r"vmap cannot batch .*: give it all tokens at once"):
            torch.func.vmap(lambda x: moe(x)[0], randomness=randomness)(X)
    for weights, x in (("meta", X.to("meta")), ("meta", X), ("cpu", X.to("meta"))):
        with pytest.raises(ValueError, match="meta device can be built and counted, not run"):
            layer(router, backend, weights)(x)


def test_torch_func_goes_through_the_loop_alone():
    def loss(moe):
        return lambda x: torch.func.functional_call(moe, dict(moe.named_parameters()), x)[0].sum()

    with pytest.raises(ValueError, match=r"backend 'sorted' cannot be put under torch\.func"):
        torch.func.grad(loss(layer("switch", "sorted").eval()))(X)
    moe = layer("switch", "loop").eval()
    other = layer("switch")
    with pytest.raises(ValueError, match=r"backend 'auto' cannot be put under torch\.func"):
        torch.func.grad(lambda w: torch.func.functional_call(other, w, X)[0].sum())(
            dict(other.named_parameters())
        )
    x = X.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(moe)(x), x)
    torch.testing.assert_close(torch.func.grad(loss(moe))(X), expected)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_that_loses_the_gradient_of_the_balance_loss_warns(reentrant, caplog):
    limits._warn_of_reentrant_checkpoint.cache_clear()
    moe = layer("switch")
    x = X.clone().requires_grad_()
    _, routing = checkpoint(moe, x, use_reentrant=reentrant)
    balance = RoutingStatistics.from_routing(routing).load_balance_loss
    assert balance.requires_grad is not reentrant
    checkpoint(moe, x, use_reentrant=reentrant)
    assert [record.message for record in caplog.records if "use_reentrant" in record.message] == (
        [caplog.messages[-1]] if reentrant else []
    )


def test_forward_passes_without_gradient_warn_of_nothing(caplog):
    limits._warn_of_reentrant_checkpoint.cache_clear()
    moe = layer("switch")
    with torch.no_grad():
        moe(X)
    moe.eval()
    checkpoint(moe, X.clone().requires_grad_(), use_reentrant=True)
    assert not caplog.messages
