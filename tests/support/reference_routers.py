"""Naive references of all routers, written from the papers' formulas one token at a time.

:func:`naive_layer` is the whole layer for pinned randomness (:class:`Draws`). A function below it
returns for one token the pairs (expert, gate) of one router, and the gates of the mean outputs.
"""

import math
from typing import NamedTuple

import torch
from torch.nn.functional import softplus

from fairseq_sparsemixer.moe import ROUTERS, build_router
from support.reference import expert_output, kept_experts, logits, softmax

SPARSEMIXERS = [name for name in ROUTERS if name.startswith("sparsemixer")]


def smallest(name, *, embed_dim=8, num_experts=4, **options):
    """The router of that name with the smallest top_k that it accepts."""
    top_k = ROUTERS[name].min_top_k
    return build_router(
        name,
        embed_dim=embed_dim,
        num_experts=max(num_experts, top_k),
        **{"top_k": top_k, **options},
    )


def ids(name, token_ids):
    """The keyword arguments of a router's forward that only some of them need."""
    return {"token_ids": token_ids} if ROUTERS[name].needs_token_ids else {}


def fits(name, num_experts, top_k):
    """Whether a router accepts these sizes."""
    router = ROUTERS[name]
    return router.min_top_k <= top_k <= min(num_experts, router.max_top_k or num_experts)


class Draws:
    """Randomness for one forward pass, the same for the layer and for the reference."""

    def __init__(self, tokens, experts, top_k):
        self.jitter = torch.rand(tokens, experts)
        self.normal = torch.randn(tokens, experts)
        self.exponential = torch.empty(top_k, tokens, experts).exponential_()
        self.coins = torch.rand(2 * top_k, tokens, 1)
        self.choice = torch.randint(experts, (tokens, 1))

    def pin(self, monkeypatch):
        """Let torch draw these numbers, in this order."""
        exponential, coins = iter(self.exponential), iter(self.coins)
        monkeypatch.setattr(
            torch.Tensor, "exponential_", lambda self: self.copy_(next(exponential))
        )
        monkeypatch.setattr(
            torch.Tensor, "uniform_", lambda like, a, b: like.copy_(a + (b - a) * self.jitter)
        )
        monkeypatch.setattr(torch, "rand_like", lambda like: next(coins).to(like))
        monkeypatch.setattr(torch, "randn_like", lambda like: self.normal.to(like))
        monkeypatch.setattr(torch, "randint_like", lambda like, high: self.choice.to(like))

    def of(self, t):
        """The draws of one token."""
        return Draw(
            self.jitter[t].tolist(),
            self.normal[t].tolist(),
            self.exponential[:, t].tolist(),
            iter(self.coins[:, t, 0].tolist()),
            int(self.choice[t]),
        )


class Draw(NamedTuple):
    jitter: list
    normal: list
    exponential: list
    coins: object
    choice: int


def forbid_randomness(monkeypatch):
    """Evaluation draws nothing."""

    def fail(*_):
        raise AssertionError("evaluation drew a random number")

    for owner, name in (
        (torch.Tensor, "exponential_"),
        (torch.Tensor, "uniform_"),
        (torch, "rand_like"),
        (torch, "randn_like"),
        (torch, "randint_like"),
    ):
        monkeypatch.setattr(owner, name, fail)


def largest(values, k):
    """The positions of the k largest, the largest first."""
    return sorted(range(len(values)), key=lambda i: -values[i].item())[:k]


def biased(router, z):
    """z + b."""
    if router.balance_bias is None:
        return z
    return [z_i + b_i for z_i, b_i in zip(z, router.balance_bias.bias)]


def topk(router, z, x, draw):
    if draw is not None:
        eps = router.jitter_eps
        z = [z_i * (1 - eps + 2 * eps * u) for z_i, u in zip(z, draw.jitter)]
    p = softmax(z)
    chosen = largest(biased(router, z), router.top_k)
    total = sum(p[i] for i in chosen) if router.renormalise else 1.0
    return [(i, p[i] / total) for i in chosen], None


def gshard(router, z, x, draw):
    p = softmax(z)
    first, second = largest(biased(router, z), 2)
    total = p[first] + p[second]
    pairs = [(first, p[first] / total), (second, p[second] / total)]
    if draw is not None and next(draw.coins) >= min(1.0, 2 * pairs[1][1].item()):
        pairs.pop()
    return pairs, None


def noisy_logits(router, z, x, draw):
    """H and the scales of its noise."""
    scale = [softplus(w @ x) + 0.01 for w in router.noise_weight]
    if draw is None:
        return z, scale
    return [z_i + e * s for z_i, e, s in zip(z, draw.normal, scale)], scale


def noisy_topk(router, z, x, draw):
    h, _ = noisy_logits(router, z, x, draw)
    chosen = largest(h, router.top_k)
    return list(zip(chosen, softmax([h[i] for i in chosen]))), None


def noisy_load(router, z, x, draw):
    """The chance of each expert to be kept if its own noise were drawn again."""
    h, scale = noisy_logits(router, z, x, draw)
    load = []
    for i in range(len(z)):
        others = [h[j] for j in range(len(z)) if j != i]
        if len(others) < router.top_k:
            load.append(torch.ones(()))
            continue
        threshold = others[largest(others, router.top_k)[-1]]
        load.append(torch.special.ndtr((z[i] - threshold) / scale[i]))
    return load


def squared_variation(values):
    mean = sum(values) / len(values)
    return sum((value - mean) ** 2 for value in values) / len(values) / mean**2


def default_moe(router, z, x, draw):
    p = softmax(z)
    chosen = largest(biased(router, z), router.top_k)
    mean_gates = [0.0 if i in chosen else p[i] for i in range(len(z))]
    return [(i, p[i]) for i in chosen], mean_gates


def random_expert(router, z, x, draw):
    scores = [row @ x for row in router.projection]
    return [(largest(scores, 1)[0] if draw is None else draw.choice, torch.ones(()))], None


class Estimator(NamedTuple):
    """m is 1 with probability ``chance`` and else ``point``."""

    chance: float
    point: float
    factor: float
    temperature: float = 1.0


ESTIMATORS = {
    "sparsemixer-1st": Estimator(1.0, 1.0, factor=2.0),
    "sparsemixer": Estimator(0.5, 0.5, factor=2.0),
    "sparsemixer-cv": Estimator(0.5, 0.5, factor=2.0),
    "sparsemixer-v2": Estimator(0.25, 1 / 3, factor=1.0),
    "sparsemixer-v2-star": Estimator(0.625, 1 / 3, factor=2.0, temperature=2.0),
}


SLOPES = {
    "sparsemixer-1st": ((1, 1), (0, 0)),
    "sparsemixer": ((2, 0), (0, 2)),
    "sparsemixer-cv": ((2, 0), (0, 2)),
    "sparsemixer-v2": ((0, 1), (0, 1)),
    "sparsemixer-v2-star": ((1.6, 0.4), (0, 2)),
    "grad-1": ((1, 0), (0, 0)),
    "first-order": ((1, 1), (0, 0)),
    "midpoint": ((2, 0), (0, 2)),
}
"""What dg_D and g_D dlog q_D count for where m = 1, and where it is not."""


def softmax_over(z, experts, temperature=1.0):
    """{expert: its share} over some experts."""
    return dict(zip(experts, softmax([z[i] / temperature for i in experts])))


def within(router, z, left):
    """The experts of ``left`` that jitter could reach."""
    kept = kept_experts([z[i].item() for i in left], router.jitter_eps)
    return [i for i, keep in zip(left, kept) if keep]


def masked_softmax(router, z, left):
    """{expert: p~} over the experts of ``left`` that jitter could reach."""
    return softmax_over(z, within(router, z, left), ESTIMATORS[router.name].temperature)


def with_slopes(m, g, q, own, choice):
    """m g, with the gradient own dg + choice g dlog q."""
    log_q = torch.log(q)
    slope = own * (g - g.detach()) + choice * g.detach() * (log_q - log_q.detach())
    return m * g.detach() + slope


def sparsemixer(router, z, x, draw):
    """K draws without replacement; mask, softmax and arg-max are those of what is left."""
    estimator = ESTIMATORS[router.name]
    z = biased(router, z)
    left = list(range(len(z)))
    pairs = []
    for k in range(router.top_k):
        p = masked_softmax(router, z, left)
        best = max(left, key=lambda i: z[i].item())
        if draw is None:
            d, gate = best, p[best]
            if router.gate == "full":
                gate = softmax_over(z, left, estimator.temperature)[best]
        else:
            noise = [-math.log(e) for e in draw.exponential[k]]
            d = max(p, key=lambda i: z[i].item() / estimator.temperature + noise[i])
            m = 1.0
            if estimator.chance < 1:
                full = next(draw.coins) < estimator.chance
                point = estimator.point
                if getattr(router, "quadrature", "midpoint") == "uniform":
                    point = next(draw.coins)
                m = 1.0 if full or (router.first_order_on_argmax and d == best) else point
            if router.gate == "masked":
                gate = m * p[d].detach() + estimator.factor * (p[d] - p[d].detach())
            else:
                slopes = SLOPES[router.name][m < 1]
                if d == best and getattr(router, "first_order_on_argmax", False):
                    slopes = (0, 1) if router.name == "sparsemixer-v2" else (1, 1)
                full = softmax_over(z, left, estimator.temperature)
                gate = with_slopes(m, full[d], p[d], *slopes)
        pairs.append((d, gate))
        left.remove(d)
    return pairs, None


def composed(router, z, x, draw):
    """Choice, gate and estimator."""
    training = draw is not None
    if training and router.choice == "jittered-argmax":
        eps = router.jitter_eps
        z = [z_i * (1 - eps + 2 * eps * u) for z_i, u in zip(z, draw.jitter)]
    z = biased(router, z)
    everyone = list(range(len(z)))
    p, masked = softmax_over(z, everyone), softmax_over(z, within(router, z, everyone))
    q = masked if router.choice == "masked-sample" or router.gate == "masked" else p
    best = d = largest(z, 1)[0]
    if training and router.choice.endswith("sample"):
        d = max(q, key=lambda i: z[i].item() - math.log(draw.exponential[0][i]))
    g = torch.ones(()) if router.gate == "one" else {"masked": masked, "full": p}[router.gate][d]
    if not training:
        return [(d, g)], None
    m, slopes = 1.0, SLOPES[router.estimator][0]
    if router.estimator == "midpoint":
        m = 1.0 if next(draw.coins) < 0.5 else 0.5
        slopes = SLOPES["midpoint"][m < 1]
        if router.first_order_on_argmax and d == best:
            m, slopes = 1.0, (1, 1)
    return [(d, with_slopes(m, g, q[d], *slopes))], None


def drawn(z, draw):
    """One draw from softmax(z) by Gumbel-max."""
    return max(range(len(z)), key=lambda i: z[i].item() - math.log(draw.exponential[0][i]))


def straight_through(router, z, x, draw):
    """Gate D_i p_i, of which dD_i := dp_i."""
    z = biased(router, z)
    p = softmax(z)
    if draw is None:
        best = largest(z, 1)[0]
        return [(best, p[best])], None
    d = drawn(z, draw)
    rest = [i for i in range(len(z)) if i != d]
    value = {i: p[i] if i == d else 0.0 * p[i] for i in range(len(z))}
    return [(i, value[i] + p[i].detach() * (p[i] - p[i].detach())) for i in [d, *rest]], None


def reinmax(router, z, x, draw):
    """Gate D_i p_i, of which dD := 2 J((D + p) / 2) dz - J(p) dz / 2, J(q) = diag(q) - q q'."""
    if draw is None:
        return straight_through(router, z, x, None)
    z = biased(router, z)
    p = softmax(z)
    d = drawn(z, draw)
    rest = [i for i in range(len(z)) if i != d]
    pairs = []
    for i in [d, *rest]:
        slope = 0.0
        for j in range(len(z)):
            p_i, p_j = p[i].item(), p[j].item()
            q_i, q_j = ((i == d) + p_i) / 2, ((j == d) + p_j) / 2
            jacobian = 2 * q_i * ((i == j) - q_j) - 0.5 * p_i * ((i == j) - p_j)
            slope = slope + jacobian * (z[j] - z[j].detach())
        pairs.append((i, (p[i] if i == d else 0.0 * p[i]) + p[i].detach() * slope))
    return pairs, None


def expert_choice(z_rows, tokens, top_k):
    """{token: [(expert, gate)]}: each expert takes the tokens that want it most."""
    experts = len(z_rows[0])
    scores = {t: softmax(z_rows[t]) for t in tokens}
    pairs = {t: [] for t in tokens}
    for i in range(experts):
        ranked = sorted(tokens, key=lambda t: -scores[t][i].item())
        for t in ranked[: math.ceil(top_k * len(tokens) / experts)]:
            pairs[t].append((i, scores[t][i]))
    return pairs


BY_TOKEN = {
    "topk": topk,
    "switch": topk,
    "switch-omega": topk,
    "gshard": gshard,
    "noisy-topk": noisy_topk,
    "default-moe": default_moe,
    "composed": composed,
    "random": random_expert,
    "straight-through": straight_through,
    "reinmax": reinmax,
    **dict.fromkeys(ESTIMATORS, sparsemixer),
}


class Naive(NamedTuple):
    y: torch.Tensor
    pairs: list
    """For each token the pairs (expert, gate)."""
    extra: object
    """From dL/dy the part of the loss that has a gradient and no value."""


def naive_layer(layer, x_TD, draws=None, padding=(), chosen=None):
    """y = omega * (sum_k gate_k E_k + sum_i mean_gate_i m_i), token by token.

    Args:
        draws: None in evaluation.
        padding: the tokens that are padding.
        chosen: what a hash has chosen, which no formula says.
    """
    router = layer.router
    tokens = [t for t in range(len(x_TD)) if t not in padding]
    z_rows = [None if router.weight is None else logits(router, x) for x in x_TD]
    by_expert = expert_choice(z_rows, tokens, router.top_k) if not router.causal else None
    rows, pairs_T = [], []
    for t, x in enumerate(x_TD):
        row, pairs = torch.zeros_like(x), []
        if t in tokens:
            mean_gates = None
            if by_expert is not None:
                pairs = by_expert[t]
            elif router.needs_token_ids:
                gate = torch.ones(()) if router.gate == "one" else softmax(z_rows[t])[chosen[t]]
                pairs = [(chosen[t], gate)]
            else:
                draw = None if draws is None else draws.of(t)
                assert router.name in BY_TOKEN, (
                    f"router {router.name!r} has no naive reference: write its formula down as a "
                    f"function in {__file__} and name it in BY_TOKEN"
                )
                pairs, mean_gates = BY_TOKEN[router.name](router, z_rows[t], x, draw)
            for i, gate in pairs:
                row = row + gate * expert_output(layer.experts, i, x)
            for i, gate in enumerate(mean_gates or []):
                row = row + gate * router.expert_means.mean[i]
        rows.append(row if router.output_scale is None else row * router.output_scale)
        pairs_T.append(pairs)

    def extra(gradient_TD):
        """sum_i p~_i c^_i ds_i - c^_D ds_D with c^_i = u m_i, of sparsemixer-cv.

        ds_i = dg_i + g_i dlog p~_i, which is 2 dp~_i for the masked gate.
        """
        loss = torch.zeros(())
        if router.name == "sparsemixer-cv" and draws is not None:
            for t in tokens:
                u = gradient_TD[t] * router.output_scale.detach()
                z = biased(router, z_rows[t])
                d = pairs_T[t][0][0]
                full = softmax_over(z, list(range(len(z))))
                for i, p in masked_softmax(router, z, list(full)).items():
                    slope = with_slopes(0.0, p if router.gate == "masked" else full[i], p, 1, 1)
                    c = u @ router.expert_means.mean[i]
                    loss = loss + (p.detach() - float(i == d)) * c * slope
        return loss

    return Naive(torch.stack(rows), pairs_T, extra)
