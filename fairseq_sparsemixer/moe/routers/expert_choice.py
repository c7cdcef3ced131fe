"""Experts choose tokens."""

from typing import Any

import torch
from torch import Tensor

from fairseq_sparsemixer.moe.routing import Context, Router, Routing, one_hot, register_router


@register_router("expert-choice")
class ExpertChoiceRouter(Router):
    """Expert choice (Zhou et al. 2022, arXiv 2202.09368): each expert takes its favourite tokens.

    S = softmax(z) over experts; each expert takes the ceil(K T / N) tokens of the batch, padding
    left out, with the largest S and uses S as the gate. So K is the mean number of experts of a
    token (the source's capacity factor); a token may get none or all of them, and the load is
    equal by construction. Slot i of a token belongs to expert i.

    A token's experts depend on the other tokens of the batch. In a decoder these are words that
    are still to be written, so it is for encoders only; and a translation may depend on the
    sentences that it is batched with.

    Args:
        jitter_eps: not used.
        renormalise: divide a token's gates by their sum (as Komatsuzaki et al. 2022, arXiv
            2212.05055), and send a token that no expert took to its favourite (of this project),
            so that the gates of each token add up to 1, as upcycling needs it. The router learns
            from tokens of several experts alone.
        **options: see :class:`~fairseq_sparsemixer.moe.Router`.
    """

    max_top_k = None
    causal = False
    needs_balance = False
    takes_balance_bias = False

    def __init__(self, *, renormalise: bool = False, **options: Any) -> None:
        super().__init__(**options)
        self.renormalise = renormalise

    def select(self, logits_TN: Tensor, context: Context) -> Routing:
        """See :meth:`Router.select`."""
        probs_TN = logits_TN.softmax(dim=-1)
        score_TN = probs_TN.detach()
        if context.padding_mask is None:
            tokens = score_TN.new_full((), len(score_TN))
        else:
            score_TN = score_TN.masked_fill(context.padding_mask.unsqueeze(-1), -1.0)
            tokens = (~context.padding_mask).sum()
        taken = torch.ceil(tokens * self.top_k / self.num_experts)
        rank_TN = score_TN.argsort(dim=0, descending=True, stable=True).argsort(dim=0)
        # A padding row may come within the first ceil(...) where few tokens are left.
        chosen_TN = (rank_TN < taken) & (score_TN >= 0)
        if self.renormalise:
            favourite_TN = one_hot(score_TN.argmax(dim=-1, keepdim=True), probs_TN).bool()
            chosen_TN = chosen_TN | (favourite_TN & ~chosen_TN.any(dim=-1, keepdim=True))
        gate_TN = probs_TN * chosen_TN
        if self.renormalise:
            gate_TN = gate_TN / gate_TN.sum(dim=-1, keepdim=True)
        expert_N = torch.arange(self.num_experts, device=logits_TN.device)
        return Routing(
            expert_index=torch.where(chosen_TN, expert_N, -1),
            gate=gate_TN,
            logits=logits_TN,
            probs=probs_TN,
            sampling_probs=probs_TN,
        )
