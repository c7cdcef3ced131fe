"""What a router learns without a gradient: balance bias and the experts' mean outputs.

Both collect sums while batches are routed and change only between updates, when
:meth:`Router.end_update` is called, so that all batches and workers of one update see the same.
"""

import math
from typing import Any, Callable, List, Optional

import torch
from torch import Tensor, nn


def count_slots(expert_index: Tensor, num_experts: int, dtype: torch.dtype = torch.int64) -> Tensor:
    """(1 + N,): how often -1 and each expert occur in ``expert_index``."""
    # Scattered rather than counted by bincount, which has no deterministic CUDA form and waits
    # for the device.
    slots = expert_index.reshape(-1) + 1
    counts = torch.zeros(num_experts + 1, dtype=dtype, device=slots.device)
    return counts.scatter_add(0, slots, counts.new_ones(slots.shape))


def count_tokens(expert_index: Tensor, num_experts: int) -> Tensor:
    """(N,) float32: how often each expert occurs in ``expert_index``, -1 not counted."""
    return count_slots(expert_index, num_experts, torch.float32)[1:]


AllReduce = Callable[[Tensor], Any]
"""Sums a tensor over the workers, in place."""


class _Adaptation(nn.Module):
    """Sums that are kept until the end of an update."""

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> nn.Module:
        """Move to another device, but stay float32."""
        before = dict(self._buffers)
        super()._apply(fn, *args, **kwargs)
        for name, old in before.items():
            self._buffers[name] = _uncast(old, self._buffers[name])
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        """The same where a wrapper (fairscale's, for fully_sharded) sets buffers that it cast."""
        if isinstance(value, Tensor) and name in self.__dict__.get("_buffers", ()):
            value = _uncast(self._buffers[name], value)
        super().__setattr__(name, value)

    def stay_float32(self) -> None:
        """Undo a cast of a buffer's ``data``; half precision cannot count to 3,000."""
        for name, value in self._buffers.items():
            if value is not None and value.dtype != torch.float32:
                self._buffers[name] = value.float()

    def sums(self) -> List[Tensor]:
        """What is collected, (N, ...) each."""
        raise NotImplementedError

    @torch.no_grad()
    def end_update(self, all_reduce: Optional[AllReduce] = None) -> None:
        """Adapt to what was collected over all workers, and start again from zero.

        An expert with an output that was not finite counts as one without tokens.
        """
        self.stay_float32()
        if all_reduce is not None:
            for value in self.sums():
                all_reduce(value)
        finite_N = torch.stack([v.flatten(1).isfinite().all(-1) for v in self._rows()]).all(0)
        for value in self._rows():
            value.masked_fill_(~finite_N.view(-1, *[1] * (value.dim() - 1)), 0.0)
        self.adapt()
        self.drop_update()

    @torch.no_grad()
    def drop_update(self) -> None:
        """Start again from zero, without adapting."""
        for value in self.sums():
            value.zero_()

    def _rows(self) -> List[Tensor]:
        """The sums, two-dimensional at least."""
        return [value if value.dim() > 1 else value.unsqueeze(-1) for value in self.sums()]

    def adapt(self) -> None:
        """Use the sums."""
        raise NotImplementedError


def _uncast(old: Optional[Tensor], new: Optional[Tensor]) -> Optional[Tensor]:
    """``new`` in float32; where it is ``old`` moved and rounded, ``old`` moved."""
    if old is None or new is None or new.dtype == torch.float32:
        return new
    if not (old.is_meta or new.is_meta) and torch.equal(old.to(new.device, new.dtype), new):
        return old.to(new.device)
    return new.float()


class BalanceBias(_Adaptation):
    """Auxiliary-loss-free balancing (Wang et al. 2024, arXiv 2408.15664).

    Experts are chosen by z + b. After an update b_i grows by ``rate`` where expert i got less than
    the mean load and shrinks by it where it got more.

    Args:
        num_experts: N.
        rate: step of b (the source uses 0.001).
    """

    bias: Tensor
    """(N,) b."""
    token_count: Tensor
    """(N,) tokens sent to each expert since the last :meth:`end_update`."""

    def __init__(self, num_experts: int, rate: float) -> None:
        super().__init__()
        self.rate = rate
        self.register_buffer("token_count", _zeros(num_experts))
        self.register_buffer("bias", _zeros(num_experts))

    @torch.no_grad()
    def observe(self, chosen: Tensor) -> None:
        """Count the experts in ``chosen``, any shape, int64; -1 is none."""
        self.stay_float32()
        self.token_count.add_(count_tokens(chosen, len(self.bias)))

    def sums(self) -> List[Tensor]:
        """Token counts."""
        return [self.token_count]

    def adapt(self) -> None:
        """Move b by one step."""
        self.bias += self.rate * (self.token_count.mean() - self.token_count).sign()


class ExpertMeans(_Adaptation):
    """Predicts an expert's output by its running mean over the tokens that it got.

    A plain mean over updates at first, an exponential one as soon as that forgets less.

    Args:
        num_experts: N.
        embed_dim: D.
        decay: weight of the old mean in each update, 0 to below 1.

    Raises:
        ValueError: for a decay out of range.
    """

    mean: Tensor
    """(N, D); 0 for an expert that has had no token."""
    token_count: Tensor
    """(N,) tokens sent to each expert since the last :meth:`end_update`."""
    output_sum: Tensor
    """(N, D) sum of the outputs of each expert since the last :meth:`end_update`."""
    updates: Tensor
    """(N,) in how many updates each expert had tokens."""

    def __init__(self, num_experts: int, embed_dim: int, decay: float) -> None:
        super().__init__()
        self.decay = _checked(decay)
        self.register_buffer("token_count", _zeros(num_experts))
        self.register_buffer("mean", _zeros(num_experts, embed_dim))
        self.register_buffer("output_sum", _zeros(num_experts, embed_dim))
        self.register_buffer("updates", _zeros(num_experts))

    @torch.no_grad()
    def observe(self, x_SD: Tensor, expert_S: Tensor, out_SD: Tensor) -> None:
        """Add rows to the sums: inputs, their experts (-1 for none), and these experts' outputs."""
        self.stay_float32()
        self.token_count.add_(count_tokens(expert_S, len(self.mean)))
        out_SD = out_SD.float()
        sums = out_SD.new_zeros(len(self.mean) + 1, out_SD.shape[1])
        self.output_sum.add_(sums.index_add_(0, expert_S + 1, out_SD)[1:])

    def sums(self) -> List[Tensor]:
        """Token counts and output sums."""
        return [self.token_count, self.output_sum]

    def adapt(self) -> None:
        """Move the means of the experts that had tokens."""
        used_N = self.token_count > 0
        self.updates += used_N
        step_N = (1 / self.updates.clamp_min(1)).clamp_min(1 - self.decay) * used_N
        batch_mean_ND = self.output_sum / self.token_count.clamp_min(1).unsqueeze(-1)
        self.mean += step_N.unsqueeze(-1) * (batch_mean_ND - self.mean)

    def add(self, y_TD: Tensor, gate_TN: Tensor, x_TD: Tensor) -> Tensor:
        """(T, D): y + sum_i gate_i m_i."""
        with torch.autocast(device_type=y_TD.device.type, enabled=False):
            return y_TD + (gate_TN @ self.mean).to(y_TD.dtype)

    def scale_outputs(self, factor: float) -> None:
        """Follow experts whose outputs are multiplied by a factor."""
        self.mean.mul_(factor)

    def predict(self, x_TD: Tensor) -> Tensor:
        """(T, N, D): m_i for each token."""
        return self.mean.expand(len(x_TD), -1, -1)


class ExpertLines(_Adaptation):
    """Predicts an expert's output by a ridge regression on its input, m_i(x) = A_i [x, 1].

    Fitted to the tokens that the expert got, older ones counting less, and solved anew every
    ``SOLVE_EVERY`` updates. Waits for the device in each training batch, so a layer that uses it
    cannot be captured in a CUDA graph.

    Args:
        num_experts: N.
        embed_dim: D.
        decay: factor on an expert's older tokens at each update with new ones, 0 to below 1.

    Raises:
        ValueError: for a decay out of range.
    """

    SOLVE_EVERY = 10
    RIDGE = 0.01
    """Relative to the mean of the diagonal of X'X."""

    weight: Tensor
    """(N, D + 1, D) A_i transposed; 0 before the first solution."""
    gram: Tensor
    """(N, D + 1, D + 1) X'X of each expert's inputs with a 1 appended, decayed."""
    cross: Tensor
    """(N, D + 1, D) X'Y with the outputs, decayed."""
    gram_sum: Tensor
    """X'X since the last :meth:`end_update`."""
    cross_sum: Tensor
    """X'Y since the last :meth:`end_update`."""
    updates: Tensor
    """() number of updates."""

    def __init__(self, num_experts: int, embed_dim: int, decay: float) -> None:
        super().__init__()
        self.decay = _checked(decay)
        columns = embed_dim + 1
        for name in ("weight", "cross", "cross_sum"):
            self.register_buffer(name, _zeros(num_experts, columns, embed_dim))
        for name in ("gram", "gram_sum"):
            self.register_buffer(name, _zeros(num_experts, columns, columns))
        self.register_buffer("updates", _zeros())

    @torch.no_grad()
    def observe(self, x_SD: Tensor, expert_S: Tensor, out_SD: Tensor) -> None:
        """Add rows to the sums: inputs, their experts (-1 for none), and these experts' outputs."""
        self.stay_float32()
        x_SD, out_SD = _with_one(x_SD.float()), out_SD.float()
        for i in expert_S.unique().tolist():
            if i < 0:
                continue
            own = expert_S == i
            x_i = x_SD[own]
            self.gram_sum[i].addmm_(x_i.t(), x_i)
            self.cross_sum[i].addmm_(x_i.t(), out_SD[own])

    def sums(self) -> List[Tensor]:
        """X'X and X'Y."""
        return [self.gram_sum, self.cross_sum]

    def adapt(self) -> None:
        """Take the sums in, and solve if it is time."""
        # Of an expert without tokens nothing fades, down to where it can be no more solved.
        used_N = self.gram_sum[:, -1, -1] > 0
        decay_N11 = torch.where(used_N, self.decay, 1.0)[:, None, None]
        self.gram.mul_(decay_N11).add_(self.gram_sum)
        self.cross.mul_(decay_N11).add_(self.cross_sum)
        self.updates += 1
        if self.updates % self.SOLVE_EVERY == 0:
            self.solve()

    def solve(self) -> None:
        """Fit the lines to the sums."""
        diagonal_N = self.gram.diagonal(dim1=-2, dim2=-1).mean(-1)
        # An expert without a token so far keeps 0: cross is 0 and the matrix the identity.
        ridge_N = torch.where(diagonal_N > 0, self.RIDGE * diagonal_N, torch.ones_like(diagonal_N))
        identity = torch.eye(self.gram.shape[-1], device=self.gram.device, dtype=self.gram.dtype)
        self.weight.copy_(
            torch.linalg.solve(self.gram + ridge_N[:, None, None] * identity, self.cross)
        )

    def scale_outputs(self, factor: float) -> None:
        """Follow experts whose outputs are multiplied by a factor."""
        self.weight.mul_(factor)
        self.cross.mul_(factor)

    def predict(self, x_TD: Tensor) -> Tensor:
        """(T, N, D): m_i(x) for each token."""
        return torch.einsum("td,nde->tne", _with_one(x_TD.float()), self.weight)

    def add(self, y_TD: Tensor, gate_TN: Tensor, x_TD: Tensor) -> Tensor:
        """(T, D): y with the gradient of y + sum_i gate_i m_i(x) to the gate, which is 0."""
        return _AddLines.apply(y_TD, gate_TN, x_TD, self.weight)


class _AddLines(torch.autograd.Function):
    """The identity on y; the gradient u . m_i(x) for gate i, one expert's prediction at a time."""

    @staticmethod
    def forward(ctx: Any, y_TD: Tensor, gate_TN: Tensor, x_TD: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x_TD, weight)
        return y_TD.view_as(y_TD)

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> Any:  # type: ignore[override]
        x_TD, weight = ctx.saved_tensors
        x_TD, grad = _with_one(x_TD.float()), grad_TD.float()
        slopes = [((x_TD @ a) * grad).sum(-1) for a in weight.unbind()]
        return grad_TD, torch.stack(slopes, dim=-1), None, None


def _zeros(*size: int) -> Tensor:
    return torch.zeros(size, dtype=torch.float32)


def _with_one(x_SD: Tensor) -> Tensor:
    """(S, D + 1): a column of ones appended."""
    return torch.cat([x_SD, x_SD.new_ones(len(x_SD), 1)], dim=-1)


def _checked(decay: float) -> float:
    if not (0 <= decay < 1 and math.isfinite(decay)):
        raise ValueError(f"mean_decay must be at least 0 and below 1, not {decay}")
    return decay
