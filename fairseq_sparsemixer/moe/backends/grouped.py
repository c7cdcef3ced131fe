"""Grouped matrix products of PyTorch: one product for all experts, with offsets on the device.

Nothing here waits for the device, so a layer can be captured in a CUDA graph, and all of it is
plain PyTorch, so that ``torch.compile`` sees through it.

Rows behind the last expert's are never read by a grouped product and never written: they hold
whatever the memory held. They are replaced by zeros where they would leave this file.
"""

from typing import Any, Optional

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fairseq_sparsemixer.moe.backends.loop import loop
from fairseq_sparsemixer.moe.experts import Experts
from fairseq_sparsemixer.moe.kernels.operators import operator
from fairseq_sparsemixer.moe.routing import Routing
from fairseq_sparsemixer.moe.slots import Observer, Slots, operands

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def obstacle(device: torch.device, dtype: torch.dtype) -> Optional[str]:
    """Why this backend cannot serve such an input, as the rest of a sentence; None if it can."""
    if not hasattr(F, "grouped_mm"):
        return "needs torch.nn.functional.grouped_mm, which PyTorch has from 2.10"
    if device.type == "cuda":
        # Elsewhere PyTorch falls back on a loop that reads the offsets back from the device.
        major, _ = torch.cuda.get_device_capability(device)
        if dtype != torch.bfloat16 or major not in (9, 10):
            return "takes bfloat16 on a GPU of compute capability 9.x or 10.x"
    elif dtype not in DTYPES:
        return "takes bfloat16, float16 or float32"
    return None


def grouped(
    x_TD: Tensor,
    routing: Routing,
    experts: Experts,
    scale_D: Optional[Tensor],
    observe: Optional[Observer],
) -> Tensor:
    """(T, D); see :func:`fairseq_sparsemixer.moe.dispatch.dispatch`."""
    if len(x_TD) == 0:  # PyTorch does not say what a product of no rows does on a GPU
        return loop(x_TD, routing, experts, scale_D, observe)
    slots = Slots.of(routing, experts.num_experts)
    inverse_S = torch.empty_like(slots.slot_S)
    inverse_S.scatter_(0, slots.slot_S, torch.arange(len(inverse_S), device=inverse_S.device))
    x_TD, w1, b1, w2, b2 = operands(x_TD, experts)
    used_TK1 = (routing.expert_index >= 0).unsqueeze(-1)
    # The choice copies x to its K slots, and keeps what lies behind the last expert's rows out of
    # the gradient of x.
    x_TKD = torch.where(used_TK1, x_TD.unsqueeze(1), 0)
    x_SD = _Reorder.apply(x_TKD.flatten(0, 1), slots.slot_S, inverse_S)
    kept_share = experts.kept_share
    mask_SF = None
    if kept_share < 1:
        mask_SF = x_SD.new_empty(len(x_SD), w1.shape[1], dtype=torch.bool).bernoulli_(kept_share)

    def products(x_SD: Tensor, w1: Tensor, b1: Tensor, w2: Tensor) -> Tensor:
        inner_SF = _AddBias.apply(_product(x_SD, w1, slots), b1, slots.expert_S, slots.end_N)
        inner_SF = experts.activation_fn(inner_SF)
        if mask_SF is not None:
            inner_SF = inner_SF * mask_SF / (kept_share or 1)
        return _product(inner_SF, w2, slots)

    if experts.recompute and torch.is_grad_enabled():
        # Computed again up to the last tensor that a gradient needs: without the second product.
        out_SD = checkpoint(
            products, x_SD, w1, b1, w2, use_reentrant=False, preserve_rng_state=False
        )
    else:
        out_SD = products(x_SD, w1, b1, w2)
    out_SD = _AddBias.apply(out_SD, b2, slots.expert_S, slots.end_N)
    if observe is not None:
        observe(x_SD, slots.observed_S, out_SD)
    out_TKD = _Reorder.apply(out_SD, inverse_S, slots.slot_S).view(x_TKD.shape)
    y_TD = (torch.where(used_TK1, out_TKD, 0) * routing.gate.unsqueeze(-1)).sum(1)
    return y_TD if scale_D is None else y_TD * scale_D


def _product(x_SI: Tensor, w_NOI: Tensor, slots: Slots) -> Tensor:
    """(S, O): x_s w_i^T with the expert i of each row s."""
    *_, width, depth = w_NOI.shape
    # The products want rows of a multiple of 16 bytes, here and, with the two sizes swapped, in
    # their backward pass. What fits already, as every usual size does, is not copied.
    unit = 16 // x_SI.element_size()
    if width % unit or depth % unit:
        x_SI = F.pad(x_SI, (0, -depth % unit))
        w_NOI = F.pad(w_NOI, (0, -depth % unit, 0, -width % unit))
    return F.grouped_mm(x_SI, w_NOI.transpose(1, 2), offs=slots.end_N)[:, :width]


class _Reorder(torch.autograd.Function):
    """The rows of a tensor in another order; the gradient is put back by the inverse order.

    PyTorch's own gradient of indexing adds rows up, one at a time and in no certain order.
    """

    @staticmethod
    def forward(ctx: Any, value_SX: Tensor, order_S: Tensor, inverse_S: Tensor) -> Tensor:
        ctx.save_for_backward(inverse_S)
        return value_SX.index_select(0, order_S)

    @staticmethod
    def backward(ctx: Any, grad_SX: Tensor) -> Any:  # type: ignore[override]
        (inverse_S,) = ctx.saved_tensors
        return grad_SX.index_select(0, inverse_S), None, None


class _AddBias(torch.autograd.Function):
    """Each row plus the bias of its expert."""

    @staticmethod
    def forward(
        ctx: Any, value_SX: Tensor, bias_NX: Tensor, expert_S: Tensor, end_N: Tensor
    ) -> Tensor:
        ctx.save_for_backward(end_N)
        return value_SX + bias_NX.index_select(0, expert_S.clamp_max(len(bias_NX) - 1))

    @staticmethod
    def backward(ctx: Any, grad_SX: Tensor) -> Any:  # type: ignore[override]
        (end_N,) = ctx.saved_tensors
        return grad_SX, sums_by_expert(grad_SX, end_N), None, None


def _sums_like(value_SX: Tensor, end_N: Tensor) -> Tensor:
    return value_SX.new_empty(len(end_N), value_SX.shape[1])


# An operator, for Inductor would give the transposed ones other strides than the product takes.
@operator(_sums_like)
def sums_by_expert(value_SX: Tensor, end_N: Tensor) -> Tensor:
    """(N, X): the sum of each expert's rows, as a grouped product with rows of ones."""
    unit = 16 // value_SX.element_size()
    width = value_SX.shape[1]
    ones_SU = value_SX.new_ones(len(value_SX), unit)
    padded_SX = F.pad(value_SX, (0, -width % unit)) if width % unit else value_SX.contiguous()
    return F.grouped_mm(ones_SU.t(), padded_SX, offs=end_N)[:, 0, :width].contiguous()
