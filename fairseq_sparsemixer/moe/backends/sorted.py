"""Sort the slots by expert once, then one pair of matrix products for each expert.

The products are those of the dense layer on fewer rows each, so that what can be lost is lost
around them. The whole mixture is one autograd function: gate and omega and their gradients are
applied to an expert's rows while these are in the cache, nothing is copied for autograd's sake, and
the gradients of the weights are computed where they stay. The function waits for the device once
in a layer, which costs nothing on a CPU and much on a GPU.
"""

import dataclasses
import itertools
from typing import Any, Iterable, Iterator, List, Optional, Sequence, Tuple

import torch
from torch import Tensor

from fairseq_sparsemixer.moe.adaptation import count_slots
from fairseq_sparsemixer.moe.backends.memory import GRADIENTS
from fairseq_sparsemixer.moe.backends.products import linear, rows_to_compute
from fairseq_sparsemixer.moe.experts import Experts
from fairseq_sparsemixer.moe.kernels.operators import once_differentiable
from fairseq_sparsemixer.moe.routing import Routing, without_autocast
from fairseq_sparsemixer.moe.slots import Observer, operands, tokens_of


def sorted_experts(
    x_TD: Tensor,
    routing: Routing,
    experts: Experts,
    scale_D: Optional[Tensor],
    observe: Optional[Observer],
) -> Tensor:
    """(T, D); see :func:`fairseq_sparsemixer.moe.dispatch.dispatch`."""
    index_TK, gate_TK = routing.expert_index, routing.gate
    inputs: List[Any] = [gate_TK.reshape(-1, 1), scale_D, *operands(x_TD, experts)]
    if torch.is_grad_enabled() and any(v is not None and v.requires_grad for v in inputs):
        order = _Order.of(index_TK, experts.num_experts, x_TD.dtype)
        return _Mixture.apply(order, experts, observe, *inputs)
    packed = experts.packed
    if packed is not None and not packed.fits(experts):
        packed = experts.packed = None
    if packed is not None:
        inputs[2:] = [x_TD.to(packed.input_dtype), packed.w1, packed.b1, packed.w2, packed.b2]
    if index_TK.numel() == 1 and observe is None and (expert := index_TK.item()) >= 0:
        return _one_slot(int(expert), experts, *inputs)
    order = _Order.of(index_TK, experts.num_experts, x_TD.dtype)
    return _forward(order, experts, observe, None, *inputs)


@dataclasses.dataclass
class _Order:
    """Which slots, and so which tokens, belong to which expert.

    An expert's rows may reach into those of the next one, whose results are then cut off: see
    :func:`~fairseq_sparsemixer.moe.backends.products.rows_to_compute`.
    """

    used: List[int]
    """The experts that have slots."""
    counts: List[int]
    """How many slots each of these has."""
    top_k: int
    dtype: torch.dtype
    """Of the layer's input and output; the products may be in another."""
    writes_all: bool
    """Whether each token has exactly one slot, so that each row of the output is written once."""
    slot_S: Tensor
    """(S,) the slots sorted by expert."""
    token_S: Tensor
    """(S,) the tokens of these."""

    @classmethod
    def of(cls, index_TK: Tensor, num_experts: int, dtype: torch.dtype) -> "_Order":
        """Sort the slots of one layer by their experts."""
        top_k = index_TK.shape[1]
        expert_S = index_TK.reshape(-1)
        # Padding and empty slots have index -1: they sort to the front and are cut off there.
        empty, *all_counts = count_slots(expert_S, num_experts).tolist()
        used = [expert for expert, count in enumerate(all_counts) if count]
        counts = [all_counts[expert] for expert in used]
        slot_S = expert_S.argsort(stable=True)[empty:]
        token_S = tokens_of(slot_S, top_k)
        return cls(used, counts, top_k, dtype, top_k == 1 and not empty, slot_S, token_S)

    def tokens_of_each(self, value_TX: Tensor) -> Sequence[Tensor]:
        """For each used expert (>= S_i, X): the rows of its tokens."""
        return self._of_each(value_TX, self.token_S)

    def slots_of_each(self, value_SX: Tensor) -> Sequence[Tensor]:
        """For each used expert (>= S_i, X): the values of its slots."""
        return self._of_each(value_SX, self.slot_S)

    def _of_each(self, value: Tensor, index_S: Tensor) -> Sequence[Tensor]:
        starts = [0, *itertools.accumulate(self.counts)]
        stops = [start + rows_to_compute(n) for start, n in zip(starts, self.counts)]
        # Behind the last expert's rows comes the first row again, as often as needed.
        behind = max(stops, default=0) - len(index_S)
        if behind > 0:
            index_S = torch.cat([index_S, index_S[:1].expand(behind)])
        sorted_SX = value.index_select(0, index_S)
        return [sorted_SX[start:stop] for start, stop in zip(starts, stops)]

    def tokens_from_each(self, like_TD: Tensor, values: Iterable[Tensor]) -> Tensor:
        """(T, D): for each token the sum of its rows in what each used expert has, (>= S_i, D).

        In the layer's dtype, or float32 where several experts are summed up. The values are taken
        one by one, so that they are still in the cache if an iterator computes them.
        """
        dtype = self.dtype if self.top_k == 1 else torch.promote_types(self.dtype, torch.float32)
        y_TD = (torch.empty_like if self.writes_all else torch.zeros_like)(like_TD, dtype=dtype)
        put = y_TD.index_copy_ if self.top_k == 1 else y_TD.index_add_
        for value, token_i in zip(values, self.token_S.split(self.counts)):
            put(0, token_i, value[: len(token_i)].to(dtype))
        return y_TD

    def slots_from_each(self, like_SX: Tensor, values: Iterable[Tensor]) -> Tensor:
        """(T K, X): undoes :meth:`slots_of_each`, 0 in slots without an expert."""
        y_SX = torch.zeros_like(like_SX)
        for value, slot_i in zip(values, self.slot_S.split(self.counts)):
            y_SX.index_copy_(0, slot_i, value.to(like_SX.dtype))
        return y_SX


class _Inner:
    """The experts' inner layer, a(w1 x + b1) with dropout.

    Args:
        experts: read for their activation and dropout.
    """

    def __init__(self, experts: Experts) -> None:
        self.activation_fn = experts.activation_fn
        self.relu = experts.is_relu
        self.kept_share = experts.kept_share

    def linear(self, x: Tensor, w1: Tensor, b1: Tensor) -> Tensor:
        """(S_i, F): before the activation, or after it where that is ReLU."""
        return linear(x, w1, b1, relu=self.relu)

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
                return torch.ops.aten.threshold_backward.grad_input(grad, inner, 0, grad_input=grad)

            return self.activate(inner, mask), backward
        with torch.enable_grad():
            leaf = inner.detach().requires_grad_()
            after = self.activate(leaf, mask)
        return after.detach(), lambda grad: torch.autograd.grad(after, leaf, grad)[0]

    def _drop(self, value: Tensor, mask: Tensor) -> Tensor:
        return value * mask / (self.kept_share or 1)


def _weighed(value_SD: Tensor, gate_S1: Tensor, scale_D: Optional[Tensor]) -> Tensor:
    value_SD = value_SD * gate_S1
    return value_SD if scale_D is None else value_SD * scale_D


def _forward(
    order: _Order,
    experts: Experts,
    observe: Optional[Observer],
    kept: Optional[List[Optional[Tensor]]],
    gate_S1: Tensor,
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

    def outputs() -> Iterator[Tensor]:
        parts = zip(
            order.used, order.counts, order.tokens_of_each(x_TD), order.slots_of_each(gate_S1)
        )
        for i, n, x_i, gate_i in parts:
            inner_i = inner.linear(x_i, w1[i], b1[i])
            mask_i = inner.mask(inner_i)
            out_i = linear(inner.activate(inner_i, mask_i), w2[i], b2[i])
            if observe is not None:
                observe(x_i[:n], torch.full((n,), i, device=x_i.device), out_i[:n])
            if kept is not None:
                kept.extend([None if experts.recompute else inner_i, mask_i, out_i])
            yield _weighed(out_i, gate_i, scale_D)

    return order.tokens_from_each(x_TD, outputs())


def _one_slot(
    i: int,
    experts: Experts,
    gate_S1: Tensor,
    scale_D: Optional[Tensor],
    x_TD: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
) -> Tensor:
    """(1, D): :func:`_forward` of a single token, in a decoder for one, where each step counts."""
    inner = _Inner(experts)
    inner_i = inner.linear(x_TD, w1[i], b1[i])
    out_i = linear(inner.activate(inner_i, inner.mask(inner_i)), w2[i], b2[i])
    return _weighed(out_i, gate_S1, scale_D)


class _Mixture(torch.autograd.Function):
    """:func:`_forward` and its gradient."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, order: _Order, experts: Experts, observe: Optional[Observer], *inputs: Any
    ) -> Tensor:
        kept: List[Optional[Tensor]] = []
        y_TD = _forward(order, experts, observe, kept, *inputs)
        ctx.order, ctx.inner, ctx.experts = order, _Inner(experts), experts
        ctx.save_for_backward(*inputs, *kept)
        return y_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> Any:  # type: ignore[override]
        with without_autocast(grad_TD.device.type):
            return _backward(ctx, grad_TD)


def _backward(ctx: Any, grad_TD: Tensor) -> Any:
    """The gradients of all arguments of :class:`_Mixture`."""
    order, inner, saved = ctx.order, ctx.inner, ctx.saved_tensors
    (gate_S1, scale_D, x_TD, *weights), kept = saved[:7], saved[7:]
    wants_gate, wants_scale, wants_x, *wants_weights = ctx.needs_input_grad[3:]
    w1, b1, w2, _ = weights
    wide = torch.promote_types(x_TD.dtype, torch.float32)
    d_gates: List[Tensor] = []
    d_scale_D = torch.zeros_like(scale_D, dtype=wide) if wants_scale else None
    GRADIENTS.serve(ctx.experts)
    d_weights = [GRADIENTS.empty_like(value) for value in weights] if any(wants_weights) else None

    def input_gradients() -> Iterator[Tensor]:
        parts = zip(
            order.used,
            order.counts,
            order.tokens_of_each(x_TD),
            order.slots_of_each(gate_S1),
            order.tokens_of_each(grad_TD),
            *(kept[k::3] for k in range(3)),
        )
        for i, n, x_i, gate_i, grad_i, inner_i, mask_i, out_i in parts:
            grad_i = grad_i.to(wide)
            if wants_gate or wants_scale:
                dot_i = (grad_i * out_i)[:n]
                d_gate_i = dot_i if scale_D is None else dot_i * scale_D
                d_gates.append(d_gate_i.sum(-1, keepdim=True))
                if d_scale_D is not None:
                    d_scale_D.add_((dot_i * gate_i[:n]).sum(0))
            d_out_i = _weighed(grad_i, gate_i, scale_D).to(x_i.dtype)
            if inner_i is None:
                inner_i = inner.linear(x_i, w1[i], b1[i])
            after_i, to_inner = inner.activate_with_gradient(inner_i, mask_i)
            d_inner_i = to_inner(linear(d_out_i, w2[i].t()))
            if d_weights is not None:
                d_w1, d_b1, d_w2, d_b2 = (value[i] for value in d_weights)
                torch.mm(d_inner_i[:n].t(), x_i[:n], out=d_w1)
                torch.sum(d_inner_i[:n], 0, out=d_b1)
                torch.mm(d_out_i[:n].t(), after_i[:n], out=d_w2)
                torch.sum(d_out_i[:n], 0, out=d_b2)
            yield linear(d_inner_i, w1[i].t())

    d_x_TD = order.tokens_from_each(x_TD, input_gradients()).to(x_TD.dtype)
    if d_weights is not None:
        for unused in set(range(len(w1))).difference(order.used):
            for value in d_weights:
                value[unused].zero_()
    return (
        *(None, None, None),
        order.slots_from_each(gate_S1, d_gates) if wants_gate else None,
        None if d_scale_D is None else d_scale_D.to(scale_D.dtype),
        d_x_TD if wants_x else None,
        *([None] * 4 if d_weights is None else d_weights),
    )
