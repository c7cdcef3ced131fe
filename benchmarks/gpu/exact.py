"""A mixture of experts in float64, from its formula: what every backend is held against.

A layer in bfloat16 cannot be held against another one in bfloat16: a unit whose sum is rounded to
the other side of ReLU's zero is a difference of the two, whichever is right. Each is held against
the exact result, and may be further from it by a half than the backend ``loop`` in the same dtype.
"""

from typing import Dict, Mapping, Optional

import torch
from torch import Tensor
from torch.nn import functional as F

from fairseq_sparsemixer.moe.experts import Activation, Experts

WEIGHTS = ("w1", "b1", "w2", "b2")
YARDSTICK = "loop"
MOST = 1.5
"""So many times the yardstick's error may a backend's be,"""
FLOOR = 1e-6
"""and so much besides: sums of float32 differ by that in another order."""


def mixture(
    x_TD: Tensor,
    index_TK: Tensor,
    gate_TK: Tensor,
    weights: Mapping[str, Tensor],
    activation_fn: Activation = F.relu,
    kept_TF: Optional[Tensor] = None,
) -> Tensor:
    """(T, D): sum_k gate_tk E_{index_tk}(x_t), in the dtype of x; sums over k in that of the gate.

    Args:
        x_TD: tokens.
        index_TK: their experts, -1 for none.
        gate_TK: what each output is multiplied by.
        weights: the parameters of :class:`Experts`, by name.
        activation_fn: of the inner layer.
        kept_TF: what dropout multiplies each token's inner units by, for K = 1.
    """
    w1_NFD, b1_NF, w2_NDF, b2_ND = (weights[name] for name in WEIGHTS)
    y_TD = torch.zeros_like(x_TD, dtype=torch.promote_types(x_TD.dtype, gate_TK.dtype))
    for expert in range(len(w1_NFD)):
        token_S, k_S = (index_TK == expert).nonzero(as_tuple=True)
        inner_SF = activation_fn(x_TD[token_S] @ w1_NFD[expert].t() + b1_NF[expert])
        if kept_TF is not None:
            inner_SF = inner_SF * kept_TF[token_S]
        out_SD = inner_SF @ w2_NDF[expert].t() + b2_ND[expert]
        y_TD = y_TD.index_add(0, token_S, out_SD * gate_TK[token_S, k_S].unsqueeze(-1))
    return y_TD.to(x_TD.dtype)


def leaf(value: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """A copy that gradients come to."""
    return value.detach().to(dtype, copy=True).requires_grad_()


def weights_of(experts: Experts) -> Dict[str, Tensor]:
    """Copies of the parameters, as leaves."""
    return {name: leaf(getattr(experts, name)) for name in WEIGHTS}


def error(actual: Tensor, exact: Tensor) -> float:
    """The norm of the difference over the norm of the exact tensor; 0 where there is no cell."""
    if exact.numel() == 0:
        return 0.0
    difference = (actual.detach().double() - exact.detach()).norm()
    return (difference / exact.detach().norm().clamp_min(torch.finfo(torch.float64).tiny)).item()


def allowed(yardstick: float) -> float:
    """The largest error of a backend where the yardstick has this one."""
    return MOST * yardstick + FLOOR
