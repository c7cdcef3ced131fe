"""The mixture by Triton kernels that weigh and scatter rows on their way through a product.

Nothing waits for the device, so a layer can be captured in a CUDA graph. For ``torch.compile`` the
kernels are operators of PyTorch.
"""

from typing import Any, List, NamedTuple, Optional, Tuple

import torch
from torch import Tensor

from fairseq_sparsemixer.moe.experts import Activation, Experts
from fairseq_sparsemixer.moe.kernels.operators import once_differentiable
from fairseq_sparsemixer.moe.kernels.products import (
    placed_product,
    sorted_product,
    sum_groups,
    tile_rows,
    weigh_backward,
    weight_gradient,
)
from fairseq_sparsemixer.moe.kernels.sorting import sort_slots
from fairseq_sparsemixer.moe.routing import Routing
from fairseq_sparsemixer.moe.slots import Observer, operands, tokens_of


class _Tiles(NamedTuple):
    """All slots, sorted by expert and cut into tiles."""

    slot_S: Tensor
    """(S,) int64: which slot of the batch lies here; slot t K + k is the k-th of token t."""
    end: Tensor
    """(N + 1,) int32: one past the last slot of each expert and of no expert."""
    tile_end: Tensor
    """(N + 1,) int32: one past the last tile of each."""
    tiles: Tensor
    """(tiles, 3) int32: the expert of each tile, its first slot and one past its last."""
    tile: int
    """Rows of a tile."""
    top_k: int

    @classmethod
    def of(cls, routing: Routing, num_experts: int) -> "_Tiles":
        """Sort the slots of one layer."""
        index_TK = routing.expert_index
        tile = tile_rows(index_TK.numel(), num_experts)
        return cls(*sort_slots(index_TK, num_experts, tile), tile, index_TK.shape[1])

    def product(
        self,
        a_SI: Tensor,
        w: Tensor,
        transposed: bool = False,
        bias: Optional[Tensor] = None,
        seed: Optional[Tensor] = None,
        active: Optional[Tensor] = None,
        kept_share: float = 1.0,
        relu: bool = False,
        sums: bool = False,
    ) -> List[Tensor]:
        """See :func:`sorted_product`."""
        tiles = (self.tiles, self.tile)
        return sorted_product(
            a_SI, w, transposed, bias, seed, active, *tiles, kept_share, relu, sums
        )

    def placed(
        self,
        a_SI: Tensor,
        w: Tensor,
        transposed: bool = False,
        bias: Optional[Tensor] = None,
        gate: Optional[Tensor] = None,
        scale: Optional[Tensor] = None,
        keep: bool = False,
    ) -> Tuple[Tensor, Optional[Tensor]]:
        """(T, O) and, if kept, out; see :func:`placed_product`."""
        tiles = (self.tiles, self.tile)
        # Sums of several experts are formed in float32.
        wide = self.top_k > 1
        y_SO, *out = placed_product(
            a_SI, w, transposed, bias, self.slot_S, gate, scale, *tiles, wide, keep
        )
        if wide:
            y_SO = y_SO.unflatten(0, (-1, self.top_k)).sum(1).to(a_SI.dtype)
        return y_SO, out[0] if keep else None


def triton_experts(
    x_TD: Tensor,
    routing: Routing,
    experts: Experts,
    scale_D: Optional[Tensor],
    observe: Optional[Observer],
) -> Tensor:
    """(T, D); see :func:`fairseq_sparsemixer.moe.dispatch.dispatch`."""
    tiles = _Tiles.of(routing, experts.num_experts)
    x_TD, *weights = operands(x_TD, experts)
    inner = _Inner.of(experts, x_TD, tiles.slot_S.shape[0])
    # Read for the gradients of gate and scale, and by the observer.
    keep_out = torch.is_grad_enabled() or observe is not None
    y_TD, x_SD, out_SD = _Mixture.apply(
        inner, experts.recompute, keep_out, tiles, routing.gate, scale_D, x_TD, *weights
    )
    if observe is not None:
        expert_S = routing.expert_index.reshape(-1).index_select(0, tiles.slot_S)
        observe(x_SD, expert_S, out_SD)
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

    def product(self, x_SD: Tensor, w1: Tensor, b1: Tensor, tiles: _Tiles) -> Tensor:
        """(S, F): after activation and dropout for ReLU, before them for others."""
        relu = self.activation_fn is None
        seed = self.noise if relu else None
        return tiles.product(x_SD, w1, bias=b1, seed=seed, kept_share=self.kept_share, relu=relu)[0]

    def activate(self, inner_SF: Tensor) -> Tensor:
        """(S, F): what goes into the second product."""
        if self.activation_fn is None:
            return inner_SF
        after_SF = self.activation_fn(inner_SF)
        return after_SF if self.noise is None else after_SF * self.noise / (self.kept_share or 1)

    def backward(
        self, inner_SF: Tensor, d_out_SD: Tensor, w2: Tensor, tiles: _Tiles
    ) -> Tuple[Tensor, Tensor, Tensor]:
        """(S, F) twice, (N, F): what went into the second product, and the gradients of
        ``inner_SF`` and of the first bias."""
        if self.activation_fn is None:
            d_SF, sums = tiles.product(
                d_out_SD,
                w2,
                transposed=True,
                active=inner_SF,
                kept_share=self.kept_share,
                sums=True,
            )
            return inner_SF, d_SF, sum_groups(sums, tiles.tile_end, d_SF.dtype)
        (d_SF,) = tiles.product(d_out_SD, w2, transposed=True)
        after_SF, to_inner = torch.func.vjp(self.activate, inner_SF)  # type: ignore[misc]
        d_SF = to_inner(d_SF)[0]
        return after_SF, d_SF, sum_groups(d_SF, tiles.end, d_SF.dtype)


class _Mixture(torch.autograd.Function):
    """The mixture (T, D); without gradient, the sorted x and the experts' outputs before the gate.

    Both are (S, D), the second is None unless it is kept.
    """

    @staticmethod
    def forward(
        ctx: Any,
        inner: _Inner,
        recompute: bool,
        keep_out: bool,
        tiles: _Tiles,
        gate_TK: Tensor,
        scale_D: Optional[Tensor],
        x_TD: Tensor,
        w1: Tensor,
        b1: Tensor,
        w2: Tensor,
        b2: Tensor,
    ) -> Tuple[Tensor, Tensor, Optional[Tensor]]:
        # A copy costs less than three products that gather.
        x_SD = x_TD.index_select(0, tokens_of(tiles.slot_S, tiles.top_k))
        inner_SF = inner.product(x_SD, w1, b1, tiles)
        y_TD, out_SD = tiles.placed(
            inner.activate(inner_SF), w2, bias=b2, gate=gate_TK, scale=scale_D, keep=keep_out
        )
        ctx.inner, ctx.tiles = inner, tiles
        kept_SF = None if recompute else inner_SF
        ctx.save_for_backward(kept_SF, out_SD, gate_TK, scale_D, x_SD, w1, b1, w2)
        ctx.mark_non_differentiable(*((x_SD, out_SD) if keep_out else (x_SD,)))
        ctx.set_materialize_grads(False)
        return y_TD, x_SD, out_SD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor, *_: Any) -> Any:  # type: ignore[override]
        inner, tiles = ctx.inner, ctx.tiles
        inner_SF, out_SD, gate_TK, scale_D, x_SD, w1, b1, w2 = ctx.saved_tensors
        d_out_SD, d_gate_TK, *d_scale = weigh_backward(
            grad_TD, out_SD, tiles.slot_S, gate_TK, scale_D, tiles.end
        )
        if inner_SF is None:
            inner_SF = inner.product(x_SD, w1, b1, tiles)
        after_SF, d_inner_SF, d_b1 = inner.backward(inner_SF, d_out_SD, w2, tiles)
        d_x_TD, _ = tiles.placed(d_inner_SF, w1, transposed=True)
        return (
            *(None, None, None, None, d_gate_TK),
            d_scale[0] if d_scale else None,
            d_x_TD,
            weight_gradient(d_inner_SF, x_SD, tiles.end),
            d_b1,
            weight_gradient(d_out_SD, after_SF, tiles.end),
            sum_groups(d_out_SD, tiles.end, d_out_SD.dtype),
        )
