"""Which worker holds which experts, and what workers hand to each other.

Shape suffixes: see :mod:`fairseq_sparsemixer.moe`; here R are the rows that a worker computes for
all workers of its group.
"""

from typing import Any, Iterable, List, Optional, Tuple

import torch
import torch.distributed as dist
from torch import Tensor, nn


class ExpertParallel:
    """Experts that are spread over groups of workers.

    Each ``size`` consecutive ranks are a group, in which the worker of place j holds the experts
    j N / size up to (j + 1) N / size of every layer. Workers of one place in different groups hold
    the same experts, whose gradients they sum up. All workers build it, in the same order, since it
    opens groups of processes; a copy of a model shares it.

    Args:
        size: workers of a group.

    Raises:
        ValueError: the number of workers is no multiple of it.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.workers = dist.get_world_size()
        if self.workers % size:
            raise ValueError(f"{self.workers} workers cannot be cut into groups of {size}")
        self.place = dist.get_rank() % size
        """In its group."""
        ranks = list(range(self.workers))
        consecutive = [ranks[first : first + size] for first in ranks[::size]]
        alike = [ranks[place::size] for place in range(size)]
        self.group, _ = dist.new_subgroups_by_enumeration(consecutive)
        self.replicas, _ = dist.new_subgroups_by_enumeration(alike)
        self.bytes_sent = 0
        """To other workers of the group by the exchanges of tokens and of their counts, forward
        and backward."""

    def __deepcopy__(self, memo: Any) -> "ExpertParallel":
        return self

    # Experts

    def own(self, whole: Tensor) -> Tensor:
        """(N / size, ...): this worker's part of (N, ...), a view."""
        return whole.chunk(self.size)[self.place]

    @torch.no_grad()
    def gather(self, own: Tensor) -> Optional[Tensor]:
        """(N, ...) on the CPU of the first worker, None on all others, of (N / size, ...) each.

        Called by all workers. Experts come one by one, so that no more than one is held twice.
        """
        rank = dist.get_rank()
        if dist.get_backend() == "gloo":
            own = own.cpu()  # which sends nothing from a GPU to one worker
        if rank == 0:
            whole = torch.empty(self.size * len(own), *own.shape[1:], dtype=own.dtype)
            whole[: len(own)] = own
            arriving = torch.empty_like(own[0])
            for i in range(len(own), len(whole)):
                dist.recv(arriving, src=i // len(own))
                whole[i] = arriving
            return whole
        for expert in own if rank < self.size else ():
            dist.send(expert.contiguous(), dst=0)
        return None

    # Gradients

    @torch.no_grad()
    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Give experts the gradient that data-parallel training gives all others.

        That is the sum over all workers' batches divided by their number. A worker's gradient is
        the sum over its group, whose tokens it was sent.
        """
        for parameter in parameters:
            if not parameter.requires_grad:
                continue
            if parameter.grad is None:  # no token, or the layer was left out: not in each group
                parameter.grad = torch.zeros_like(parameter)
            parameter.grad.div_(self.workers)
            if self.workers > self.size:
                dist.all_reduce(parameter.grad, group=self.replicas)

    @torch.no_grad()
    def joined_norm(self, norm: Tensor, gradients: Iterable[Optional[Tensor]]) -> Tensor:
        """The norm of all gradients, each expert counted once; the same on all workers.

        Called by all workers.

        Args:
            norm: () of the parameters that are not spread.
            gradients: of this worker's experts, after :meth:`average_gradients`.
        """
        squares = torch.zeros((), dtype=torch.float64, device=norm.device)
        for gradient in gradients:
            if gradient is not None:
                squares += gradient.norm(dtype=torch.float32).double().square()
        dist.all_reduce(squares)
        replicas = self.workers // self.size
        return (norm.double().square() + squares / replicas).sqrt().to(norm.dtype)

    # Tokens

    def exchange_counts(self, counts_N: Tensor) -> Tuple[List[int], List[int], Tensor]:
        """Tell the workers of the group how many rows each of their experts gets.

        Args:
            counts_N: (N,) int64, rows of this worker by expert.

        Returns:
            How many rows this worker sends to each of the group, how many it receives from each,
            and (size, N / size) int64, how many those are by worker and expert. Waits for the
            device, once.
        """
        arriving_N = torch.empty_like(counts_N)
        dist.all_to_all_single(arriving_N, counts_N, group=self.group)
        away = len(counts_N) // self.size * (self.size - 1)
        self.bytes_sent += away * counts_N.element_size()
        by_worker = torch.stack([counts_N, arriving_N]).view(2, self.size, -1)
        sent, received = by_worker.sum(-1).tolist()
        return sent, received, by_worker[1]

    def exchange(self, rows_SD: Tensor, sent: List[int], received: List[int]) -> Tensor:
        """(R, D), with gradient: rows that lie in the order of the workers that they go to.

        Args:
            rows_SD: of this worker.
            sent: how many of them go to each worker of the group.
            received: how many come from each.
        """
        return _Exchange.apply(rows_SD, self, sent, received)

    def agree(self, choice: Tensor) -> Tensor:
        """The ``choice`` of the first worker of the group, in place."""
        dist.broadcast(choice, dist.get_rank() - self.place, group=self.group)
        return choice


class _Exchange(torch.autograd.Function):
    """Rows to other workers; in the backward pass their gradients back."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, rows_SD: Tensor, parallel: ExpertParallel, sent: List[int], received: List[int]
    ) -> Tensor:
        ctx.parallel, ctx.sent, ctx.received = parallel, sent, received
        rows_RD = rows_SD.new_empty(sum(received), *rows_SD.shape[1:])
        dist.all_to_all_single(rows_RD, rows_SD.contiguous(), received, sent, group=parallel.group)
        away = sum(sent) - sent[parallel.place]
        parallel.bytes_sent += away * rows_SD[:1].numel() * rows_SD.element_size()
        return rows_RD

    @staticmethod
    def backward(ctx: Any, grad_RD: Tensor) -> Any:  # type: ignore[override]
        grad_SD = _Exchange.apply(grad_RD, ctx.parallel, ctx.received, ctx.sent)
        return grad_SD, None, None, None


def is_spread(parameter: Any) -> bool:
    """Whether a parameter is this worker's part of experts that are spread over several."""
    return hasattr(parameter, "expert")  # by which fairseq knows what is not shared
