"""Experts chosen by hand in place of the router's: what a model would do with others."""

import contextlib
import dataclasses
from typing import Any, Iterator, List, Mapping, Sequence, Tuple

import torch
from torch import Tensor, nn

from fairseq_sparsemixer.models.layers import switch_layers
from fairseq_sparsemixer.moe import Router, Routing
from fairseq_sparsemixer.moe.routers.sparsemixer import unreachable
from fairseq_sparsemixer.moe.routing import EvaluationRule

Forced = Mapping[str, Mapping[int, Sequence[int]]]
"""For layers ("encoder.0"), by position, the K experts of the token, in the order of slots."""


@contextlib.contextmanager
def force_choices(model: nn.Module, forced: Forced) -> Iterator[None]:
    """Inside the block, tokens at the given positions go to the given experts.

    Positions are counted from the first token that a layer sees in the block, whether it sees the
    tokens at once or one step after the other, and a choice holds for all rows of the batch: the
    block is for one sentence, and in a search a decoder's choice is that of every hypothesis of the
    beam at that step. Gates are those that the router would give, see :func:`gates_of`; rows that
    have these experts already stay as they are, bit for bit.

    Args:
        model: in evaluation mode; its router has an
            :meth:`~fairseq_sparsemixer.moe.Router.evaluation_rule`.
        forced: the choices; the other tokens, of layers above too, are routed as ever.
    """
    layers = switch_layers(model)
    handles = [
        layers[name].moe.router.register_forward_hook(_hook(by_position))
        for name, by_position in forced.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hook(by_position: Mapping[int, Sequence[int]]) -> Any:
    """Of a router, which is given (length, batch, width)."""
    seen = 0

    def hook(router: Router, args: Tuple[Tensor, ...], routing: Routing) -> Routing:
        nonlocal seen
        length, batch = args[0].shape[:2]
        for position, experts in by_position.items():
            if seen <= position < seen + length:
                first = (position - seen) * batch
                routing = _with_experts(router, routing, slice(first, first + batch), experts)
        seen += length
        return routing

    return hook


def _with_experts(router: Router, routing: Routing, rows: slice, experts: Sequence[int]) -> Routing:
    """The routing with these experts in some rows."""
    rule = router.evaluation_rule()
    assert rule is not None
    index_TK, gate_TK = routing.expert_index.clone(), routing.gate.clone()
    index_RK = index_TK.new_tensor(experts).expand_as(index_TK[rows])
    others_R1 = (index_TK[rows] != index_RK).any(dim=-1, keepdim=True)
    gate_RK = gates_of(rule, routing.logits[rows], experts)
    gate_TK[rows] = torch.where(others_R1, gate_RK, gate_TK[rows])
    index_TK[rows] = index_RK
    mean_gate_TN = routing.mean_gate
    if mean_gate_TN is not None:
        mean_gate_TN = mean_gate_TN.clone()
        mean_gate_TN[rows] = routing.probs[rows].scatter(-1, index_RK, 0.0)
    return dataclasses.replace(routing, expert_index=index_TK, gate=gate_TK, mean_gate=mean_gate_TN)


def gates_of(rule: EvaluationRule, logits_RN: Tensor, experts: Sequence[int]) -> Tensor:
    """(R, K) float32: the gates that a router gives to K experts in evaluation, had it chosen them.

    An expert that the mask leaves out has no gate of its own, as the router never chooses it: the
    softmax is over those within the mask, and it.

    Args:
        rule: the router's.
        logits_RN: its ``Routing.logits``.
        experts: the same K for all rows, in the order of slots.
    """
    if rule.gate == "one":
        return torch.ones_like(logits_RN[:, : len(experts)])
    if rule.gate in ("all", "chosen"):
        gate_RK = logits_RN.softmax(dim=-1)[:, list(experts)]
        return gate_RK / gate_RK.sum(-1, keepdim=True) if rule.gate == "chosen" else gate_RK
    gates: List[Tensor] = []
    for expert in experts:
        kept_RN = logits_RN
        if rule.jitter_eps is not None:
            max_R1 = logits_RN.max(dim=-1, keepdim=True).values
            out_RN = unreachable(logits_RN, max_R1, rule.jitter_eps)
            out_RN[:, expert] = False
            kept_RN = logits_RN.masked_fill(out_RN, float("-inf"))
        gates.append((kept_RN / rule.temperature).softmax(dim=-1)[:, expert])
        logits_RN = logits_RN.index_fill(-1, logits_RN.new_tensor([expert]).long(), float("-inf"))
    return torch.stack(gates, dim=-1)
