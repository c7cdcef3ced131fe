"""Routing losses, from sums over tokens that may be added up over batches and workers.

Shape suffixes: see :mod:`fairseq_sparsemixer.moe`.
"""

import dataclasses

import torch
from torch import Tensor

from fairseq_sparsemixer.moe.adaptation import count_tokens
from fairseq_sparsemixer.moe.kernels import router as fused_router
from fairseq_sparsemixer.moe.kernels import statistics as fused_statistics
from fairseq_sparsemixer.moe.routing import Routing


@dataclasses.dataclass
class RoutingStatistics:
    """Sums over the non-padding tokens of one or more layers; "..." are the layers.

    Sums rather than means, so that those of two batches or workers simply add up.
    """

    tokens: Tensor
    """(...): number of tokens."""
    squared_logsumexp: Tensor
    """(...): sum of logsumexp(z)^2, with gradient."""
    entropy: Tensor
    """(...): sum of the entropy of p in nats, without gradient."""
    expert_tokens: Tensor
    """(..., N): tokens sent to each expert, without gradient."""
    probs: Tensor
    """(..., N): sum of p, with gradient."""
    sampling_probs: Tensor
    """(..., N): sum of the distribution that the expert is drawn from, with gradient."""
    load: Tensor
    """(..., N): smooth number of tokens of each expert, with gradient."""

    @classmethod
    def from_routing(cls, routing: Routing) -> "RoutingStatistics":
        """The sums of one layer."""
        if fused_router.serves(routing.logits, routing.backend):
            sums = cls.unpack(fused_statistics.pack(routing))
            sums.tokens, sums.entropy = sums.tokens.detach(), sums.entropy.detach()
            sums.expert_tokens = sums.expert_tokens.detach()
            return sums
        if routing.padding_mask is None:
            keep_T1 = torch.ones_like(routing.gate[:, :1])
        else:
            keep_T1 = (~routing.padding_mask).unsqueeze(-1).to(routing.logits.dtype)
        logsumexp_T1 = routing.logits.logsumexp(dim=-1, keepdim=True)
        with torch.no_grad():
            # H(p) = logsumexp(z) - sum_i p_i z_i
            entropy_T1 = logsumexp_T1 - (routing.probs * routing.logits).sum(-1, keepdim=True)
        load_TN = routing.sampling_probs if routing.load is None else routing.load
        return cls(
            tokens=keep_T1.detach().sum(),
            squared_logsumexp=(logsumexp_T1.square() * keep_T1).sum(),
            entropy=(entropy_T1 * keep_T1).sum(),
            expert_tokens=count_tokens(routing.chosen, routing.logits.shape[-1]),
            probs=(routing.probs * keep_T1).sum(0),
            sampling_probs=(routing.sampling_probs * keep_T1).sum(0),
            load=(load_TN * keep_T1).sum(0),
        )

    @classmethod
    def packed(cls, routing: Routing) -> Tensor:
        """(3 + 4N,) float32: the sums of one layer as :meth:`pack` has them, from one operator
        where kernels form them."""
        if fused_router.serves(routing.logits, routing.backend):
            return fused_statistics.pack(routing)
        return cls.from_routing(routing).pack()

    def pack(self) -> Tensor:
        """(..., 3 + 4N) float32: all of it as one tensor, undone by :meth:`unpack`."""
        scalars = torch.stack([self.tokens, self.squared_logsumexp, self.entropy], dim=-1)
        vectors = [self.expert_tokens, self.probs, self.sampling_probs, self.load]
        return torch.cat([scalars, *vectors], dim=-1)

    @classmethod
    def unpack(cls, packed: Tensor) -> "RoutingStatistics":
        """The statistics that :meth:`pack` made ``packed`` (..., 3 + 4N) from."""
        num_experts = (packed.shape[-1] - 3) // 4
        scalars, *vectors = packed.split([3] + 4 * [num_experts], dim=-1)
        return cls(*scalars.unbind(-1), *vectors)

    @property
    def expert_share(self) -> Tensor:
        """(..., N): F_i, the share of the tokens that each expert got; 0 without tokens."""
        return self.expert_tokens / self.expert_tokens.sum(-1, keepdim=True).clamp_min(1)

    @property
    def load_balance_loss(self) -> Tensor:
        """(...): N sum_i F_i P_i (arXiv 2101.03961); 1 when uniform."""
        return self._balance(self.probs)

    @property
    def sampling_load_balance_loss(self) -> Tensor:
        """(...): the same with the masked probabilities p~ in place of p."""
        return self._balance(self.sampling_probs)

    @property
    def importance_loss(self) -> Tensor:
        """(...): CV^2 of the importance plus CV^2 of the load (arXiv 1701.06538); 0 when even.

        CV is the coefficient of variation over experts, standard deviation over mean. The
        importance sums what experts are drawn from, which for ``noisy-topk`` are its gates. Routers
        without a smooth load of their own have the importance for it.
        """
        return _squared_variation(self.sampling_probs) + _squared_variation(self.load)

    @property
    def z_loss(self) -> Tensor:
        """(...): mean of logsumexp(z)^2 (ST-MoE, arXiv 2202.08906)."""
        return self.squared_logsumexp / self.tokens.clamp_min(1)

    @property
    def mean_entropy(self) -> Tensor:
        """(...): mean entropy of p in nats, 0 to log N."""
        return self.entropy / self.tokens.clamp_min(1)

    def _balance(self, probs: Tensor) -> Tensor:
        mean_probs = probs / self.tokens.clamp_min(1).unsqueeze(-1)
        return probs.shape[-1] * (self.expert_share * mean_probs).sum(-1)


def _squared_variation(values: Tensor) -> Tensor:
    """(...): variance over squared mean of the last dimension, 0 where all are 0."""
    mean = values.mean(-1)
    variance = (values - mean.unsqueeze(-1)).square().mean(-1)
    return variance / mean.square().clamp_min(torch.finfo(values.dtype).tiny)


def load_balance_loss(routing: Routing) -> Tensor:
    """(): N sum_i F_i P_i of one layer (arXiv 2101.03961); 1 when uniform.

    F_i is the share of non-padding tokens sent to expert i (no gradient), P_i the mean of p_i.
    """
    return RoutingStatistics.from_routing(routing).load_balance_loss


def z_loss(routing: Routing) -> Tensor:
    """(): mean of logsumexp(z)^2 over the non-padding tokens of one layer (arXiv 2202.08906)."""
    return RoutingStatistics.from_routing(routing).z_loss
