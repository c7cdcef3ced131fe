"""Estimators that compute every expert in training: the dense yardstick, not a sparse layer.

D ~ p is drawn and y = p_D E_D(x), as for SparseMixer without its mask. The gate of slot i is
D~_i p_i, where D~ is the one-hot D in the forward pass and a surrogate in the backward pass. The
factor p_i gives grad_1, as everywhere; D~ estimates grad_0, for which f' is multiplied with the
outputs p_i E_i of all experts.
"""

import torch
from torch import Tensor

from fairseq_sparsemixer.moe.routers.sparsemixer import sample
from fairseq_sparsemixer.moe.routing import (
    Context,
    EvaluationRule,
    Router,
    Routing,
    one_hot,
    register_router,
)


class _DenseRouter(Router):
    """Evaluation: D = argmax, gate p_D, and only that expert is computed."""

    computes_all_experts = True

    def evaluation_rule(self) -> EvaluationRule:
        """See :meth:`Router.evaluation_rule`."""
        return EvaluationRule("left")

    def select(self, logits_TN: Tensor, context: Context) -> Routing:
        """See :meth:`Router.select`."""
        logits_TN = self.biased(logits_TN)
        probs_TN = logits_TN.softmax(dim=-1)
        if not self.training:
            index_TK = logits_TN.argmax(dim=-1, keepdim=True)
            gate_TK = probs_TN.gather(-1, index_TK)
        else:
            choice_TN = one_hot(sample(logits_TN), probs_TN)
            gates_TN = self.surrogate(choice_TN, logits_TN, probs_TN) * probs_TN
            # The chosen expert first, the others in their order.
            index_TK = choice_TN.argsort(dim=-1, descending=True, stable=True)
            gate_TK = gates_TN.gather(-1, index_TK)
        return Routing(
            expert_index=index_TK,
            gate=gate_TK,
            logits=logits_TN,
            probs=probs_TN,
            sampling_probs=probs_TN,
            num_chosen=1,
        )

    def surrogate(self, choice_TN: Tensor, logits_TN: Tensor, probs_TN: Tensor) -> Tensor:
        """(T, N): the value of ``choice_TN`` with a gradient to the logits."""
        raise NotImplementedError


@register_router("straight-through")
class StraightThroughRouter(_DenseRouter):
    """Straight-through (Bengio et al. 2013, arXiv 1308.3432): D~ = D + p - sg(p).

    To first order in the difference of two outputs, f(h_i) - f(h_D) ~ f'(h_D)(h_i - h_D), so it is
    exact for linear f. For f(h) = h' A h its mean misses the exact gradient by
    sum_i sum_j p_j (h_i - h_j)' A (h_i - h_j) dp_i.

    Computes every expert for every token in training.

    Args:
        jitter_eps: not used.
        **options: see :class:`~fairseq_sparsemixer.moe.Router`.
    """

    def surrogate(self, choice_TN: Tensor, logits_TN: Tensor, probs_TN: Tensor) -> Tensor:
        """See :class:`_DenseRouter`."""
        return choice_TN + (probs_TN - probs_TN.detach())


@register_router("reinmax")
class ReinMaxRouter(_DenseRouter):
    """ReinMax (Liu et al. 2023, arXiv 2304.08612): Heun's second-order straight-through.

    With q = (D + p) / 2 the gradient of D~ is twice the straight-through gradient taken at q minus
    half of the one taken at p: f(h_i) - f(h_j) ~ (f'(h_i) + f'(h_j))(h_i - h_j) / 2. In
    expectation it is the exact gradient for quadratic f.

    Computes every expert for every token in training.

    Args:
        jitter_eps: not used.
        **options: see :class:`~fairseq_sparsemixer.moe.Router`.
    """

    balance_weight = 0.05  # at 0.01 all of a layer's tokens go to one expert

    def surrogate(self, choice_TN: Tensor, logits_TN: Tensor, probs_TN: Tensor) -> Tensor:
        """See :class:`_DenseRouter`."""
        half_TN = (choice_TN + probs_TN.detach()) / 2
        # A softmax whose value is q: its logits are log q, the gradient goes to z.
        tiny = torch.finfo(half_TN.dtype).tiny
        at_half_TN = (half_TN.clamp_min(tiny).log() + logits_TN - logits_TN.detach()).softmax(-1)
        slope_TN = 2 * at_half_TN - 0.5 * probs_TN
        return choice_TN + (slope_TN - slope_TN.detach())
