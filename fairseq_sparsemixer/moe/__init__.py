"""Mixture-of-experts layers in plain PyTorch.

Shape suffixes used in this folder:

==  =======================================================
T   tokens: all positions of a batch, padding included
D   ``embed_dim``, the width of the model
F   ``ffn_dim``, the inner width of one expert
N   ``num_experts``
K   ``top_k``, the experts of one token
S   slots: the (token, expert) pairs that are computed
==  =======================================================

>>> layer = MoEFeedForward(embed_dim=512, ffn_dim=2048, num_experts=8)
>>> y, routing = layer(x, padding_mask)
>>> loss = task_loss + 0.01 * load_balance_loss(routing)
"""

from fairseq_sparsemixer.moe.experts import Experts
from fairseq_sparsemixer.moe.feed_forward import MoEFeedForward
from fairseq_sparsemixer.moe.losses import RoutingStatistics, load_balance_loss, z_loss
from fairseq_sparsemixer.moe.routers import (  # noqa: F401  (registration)
    composed,
    dense,
    expert_choice,
    fixed,
    sparsemixer,
    switch,
    topk,
)
from fairseq_sparsemixer.moe.routing import ROUTERS, Router, Routing, build_router, register_router

__all__ = [
    "ROUTERS",
    "Experts",
    "MoEFeedForward",
    "Router",
    "Routing",
    "RoutingStatistics",
    "build_router",
    "load_balance_loss",
    "register_router",
    "z_loss",
]
