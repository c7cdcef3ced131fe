"""Sort the slots by expert once, then one pair of matrix products for each expert.

The products are those of the dense layer on fewer rows each, so that what can be lost is lost
around them. The whole mixture is one autograd function: gate and omega and their gradients are
applied to an expert's rows while these are in the cache, nothing is copied for autograd's sake, and
the gradients of the weights are computed where they stay. The function waits for the device once
in a layer, which costs nothing on a CPU and much on a GPU.
"""

import dataclasses
import itertools
from typing import Any, List, Optional, Tuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from fairseq_sparsemixer.moe.backends import Observer
from fairseq_sparsemixer.moe.backends.memory import fresh_like
from fairseq_sparsemixer.moe.experts import Experts
from fairseq_sparsemixer.moe.routing import Routing


def sorted_experts(
    x_TD: Tensor,
    routing: Routing,
    experts: Experts,
    scale_D: Optional[Tensor],
    observe: Optional[Observer],
) -> Tensor:
    """(T, D); see :func:`fairseq_sparsemixer.moe.dispatch.dispatch`."""
    order = _Order.of(routing, experts.num_experts)
    values = [x_TD, experts.w1, experts.b1, experts.w2, experts.b2]
    if torch.is_autocast_enabled(x_TD.device.type):
        dtype = torch.get_autocast_dtype(x_TD.device.type)
        values = [value.to(dtype) for value in values]
    gate_S = routing.gate.reshape(-1)
    inputs = [value for value in (gate_S, scale_D, *values) if value is not None]
    if torch.is_grad_enabled() and any(value.requires_grad for value in inputs):
        return _Mixture.apply(order, experts, observe, gate_S, scale_D, *values)
    return _forward(order, experts, observe, None, gate_S, scale_D, *values)


@dataclasses.dataclass
class _Order:
    """Which slots, and so which tokens, belong to which expert."""

    used: List[Tuple[int, slice]]
    """The experts that have slots, and their part of the sorted slots."""
    slot_S: Optional[Tensor]
    """(S,) the slots sorted by expert; None where they are sorted as they come."""
    token_S: Optional[Tensor]
    """(S,) the tokens of these; None likewise."""
    top_k: int
    writes_all: bool
    """Whether each token has exactly one slot, so that each row of the output is written once."""

    @classmethod
    def of(cls, routing: Routing, num_experts: int) -> "_Order":
        """Sort the slots of one layer."""
        num_tokens, top_k = routing.expert_index.shape
        expert_S = routing.expert_index.reshape(-1)
        # Padding and empty slots have index -1: they sort to the front and are cut off there.
        empty, *counts = torch.bincount(expert_S + 1, minlength=num_experts + 1).tolist()
        used, start = [], 0
        for expert, count in enumerate(counts):
            if count:
                used.append((expert, slice(start, start + count)))
                start += count
        writes_all = top_k == 1 and not empty
        if writes_all and len(used) == 1:  # one token, or all of one mind
            return cls(used, None, None, top_k, writes_all)
        slot_S = expert_S.argsort(stable=True)[empty:]
        token_S = slot_S if top_k == 1 else slot_S.div(top_k, rounding_mode="floor")
        return cls(used, slot_S, token_S, top_k, writes_all)

    def tokens(self, value_TX: Tensor) -> Tensor:
        """(S, ...): the rows of the slots' tokens."""
        return value_TX if self.token_S is None else value_TX.index_select(0, self.token_S)

    def slots(self, value_S: Tensor) -> Tensor:
        """(S,): the values of the sorted slots."""
        return value_S if self.slot_S is None else value_S.index_select(0, self.slot_S)

    def put_slots(self, value_S: Tensor, rows: slice, part_S: Tensor) -> None:
        """Write the values of some sorted slots back to where they came from."""
        value_S[rows if self.slot_S is None else self.slot_S[rows]] = part_S.to(value_S.dtype)

    def output_like(self, x_TD: Tensor) -> Tensor:
        """(T, D) to :meth:`put` rows in; sums of several experts are formed in float32."""
        if self.writes_all:
            return torch.empty_like(x_TD)
        dtype = x_TD.dtype if self.top_k == 1 else torch.float32
        return torch.zeros_like(x_TD, dtype=dtype)

    def put(self, y_TD: Tensor, rows: slice, value_SD: Tensor) -> None:
        """Write or add the values of some sorted slots to the rows of their tokens."""
        value_SD = value_SD.to(y_TD.dtype)
        if self.token_S is None:
            y_TD.copy_(value_SD)
        elif self.top_k == 1:
            y_TD.index_copy_(0, self.token_S[rows], value_SD)
        else:
            y_TD.index_add_(0, self.token_S[rows], value_SD)


ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _linear(x: Tensor, w: Tensor, b: Optional[Tensor], relu: bool = False) -> Tensor:
    """x w^T + b, and ReLU if asked for; outside of autograd."""
    if ONEDNN and x.dtype == torch.float32 and x.device.type == "cpu":
        # oneDNN, which torch's compiler uses here, is up to 1.6 times as fast as the BLAS behind
        # F.linear on a few hundred rows, and on many no slower.
        name = "relu" if relu else "none"
        return torch.ops.mkldnn._linear_pointwise(x, w, b, name, [], "")
    y = F.linear(x, w, b)
    return y.relu_() if relu else y


class _Inner:
    """The experts' inner layer, a(w1 x + b1) with dropout.

    Args:
        experts: read for their activation and dropout.
    """

    def __init__(self, experts: Experts) -> None:
        self.activation_fn = experts.activation_fn
        self.relu = experts.activation_fn in (F.relu, torch.relu)
        self.kept_share = 1 - experts.activation_dropout * experts.training

    def linear(self, x: Tensor, w1: Tensor, b1: Tensor) -> Tensor:
        """(S_i, F): before the activation, or after it where that is ReLU."""
        return _linear(x, w1, b1, relu=self.relu)

    def mask(self, inner: Tensor) -> Optional[Tensor]:
        """(S_i, F) bool: the units that dropout leaves; None where it leaves all."""
        if self.kept_share == 1:
            return None
        return torch.empty_like(inner, dtype=torch.bool).bernoulli_(self.kept_share)

    def activate(self, inner: Tensor, mask: Optional[Tensor]) -> Tensor:
        """(S_i, F): what goes into the second product."""
        after = inner if self.relu else self.activation_fn(inner)
        return after if mask is None else self._drop(after, mask)

    def activate_with_gradient(self, inner: Tensor, mask: Optional[Tensor]) -> Tuple[Tensor, Any]:
        """What :meth:`activate` gives, and a function from its gradient to that of ``inner``."""
        if self.relu:

            def backward(grad: Tensor) -> Tensor:
                grad = grad if mask is None else self._drop(grad, mask)
                return torch.ops.aten.threshold_backward.grad_input(
                    grad, inner, 0, grad_input=grad
                )

            return self.activate(inner, mask), backward
        with torch.enable_grad():
            leaf = inner.detach().requires_grad_()
            after = self.activate(leaf, mask)
        return after.detach(), lambda grad: torch.autograd.grad(after, leaf, grad)[0]

    def _drop(self, value: Tensor, mask: Tensor) -> Tensor:
        return value * mask / (self.kept_share or 1)


def _forward(
    order: _Order,
    experts: Experts,
    observe: Optional[Observer],
    kept: Optional[List[Optional[Tensor]]],
    gate_S: Tensor,
    scale_D: Optional[Tensor],
    x_TD: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
) -> Tensor:
    """(T, D) outputs.

    ``kept`` is given what the backward pass needs: each used expert's inner layer (None where it
    is to be computed again), dropout mask (None without dropout) and output.
    """
    inner = _Inner(experts)
    x_SD, gate_S1 = order.tokens(x_TD), order.slots(gate_S).unsqueeze(-1)
    y_TD = order.output_like(x_TD)
    for i, rows in order.used:
        x_i = x_SD[rows]
        inner_i = inner.linear(x_i, w1[i], b1[i])
        mask_i = inner.mask(inner_i)
        out_i = _linear(inner.activate(inner_i, mask_i), w2[i], b2[i])
        if observe is not None:
            observe(x_i, torch.full((len(x_i),), i, device=x_i.device), out_i)
        if kept is not None:
            kept += [None if experts.recompute else inner_i, mask_i, out_i]
        y_i = out_i * gate_S1[rows]
        order.put(y_TD, rows, y_i if scale_D is None else y_i * scale_D)
    return y_TD


class _Mixture(torch.autograd.Function):
    """:func:`_forward` and its gradient."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, order: _Order, experts: Experts, observe: Optional[Observer], *inputs: Any
    ) -> Tensor:
        kept: List[Optional[Tensor]] = []
        y_TD = _forward(order, experts, observe, kept, *inputs)
        ctx.order, ctx.inner = order, _Inner(experts)
        ctx.save_for_backward(*inputs, *kept)
        return y_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> Any:  # type: ignore[override]
        order, inner, saved = ctx.order, ctx.inner, ctx.saved_tensors
        (gate_S, scale_D, x_TD, *weights), kept = saved[:7], saved[7:]
        wants_gate, wants_scale, wants_x, *wants_weights = ctx.needs_input_grad[3:]
        w1, b1, w2, _ = weights
        wide = torch.promote_types(x_TD.dtype, torch.float32)
        d_gate_S = torch.zeros_like(gate_S) if wants_gate else None
        d_scale_D = torch.zeros_like(scale_D, dtype=wide) if wants_scale else None
        d_x_TD = order.output_like(x_TD) if wants_x else None
        d_weights = [fresh_like(value) for value in weights] if any(wants_weights) else None
        x_SD, gate_S1 = order.tokens(x_TD), order.slots(gate_S).unsqueeze(-1)
        grad_SD = order.tokens(grad_TD)
        for n, (i, rows) in enumerate(order.used):
            inner_i, mask_i, out_i = kept[3 * n : 3 * n + 3]
            x_i, gate_i, grad_i = x_SD[rows], gate_S1[rows], grad_SD[rows].to(wide)
            if wants_gate or wants_scale:
                dot_i = grad_i * out_i
                if d_scale_D is not None:
                    d_scale_D += (dot_i * gate_i).sum(0)
                if d_gate_S is not None:
                    d_gate_i = (dot_i if scale_D is None else dot_i * scale_D).sum(-1)
                    order.put_slots(d_gate_S, rows, d_gate_i)
            d_out_i = grad_i * gate_i
            d_out_i = (d_out_i if scale_D is None else d_out_i * scale_D).to(x_i.dtype)
            if inner_i is None:
                inner_i = inner.linear(x_i, w1[i], b1[i])
            after_i, to_inner = inner.activate_with_gradient(inner_i, mask_i)
            d_inner_i = to_inner(_linear(d_out_i, w2[i].t(), None))
            if d_weights is not None:
                d_w1, d_b1, d_w2, d_b2 = (value[i] for value in d_weights)
                torch.mm(d_out_i.t(), after_i, out=d_w2)
                torch.sum(d_out_i, 0, out=d_b2)
                torch.mm(d_inner_i.t(), x_i, out=d_w1)
                torch.sum(d_inner_i, 0, out=d_b1)
            if d_x_TD is not None:
                order.put(d_x_TD, rows, _linear(d_inner_i, w1[i].t(), None))
        if d_weights is not None:
            unused = set(range(len(w1))).difference(i for i, _ in order.used)
            for value, i in itertools.product(d_weights, unused):
                value[i].zero_()
        return (
            *(None, None, None, d_gate_S),
            None if d_scale_D is None else d_scale_D.to(scale_D.dtype),
            None if d_x_TD is None else d_x_TD.to(x_TD.dtype),
            *(d_weights or [None] * 4),
        )
