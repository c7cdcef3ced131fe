"""The mixture by Triton kernels that gather, weigh and scatter rows on their way through a product.

No row is copied before or after a product, and nothing waits for the device, so a layer can be
captured in a CUDA graph. For ``torch.compile`` the kernels are operators of PyTorch. Sums are
formed in a fixed order: the same input gives the same bits.

Without Triton this file can be imported, and :func:`obstacle` says what is missing.
"""

from typing import Any, Optional, Tuple

import torch
from torch import Tensor

from fairseq_sparsemixer.moe.experts import Activation, Experts
from fairseq_sparsemixer.moe.kernels.operators import once_differentiable, operator
from fairseq_sparsemixer.moe.routing import Routing
from fairseq_sparsemixer.moe.slots import Observer, Slots, operands

try:
    import triton

    from fairseq_sparsemixer.moe.kernels import expert_kernels as kernels
except ImportError:
    triton = None

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def obstacle(device: torch.device, dtype: torch.dtype) -> Optional[str]:
    """Why this backend cannot serve such an input, as the rest of a sentence; None if it can."""
    if triton is None:
        return "needs Triton (pip install 'fairseq-sparsemixer[triton]')"
    if dtype not in DTYPES:
        return "takes bfloat16, float16 or float32"
    if kernels.INTERPRETED:
        return None
    if device.type != "cuda":
        return "needs a GPU"
    if torch.cuda.get_device_capability(device) < (8, 0):
        # Triton multiplies without tensor cores on older ones.
        return "needs a GPU of compute capability 8.0"
    return None


def triton_experts(
    x_TD: Tensor,
    routing: Routing,
    experts: Experts,
    scale_D: Optional[Tensor],
    observe: Optional[Observer],
) -> Tensor:
    """(T, D); see :func:`fairseq_sparsemixer.moe.dispatch.dispatch`."""
    slots = Slots.of(routing, experts.num_experts)
    x_TD, *weights = operands(x_TD, experts)
    inner = _Inner.of(experts, x_TD, len(slots.slot_S))
    # Read for the gradients of gate and scale, and by the observer.
    keep_out = torch.is_grad_enabled() or observe is not None
    y_TD, out_SD = _Mixture.apply(
        inner, experts.recompute, keep_out, slots, routing.gate, scale_D, x_TD, *weights
    )
    if observe is not None:
        observe(x_TD.detach().index_select(0, slots.token_S), slots.observed_S, out_SD)
    return y_TD


class _Inner:
    """The experts' inner layer, a(w1 x + b1) with dropout.

    ReLU and its dropout are part of the product. Other activations follow it, with a mask of bools.
    """

    def __init__(
        self, activation_fn: Optional[Activation], kept_share: float, noise: Optional[Tensor]
    ) -> None:
        self.activation_fn = activation_fn
        """None for ReLU."""
        self.kept_share = kept_share
        self.noise = noise
        """None without dropout; for ReLU a seed (1,), else a mask (S, F)."""

    @classmethod
    def of(cls, experts: Experts, x_TD: Tensor, num_slots: int) -> "_Inner":
        """Draw what dropout needs, on the device."""
        relu = experts.is_relu
        activation_fn = None if relu else experts.activation_fn
        kept_share = experts.kept_share
        if kept_share == 1:
            return cls(activation_fn, 1.0, None)
        if relu:
            return cls(None, kept_share, torch.randint(2**31, (1,), device=x_TD.device))
        mask_SF = x_TD.new_empty(num_slots, experts.w1.shape[1], dtype=torch.bool)
        return cls(activation_fn, kept_share, mask_SF.bernoulli_(kept_share))

    def product(self, x_TD: Tensor, w1: Tensor, b1: Tensor, slots: Slots) -> Tensor:
        """(S, F): after activation and dropout for ReLU, before them for others."""
        relu = self.activation_fn is None
        seed = self.noise if relu else None
        return sorted_product(
            x_TD, slots.token_S, w1, b1, seed, None, slots.end_N, self.kept_share, relu
        )

    def activate(self, inner_SF: Tensor) -> Tensor:
        """(S, F): what goes into the second product."""
        if self.activation_fn is None:
            return inner_SF
        after_SF = self.activation_fn(inner_SF)
        return after_SF if self.noise is None else after_SF * self.noise / (self.kept_share or 1)

    def backward(
        self, inner_SF: Tensor, d_out_SD: Tensor, w2: Tensor, slots: Slots
    ) -> Tuple[Tensor, Tensor]:
        """(S, F) twice: what went into the second product, and the gradient of ``inner_SF``."""
        relu = self.activation_fn is None
        d_SF = sorted_product(
            d_out_SD,
            None,
            w2.transpose(1, 2),
            None,
            None,
            inner_SF if relu else None,
            slots.end_N,
            self.kept_share,
            False,
        )
        if relu:
            return inner_SF, d_SF
        after_SF, to_inner = torch.func.vjp(self.activate, inner_SF)  # type: ignore[misc]
        return after_SF, to_inner(d_SF)[0]


class _Mixture(torch.autograd.Function):
    """The mixture (T, D), and the experts' outputs before the gate (S, D), without gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        inner: _Inner,
        recompute: bool,
        keep_out: bool,
        slots: Slots,
        gate_TK: Tensor,
        scale_D: Optional[Tensor],
        x_TD: Tensor,
        w1: Tensor,
        b1: Tensor,
        w2: Tensor,
        b2: Tensor,
    ) -> Tuple[Tensor, Tensor]:
        inner_SF = inner.product(x_TD, w1, b1, slots)
        after_SF = inner.activate(inner_SF)
        # Sums of several experts are formed in float32.
        y_SD, out_SD = placed_product(
            after_SF, w2, b2, slots.slot_S, gate_TK, scale_D, slots.end_N, slots.top_k > 1, keep_out
        )
        ctx.inner, ctx.slots = inner, slots
        kept_SF = None if recompute else inner_SF
        ctx.save_for_backward(kept_SF, out_SD, gate_TK, scale_D, x_TD, w1, b1, w2)
        ctx.mark_non_differentiable(out_SD)
        return _of_tokens(y_SD, slots.top_k, x_TD.dtype), out_SD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor, _: Any) -> Any:  # type: ignore[override]
        inner, slots = ctx.inner, ctx.slots
        inner_SF, out_SD, gate_TK, scale_D, x_TD, w1, b1, w2 = ctx.saved_tensors
        d_out_SD, d_gate_TK, d_scale_D = weigh_backward(
            grad_TD, out_SD, slots.slot_S, gate_TK, scale_D, slots.end_N
        )
        if inner_SF is None:
            inner_SF = inner.product(x_TD, w1, b1, slots)
        after_SF, d_inner_SF = inner.backward(inner_SF, d_out_SD, w2, slots)
        d_w2, d_b2 = weight_gradient(d_out_SD, after_SF, None, slots.end_N)
        d_w1, d_b1 = weight_gradient(d_inner_SF, x_TD, slots.token_S, slots.end_N)
        d_x_SD, _ = placed_product(
            d_inner_SF,
            w1.transpose(1, 2),
            None,
            slots.slot_S,
            None,
            None,
            slots.end_N,
            slots.top_k > 1,
            False,
        )
        return (
            *(None, None, None, None, d_gate_TK),
            None if scale_D is None else d_scale_D,
            _of_tokens(d_x_SD, slots.top_k, x_TD.dtype),
            *(d_w1, d_b1, d_w2, d_b2),
        )


BLOCK = 128
"""Rows and columns of a tile of the result that one program computes."""


def _depth_of_block(dtype: torch.dtype) -> int:
    """How many terms of its sums are fetched at a time: 128 bytes of a row."""
    return 8 * 128 // torch.finfo(dtype).bits


def _precision(dtype: torch.dtype) -> str:
    """Whether float32 may be multiplied as TF32, as PyTorch's own products are told."""
    if dtype != torch.float32:
        return "ieee"
    matmul = torch.backends.cuda.matmul
    # The newer of PyTorch's two names for this reads what either has set, the older refuses to.
    tf32 = (
        matmul.fp32_precision == "tf32" if hasattr(matmul, "fp32_precision") else matmul.allow_tf32
    )
    return "tf32" if tf32 else "ieee"


def _dense(value: Optional[Tensor]) -> Optional[Tensor]:
    return None if value is None else value.contiguous()


def _of_tokens(value_SD: Tensor, top_k: int, dtype: torch.dtype) -> Tensor:
    """(T, D): the sum over each token's slots, in the order that these come in."""
    # A conversion that changes nothing takes the gradient away in compiled code of torch 2.11.
    return value_SD if top_k == 1 else value_SD.unflatten(0, (-1, top_k)).sum(1).to(dtype)


def _sorted_product_like(a: Tensor, a_row: Optional[Tensor], w: Tensor, *_: Any) -> Tensor:
    rows = a if a_row is None else a_row
    return a.new_empty(len(rows), w.shape[1])


@operator(_sorted_product_like)
def sorted_product(
    a: Tensor,
    a_row: Optional[Tensor],
    w: Tensor,
    bias: Optional[Tensor],
    seed: Optional[Tensor],
    active: Optional[Tensor],
    end: Tensor,
    kept_share: float,
    relu: bool,
) -> Tensor:
    """(S, O): f(a_s w_i^T + bias_i) for each slot s and its expert i; 0 for slots without one.

    Args:
        a: (S, I), or (., I) with the row of each slot in ``a_row`` (S,).
        w: (N, O, I), any strides.
        bias: (N, O).
        seed: (1,) int64, of a dropout that leaves ``kept_share`` of the cells and scales them up.
        active: (S, O), the result of a ReLU with that dropout, to go back through: the gradient
            is scaled up likewise where ``active`` is positive and 0 elsewhere.
        end: (N,) int32, one past the last slot of each expert.
        relu: whether f has a ReLU, before the dropout.
    """
    out = _sorted_product_like(a, a_row, w)
    _run_product(
        a, a_row, w, bias, seed, active, out, None, None, None, None, end, kept_share, relu
    )
    return out


def _placed_product_like(
    a: Tensor,
    w: Tensor,
    bias: Any,
    slot: Any,
    gate: Any,
    scale: Any,
    end: Any,
    wide: bool,
    keep: bool,
) -> Tuple[Tensor, Tensor]:
    shape = (len(a), w.shape[1])
    placed = a.new_empty(shape, dtype=torch.float32 if wide else a.dtype)
    return placed, a.new_empty(shape if keep else (0,))


@operator(_placed_product_like)
def placed_product(
    a: Tensor,
    w: Tensor,
    bias: Optional[Tensor],
    slot: Tensor,
    gate: Optional[Tensor],
    scale: Optional[Tensor],
    end: Tensor,
    wide: bool,
    keep: bool,
) -> Tuple[Tensor, Tensor]:
    """(S, O) twice: gate_s scale (a_s w_i^T + bias_i) where the slots come from, and out.

    ``out`` is a_s w_i^T + bias_i in the order of the experts, and has no cell unless ``keep``.

    Args:
        a: (S, I), sorted by expert.
        w: (N, O, I), any strides.
        bias: (N, O).
        slot: (S,) int64, where each row goes.
        gate: S values, as the slots come.
        scale: (O,).
        end: (N,) int32, one past the last slot of each expert.
        wide: float32 for the first result, in place of the dtype of ``a``.
    """
    placed, out = _placed_product_like(a, w, bias, slot, gate, scale, end, wide, keep)
    _run_product(
        a,
        None,
        w,
        bias,
        None,
        None,
        out if keep else None,
        placed,
        slot,
        gate,
        scale,
        end,
        1.0,
        False,
    )
    return placed, out


def _run_product(
    a: Tensor,
    a_row: Optional[Tensor],
    w: Tensor,
    bias: Optional[Tensor],
    seed: Optional[Tensor],
    active: Optional[Tensor],
    out: Optional[Tensor],
    placed: Optional[Tensor],
    slot: Optional[Tensor],
    gate: Optional[Tensor],
    scale: Optional[Tensor],
    end: Tensor,
    kept_share: float,
    relu: bool,
) -> None:
    num_slots = len(a if a_row is None else a_row)
    num_experts, width, depth = w.shape
    block_s = min(BLOCK, max(16, triton.next_power_of_2(triton.cdiv(num_slots, num_experts))))
    # At most so many tiles, for no group but each expert's and that of no expert has a broken one.
    grid = (triton.cdiv(num_slots, block_s) + num_experts, triton.cdiv(width, BLOCK))
    with torch.cuda.device_of(a):
        kernels.product_kernel[grid](
            *(a, a_row, w, _dense(bias), seed, _dense(active)),
            *(out, placed, slot, _dense(gate), _dense(scale), end),
            *(num_slots, num_experts, width, depth),
            *(a.stride(0), a.stride(1), *w.stride()),
            kept_share,
            RELU=relu,
            PRECISION=_precision(a.dtype),
            GROUPS=triton.next_power_of_2(num_experts + 1),
            BLOCK_S=block_s,
            BLOCK_O=BLOCK,
            BLOCK_I=_depth_of_block(a.dtype),
            num_warps=8 if block_s == BLOCK else 4,
        )


def _weight_gradient_like(
    grad: Tensor, a: Tensor, a_row: Any, end: Tensor
) -> Tuple[Tensor, Tensor]:
    shape = (len(end), grad.shape[1])
    return grad.new_empty(*shape, a.shape[1]), grad.new_empty(shape)


@operator(_weight_gradient_like)
def weight_gradient(
    grad: Tensor, a: Tensor, a_row: Optional[Tensor], end: Tensor
) -> Tuple[Tensor, Tensor]:
    """(N, O, I), (N, O): grad^T a over the slots of each expert, and the sum of its grad.

    Args:
        grad: (S, O), sorted by expert.
        a: (S, I), or (., I) with the row of each slot in ``a_row`` (S,).
        end: (N,) int32, one past the last slot of each expert.
    """
    d_w, d_b = _weight_gradient_like(grad, a, a_row, end)
    num_experts, width, depth = d_w.shape
    tiles = triton.cdiv(width, BLOCK) * triton.cdiv(depth, BLOCK)
    with torch.cuda.device_of(a):
        kernels.weight_gradient_kernel[(tiles, num_experts)](
            *(grad.contiguous(), a, a_row, d_w, d_b, end),
            *(width, depth, a.stride(0), a.stride(1)),
            PRECISION=_precision(a.dtype),
            BLOCK_S=_depth_of_block(a.dtype),
            BLOCK_O=BLOCK,
            BLOCK_I=BLOCK,
            num_warps=8,
        )
    return d_w, d_b


def _weigh_backward_like(
    grad: Tensor, out: Tensor, slot: Any, gate: Tensor, scale: Optional[Tensor], end: Any
) -> Tuple[Tensor, Tensor, Tensor]:
    d_scale = gate.new_empty(0) if scale is None else torch.empty_like(scale)
    return torch.empty_like(out), gate.new_empty(gate.shape), d_scale


@operator(_weigh_backward_like)
def weigh_backward(
    grad: Tensor, out: Tensor, slot: Tensor, gate: Tensor, scale: Optional[Tensor], end: Tensor
) -> Tuple[Tensor, Tensor, Tensor]:
    """(S, D), the shape of gate, (D,): the gradients of out, gate and scale in gate * scale * out.

    Args:
        grad: (T, D), of the sum over each token's slots.
        out: (S, D), sorted by expert.
        slot: (S,) int64, where each row comes from.
        gate: (T, K).
        scale: (D,); without it the third result has no cell.
        end: (N,) int32, one past the last slot of each expert.
    """
    d_out, d_gate, d_scale = _weigh_backward_like(grad, out, slot, gate, scale, end)
    (num_slots, width), block_s = out.shape, 16
    programs = triton.cdiv(num_slots, block_s)
    parts = None if scale is None else gate.new_empty(programs, width, dtype=torch.float32)
    with torch.cuda.device_of(out):
        kernels.weigh_backward_kernel[(programs,)](
            *(grad, out, slot, _dense(gate), _dense(scale), end, d_out, d_gate, parts),
            *(num_slots, len(end), gate.shape[1], width, grad.stride(0), grad.stride(1)),
            BLOCK_S=block_s,
            BLOCK_D=min(256, triton.next_power_of_2(width)),
        )
    if parts is not None:
        d_scale.copy_(parts.sum(0))
    return d_out, d_gate, d_scale
