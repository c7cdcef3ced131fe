"""All draws of a router that draws one expert, with their probabilities; exact gradients."""

import torch

from fairseq_sparsemixer.moe import build_router
from support.reference import kept_experts

NO_MASK = 1e9


def masked_softmax(z, jitter_eps):
    """(N,) p~ by the mask's ratio rule, differentiable."""
    kept = torch.tensor(kept_experts(z.tolist(), jitter_eps))
    return z.masked_fill(~kept, float("-inf")).softmax(-1)


def enumerate_draws(
    name, z, monkeypatch, probs, chance=1.0, nodes=((0.5, 1.0),), jitter_eps=NO_MASK, **options
):
    """The routing of all draws, one a row, and the probability of each row.

    Args:
        probs: (N,) what the experts are drawn from; a row for each that is not 0.
        chance: that of the first evaluation point, m = 1.
        nodes: (point, weight) of the quadrature that takes the place of m ~ U(0, 1).
    """
    experts = len(z)
    router = build_router(name, embed_dim=1, num_experts=experts, jitter_eps=jitter_eps, **options)
    rows = []
    for d in probs.nonzero()[:, 0].tolist():
        # Coins just below and just above the chance of m = 1.
        rows.append((d, chance - 1e-6, 0.5, probs[d] * chance))
        if chance < 1:
            rows += [(d, chance + 1e-6, m, probs[d] * (1 - chance) * w) for m, w in nodes]
    choice = torch.tensor([row[0] for row in rows])
    # Gumbel-max takes the expert whose exponential is nearest to 0.
    exponential = torch.ones(len(rows), experts).scatter(1, choice.unsqueeze(-1), 1e-30)
    coins = iter([torch.tensor([[row[c]] for row in rows]).to(z) for c in (1, 2)])
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "exponential_", lambda self: self.copy_(exponential))
        patch.setattr(torch, "rand_like", lambda _: next(coins))
        routing = router.route(z.expand(len(rows), -1))
    assert torch.equal(routing.expert_index[:, 0], choice)
    return routing, torch.stack([row[3] for row in rows])


def problem(seed, experts=4, width=3, scale=2.0):
    """(N,) logits and (N, D) outputs, in float64."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(experts, generator=generator, dtype=torch.double)
    return z, scale * torch.randn(experts, width, generator=generator, dtype=torch.double)


def polynomial(degree, seed, width=3):
    """f: (rows, D) -> (rows,), with a constant term."""
    generator = torch.Generator().manual_seed(100 + seed)
    linear = torch.randn(width, generator=generator, dtype=torch.double)
    matrix = torch.randn(width, width, generator=generator, dtype=torch.double)
    cubic = torch.randn(width, width, width, generator=generator, dtype=torch.double)

    def f(h):
        value = 3.0 + h @ linear
        if degree >= 2:
            value = value + torch.einsum("ri,rj,ij->r", h, h, matrix)
        if degree >= 3:
            value = value + torch.einsum("ri,rj,rk,ijk->r", h, h, h, cubic)
        if degree >= 4:
            value = value + h.square().sum(-1).square()
        return value

    return f


def smooth(h):
    """No polynomial, with all derivatives at 0."""
    weights = torch.linspace(0.5, 1.5, h.shape[-1], dtype=h.dtype)
    return torch.exp(0.7 * (h * weights).sum(-1)) + torch.sin(h + 0.3).prod(-1)


def relative_error(value, wanted):
    """The length of the difference, relative to what is wanted."""
    return ((value - wanted).norm() / wanted.norm()).item()
