"""Routers that take the largest logits and let the gradient flow through the gate alone."""

import math
from typing import Any, Optional

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fairseq_sparsemixer.moe.adaptation import ExpertMeans
from fairseq_sparsemixer.moe.kernels import router as fused_router
from fairseq_sparsemixer.moe.routing import (
    Context,
    EvaluationRule,
    Router,
    Routing,
    one_hot,
    register_router,
)

ESTIMATOR = fused_router.FusedEstimator()
"""Of ``topk`` with K = 1."""


def check_jitter(router: Router) -> None:
    """Refuse jitter that could change the sign of a logit.

    Raises:
        ValueError: jitter_eps is not below 1.
    """
    if router.jitter_eps >= 1:
        raise ValueError(
            f"jitter_eps must be at least 0 and below 1 for router {router.name!r}, "
            f"not {router.jitter_eps}"
        )


def jittered(logits_TN: Tensor, eps: float) -> Tensor:
    """(T, N): z * u with u ~ U(1 - eps, 1 + eps) for each logit (arXiv 2101.03961)."""
    return logits_TN * logits_TN.new_empty(logits_TN.shape).uniform_(1 - eps, 1 + eps)


@register_router("topk")
class TopKRouter(Router):
    """Softmax over all experts, the K largest of it (as in Mixtral and OLMoE; K = 1: Switch).

    Training: z <- z * u with u ~ U(1 - eps, 1 + eps) for each logit (arXiv 2101.03961). The gates
    are the p_i of the K largest logits. Evaluation: the same without jitter. The choice itself is
    treated as a constant.

    Args:
        jitter_eps: eps, 0 up to but not including 1 (the jitter must not change a logit's sign).
        renormalise: divide the K gates by their sum; for K >= 2, since a single gate would be 1
            and the router would get no gradient.
        **options: see :class:`~fairseq_sparsemixer.moe.Router`.
    """

    max_top_k: Optional[int] = None

    def __init__(self, *, renormalise: bool = False, **options: Any) -> None:
        super().__init__(**options)
        check_jitter(self)
        if renormalise and self.top_k == 1:
            raise ValueError("renormalise needs top_k of at least 2: one gate would always be 1")
        self.renormalise = renormalise

    def evaluation_rule(self) -> EvaluationRule:
        """See :meth:`Router.evaluation_rule`."""
        return EvaluationRule("chosen" if self.renormalise else "all")

    def select(self, logits_TN: Tensor, context: Context) -> Routing:
        """See :meth:`Router.select`."""
        if self.training and self.jitter_eps > 0:
            logits_TN = jittered(logits_TN, self.jitter_eps)
        if (
            self.top_k == 1
            and self.balance_bias is None
            and fused_router.serves(logits_TN, self.backend)
        ):
            index_T1, gate_T1, probs_TN, _ = fused_router.choose(ESTIMATOR, logits_TN)
            return Routing(index_T1, gate_T1, logits_TN, probs_TN, probs_TN)
        probs_TN = logits_TN.softmax(dim=-1)
        index_TK = self.biased(logits_TN).topk(self.top_k, dim=-1).indices
        gate_TK = probs_TN.gather(-1, index_TK)
        if self.renormalise:
            gate_TK = gate_TK / gate_TK.sum(-1, keepdim=True)
        return Routing(
            expert_index=index_TK,
            gate=gate_TK,
            logits=logits_TN,
            probs=probs_TN,
            sampling_probs=probs_TN,
        )


@register_router("gshard")
class GShardRouter(Router):
    """Top-2 with a random second expert (Lepikhin et al. 2020, arXiv 2006.16668, algorithm 1).

    The two largest p_i, divided by their sum, are the gates g_1 >= g_2. Training: the second
    expert is used with probability min(1, 2 g_2); where it is not, its slot is empty and g_1 stays
    as it is. Evaluation: both are used. There is no capacity: no token is dropped.

    Args:
        jitter_eps: not used.
        **options: see :class:`~fairseq_sparsemixer.moe.Router`; top_k must be 2.
    """

    min_top_k = 2
    max_top_k = 2

    def evaluation_rule(self) -> EvaluationRule:
        """See :meth:`Router.evaluation_rule`."""
        return EvaluationRule("chosen")

    def select(self, logits_TN: Tensor, context: Context) -> Routing:
        """See :meth:`Router.select`."""
        probs_TN = logits_TN.softmax(dim=-1)
        index_T2 = self.biased(logits_TN).topk(2, dim=-1).indices
        gate_T2 = probs_TN.gather(-1, index_T2)
        gate_T2 = gate_T2 / gate_T2.sum(-1, keepdim=True)
        if self.training:
            second_T1 = torch.rand_like(gate_T2[:, 1:]) < 2 * gate_T2[:, 1:]
            used_T2 = torch.cat([torch.ones_like(second_T1), second_T1], dim=-1)
            index_T2 = index_T2.masked_fill(~used_T2, -1)
            gate_T2 = gate_T2.masked_fill(~used_T2, 0.0)
        return Routing(
            expert_index=index_T2,
            gate=gate_T2,
            logits=logits_TN,
            probs=probs_TN,
            sampling_probs=probs_TN,
        )


LEAST_NOISE = 0.01
"""Keeps the noise of ``noisy-topk``, which the load is divided by, away from 0."""


@register_router("noisy-topk")
class NoisyTopKRouter(Router):
    """Noisy top-k gating (Shazeer et al. 2017, arXiv 1701.06538).

    H_i = z_i + e_i (softplus(x w_i) + 0.01), e_i ~ N(0, 1) in training and 0 in evaluation; the K
    largest H_i are kept and the gates are the softmax over them. Its losses are ``importance``
    (squared coefficient of variation of the summed gates) and the same of ``load``, the smooth
    chance of being kept: choose them with ``--balance-loss importance``.

    Noise weights start at zero. :meth:`route` without the tokens uses softplus(0) for the scale.

    Args:
        jitter_eps: not used, the noise takes its place.
        **options: see :class:`~fairseq_sparsemixer.moe.Router`; top_k must be at least 2, since a
            softmax over one expert has no gradient.
    """

    min_top_k = 2
    max_top_k = None
    takes_balance_bias = False

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.noise_weight = nn.Parameter(torch.zeros(self.num_experts, self.embed_dim))

    def evaluation_rule(self) -> EvaluationRule:
        """See :meth:`Router.evaluation_rule`."""
        return EvaluationRule("chosen")

    def select(self, logits_TN: Tensor, context: Context) -> Routing:
        """See :meth:`Router.select`."""
        noisy_TN, scale_TN = logits_TN, None
        if self.training:
            if context.x is None:
                noise_logits_TN = torch.zeros_like(logits_TN)
            else:
                noise_logits_TN = self.project(context.x, self.noise_weight)
            scale_TN = F.softplus(noise_logits_TN) + LEAST_NOISE
            noisy_TN = logits_TN + torch.randn_like(logits_TN) * scale_TN
        index_TK = noisy_TN.topk(self.top_k, dim=-1).indices
        kept_TN = one_hot(index_TK, logits_TN).bool()
        gates_TN = noisy_TN.masked_fill(~kept_TN, float("-inf")).softmax(dim=-1)
        return Routing(
            expert_index=index_TK,
            gate=gates_TN.gather(-1, index_TK),
            logits=logits_TN,
            probs=logits_TN.softmax(dim=-1),
            sampling_probs=gates_TN,
            load=None if scale_TN is None else self._load(logits_TN, noisy_TN, kept_TN, scale_TN),
        )

    def _load(
        self, logits_TN: Tensor, noisy_TN: Tensor, kept_TN: Tensor, scale_TN: Tensor
    ) -> Tensor:
        """(T, N): Phi((z_i - kth largest of the other H_j) / scale_i), equations 8 and 9."""
        if self.top_k == self.num_experts:
            return torch.ones_like(logits_TN)
        largest_TK1 = noisy_TN.topk(self.top_k + 1, dim=-1).values
        # Without i, the K-th largest is the next one for a kept expert, the last kept otherwise.
        threshold_TN = torch.where(kept_TN, largest_TK1[:, -1:], largest_TK1[:, -2:-1])
        return 0.5 * (1 + torch.erf((logits_TN - threshold_TN) / (scale_TN * math.sqrt(2))))


@register_router("default-moe")
class DefaultMoERouter(Router):
    """Default MoE (Panda et al. 2025, arXiv 2504.12463): a dense gradient from mean outputs.

    y = sum over the K largest of p_i E_i(x) + sum over the others of p_i m_i, with m_i the running
    mean of expert i's output: every p_i gets a gradient, and no further expert is computed. The
    same in evaluation.

    Args:
        jitter_eps: not used.
        mean_decay: weight of the old mean in each update.
        **options: see :class:`~fairseq_sparsemixer.moe.Router`.
    """

    max_top_k = None
    adds_means = True

    def __init__(self, *, mean_decay: float = 0.99, **options: Any) -> None:
        super().__init__(**options)
        self.expert_means = ExpertMeans(self.num_experts, self.embed_dim, mean_decay)

    @torch.no_grad()
    def begin_undecided(self) -> None:
        """See :meth:`Router.begin_undecided`; the means, which add to the output, grow from 0.

        By 1 - decay of the way in each update: at once, they would undo what the model has learnt.
        """
        super().begin_undecided()
        assert isinstance(self.expert_means, ExpertMeans)
        self.expert_means.updates.fill_(1 / (1 - self.expert_means.decay))

    def evaluation_rule(self) -> EvaluationRule:
        """See :meth:`Router.evaluation_rule`; besides, :attr:`adds_means`."""
        return EvaluationRule("all")

    def select(self, logits_TN: Tensor, context: Context) -> Routing:
        """See :meth:`Router.select`."""
        probs_TN = logits_TN.softmax(dim=-1)
        index_TK = self.biased(logits_TN).topk(self.top_k, dim=-1).indices
        return Routing(
            expert_index=index_TK,
            gate=probs_TN.gather(-1, index_TK),
            logits=logits_TN,
            probs=probs_TN,
            sampling_probs=probs_TN,
            mean_gate=probs_TN * (1 - one_hot(index_TK, probs_TN)),
        )
