"""Expert by expert, in plain words; the yardstick for the others."""

from typing import Optional

import torch
from torch import Tensor

from fairseq_sparsemixer.moe.experts import Experts
from fairseq_sparsemixer.moe.routing import Routing
from fairseq_sparsemixer.moe.slots import Observer


def loop(
    x_TD: Tensor,
    routing: Routing,
    experts: Experts,
    scale_D: Optional[Tensor],
    observe: Optional[Observer],
) -> Tensor:
    """(T, D) float32, or float64 of such; see :func:`fairseq_sparsemixer.moe.dispatch.dispatch`."""
    dtype = torch.promote_types(x_TD.dtype, torch.float32)
    y_TD = torch.zeros(x_TD.shape, dtype=dtype, device=x_TD.device)
    for expert in range(experts.num_experts):
        token_S, k_S = (routing.expert_index == expert).nonzero(as_tuple=True)
        slots = [0] * experts.num_experts
        slots[expert] = token_S.numel()
        out_SD = experts(x_TD[token_S], slots)
        if observe is not None:
            observe(x_TD[token_S], torch.full_like(token_S, expert), out_SD)
        out_SD = out_SD * routing.gate[token_S, k_S].unsqueeze(-1)
        y_TD = y_TD.index_add(0, token_S, out_SD.to(dtype))
    return y_TD if scale_D is None else y_TD * scale_D
