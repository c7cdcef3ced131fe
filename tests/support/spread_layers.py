"""Layers whose experts are spread over workers, and what each worker computes with them.

A test builds the same layer whole, and compares. As a module it is one worker: rank, number of
workers, a file by which they meet, one for results and the names of cases.
"""

import dataclasses
import sys
from typing import Optional, Tuple

import torch
import torch.distributed as dist

from fairseq_sparsemixer.moe import ROUTERS, MoEFeedForward
from fairseq_sparsemixer.moe.exchange import exchanged
from fairseq_sparsemixer.moe.parallel import ExpertParallel
from fairseq_sparsemixer.moe.routing import Routing
from support.routers import FixedRouter

WIDTH = 6


@dataclasses.dataclass(frozen=True)
class Case:
    """One layer and a batch that is cut into a part for each worker.

    Args:
        tokens: of each worker.
        size: workers of a group.
        num_experts: N.
        router: its name.
        experts: of each token of the whole batch, in place of the router's choice.
        padding: whether every third token is padding, or all of them are.
        options: of the layer.
        training: else evaluation, where no router draws.
        bfloat16: under autocast.
    """

    tokens: Tuple[int, ...]
    size: int = 2
    num_experts: int = 4
    router: str = "switch"
    experts: Optional[Tuple[int, ...]] = None
    padding: str = "some"
    options: Tuple[Tuple[str, object], ...] = ()
    training: bool = False
    bfloat16: bool = False


# The choice of expert-choice depends on the whole batch.
_BY_TOKEN = sorted(name for name in ROUTERS if ROUTERS[name].causal)
CASES = {
    **{f"router {name}": Case((7, 4), router=name) for name in _BY_TOKEN},
    "one expert each": Case((5, 6), num_experts=2),
    "loop": Case((5, 6), options=(("backend", "loop"),)),
    "recompute": Case((5, 6), options=(("recompute", True),)),
    "autocast": Case((5, 6), bfloat16=True),
    "no tokens here": Case((5, 0)),
    "no tokens there": Case((0, 5)),
    "no tokens anywhere": Case((0, 0)),
    "all padding": Case((3, 2), padding="all"),
    "all to one": Case((5, 4), experts=(3,) * 9, padding="none"),
    "none to some": Case((4, 3), experts=(0, 2, 2, 0, 2, 0, 0), padding="none"),
    "means": Case(
        (8, 5), router="default-moe", options=(("balance_bias_rate", 0.1),), training=True
    ),
    "four, twos": Case((3, 0, 5, 2)),
    "four together": Case((3, 1, 5, 2), size=4),
}


def build(case):
    """The whole layer."""
    torch.manual_seed(5)
    minimum = ROUTERS[case.router].min_top_k
    options = {"top_k": minimum, "jitter_eps": 0.1, **dict(case.options)}
    layer = MoEFeedForward(
        WIDTH, 10, max(case.num_experts, minimum), router=case.router, **options
    ).train(case.training)
    if case.router == "default-moe":
        layer.router.jitter_eps = 0.0
    return layer


def batch(case):
    """All tokens (T, D), which of them are padding, their ids, and weights (T, D) of outputs."""
    count = sum(case.tokens)
    generator = torch.Generator().manual_seed(7)
    x_TD, weight_TD = torch.randn(2, count, WIDTH, generator=generator)
    padding_T = torch.full((count,), case.padding == "all")
    if case.padding == "some":
        padding_T[::3] = True
    return x_TD, padding_T, torch.arange(count), weight_TD


def compute(case, layer, tokens=slice(None)):
    """Output and gradient of some tokens of the batch, and the layer with its gradients."""
    x_TD, padding_T, ids_T, weight_TD = (value[tokens] for value in batch(case))
    if case.experts is not None:
        index_T1 = torch.tensor(case.experts)[tokens].unsqueeze(-1)
        layer.router = FixedRouter(
            index_T1,
            torch.ones(index_T1.shape),
            embed_dim=WIDTH,
            num_experts=layer.router.num_experts,
        )
    x_TD.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=case.bfloat16):
        y_TD, _ = layer(x_TD, padding_T, ids_T)
    (y_TD * weight_TD).sum().backward()
    return y_TD.detach(), x_TD.grad


def _of_worker(case, rank):
    parallel = ExpertParallel(case.size)
    layer = build(case)
    layer.experts.spread(parallel)
    first = sum(case.tokens[:rank])
    y_TD, grad_TD = compute(case, layer, slice(first, first + case.tokens[rank]))
    sent = parallel.bytes_sent
    parallel.average_gradients(layer.experts.parameters())
    layer.end_update(dist.all_reduce)
    return {
        "y": y_TD,
        "x": grad_TD,
        "experts": {n: p.grad * dist.get_world_size() for n, p in layer.experts.named_parameters()},
        "buffers": dict(layer.router.named_buffers()),
        "bytes": sent,
        "norm": parallel.joined_norm(
            torch.tensor(2.0), [p.grad for p in layer.experts.parameters()]
        ),
        "gathered": {n: parallel.gather(p.detach()) for n, p in layer.experts.named_parameters()},
    }


IDENTITY = {"some": ((3, 0, -1, 2, 0), (1, 1, 3)), "none": ((), ()), "one-sided": ((2, 3, 3), ())}
"""Experts of each worker's tokens, of four on two workers; -1 for padding."""


def _identity(parallel, experts):
    """What comes to this worker's experts, and back, when they give back what they get."""
    seen = {}

    def compute(x_RD, routing):
        seen.update(rows=x_RD.detach().clone(), experts=routing.expert_index.flatten())
        return x_RD

    rank = dist.get_rank()
    index_T1 = torch.tensor(experts, dtype=torch.long).unsqueeze(-1)
    x_TD = torch.arange(float(len(experts))).unsqueeze(-1) + 10 * rank + torch.zeros(1, WIDTH)
    x_TD.requires_grad_()
    gate_T1 = index_T1.ge(0).float()
    none_TN = torch.zeros(len(experts), 4)
    routing = Routing(index_T1, gate_T1, none_TN, none_TN, none_TN)
    y_TD = exchanged(x_TD, routing, parallel, compute, None, None)
    weight_TD = torch.randn(y_TD.shape, generator=torch.Generator().manual_seed(rank))
    (y_TD * weight_TD).sum().backward()
    return {**seen, "x": x_TD.detach(), "y": y_TD.detach(), "grad": x_TD.grad, "weight": weight_TD}


def main(rank, workers, meeting, results, *names):
    """Compute the cases; those of :data:`IDENTITY` too, by two workers."""
    rank, workers = int(rank), int(workers)
    dist.init_process_group("gloo", f"file://{meeting}", rank=rank, world_size=workers)
    found = {name: _of_worker(CASES[name], rank) for name in names}
    if workers == 2:
        parallel = ExpertParallel(2)
        found |= {key: _identity(parallel, of_each[rank]) for key, of_each in IDENTITY.items()}
    torch.save(found, f"{results}.{rank}")


if __name__ == "__main__":
    main(*sys.argv[1:])
