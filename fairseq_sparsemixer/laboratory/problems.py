"""What an estimator is measured on.

Shape suffixes: R rows (tokens of the problem), M any number of evaluations, N experts, D width.
"""

import dataclasses
from typing import Callable, Dict, NamedTuple, Optional, Tuple

import torch
from torch import Tensor

Loss = Callable[[Tensor, Tensor], Tuple[Tensor, Tensor]]
"""(h (M, D), row (M,) int64) -> f_row(h) (M,) and its gradient f_row'(h) (M, D)."""


class Evaluation(NamedTuple):
    """f at some h, and its slope along every expert's output."""

    loss: Tensor
    """(M,) f(h)."""
    expert_slope: Tensor
    """(M, N) f'(h) . E_i."""
    mean_slope: Tensor
    """(M, N) f'(h) . m_i for a prediction m_i of E_i."""


@dataclasses.dataclass
class Problem:
    """R tokens: D ~ p = softmax(z) for each of them, and the loss f of h = p_D E_D.

    Each token's f is its own (for a trained model: the loss of its sentence as a function of the
    layer's output at that token, all else held fixed).
    """

    logits: Tensor
    """(R, N) z, float32."""
    outputs: Tensor
    """(R, N, D) E_i(x), every expert computed."""
    loss: Loss
    predictions: Dict[str, Tensor]
    """By name: (R, N, D), what is known of E_i(x) without computing it; "mean" is the one that
    the routers use."""
    inputs: Optional[Tensor] = None
    """(R, D) the router's inputs x, where there are any."""
    _known: Dict[Tuple, Tuple[Tensor, Tensor]] = dataclasses.field(default_factory=dict, repr=False)

    @property
    def num_experts(self) -> int:
        """N."""
        return self.logits.shape[-1]

    @torch.no_grad()
    def evaluate(
        self, row_M: Tensor, weight_MN: Tensor, mean_weight_MN: Tensor, prediction: str = "mean"
    ) -> Evaluation:
        """f at h = sum_i weight_i E_i + sum_i mean_weight_i m_i, without gradient.

        What was evaluated before is not evaluated again: estimators share most of their h.
        """
        outputs_MND = self.outputs[row_M]
        means_MND = self.predictions[prediction][row_M]
        h_MD = torch.einsum("mn,mnd->md", weight_MN, outputs_MND)
        h_MD = h_MD + torch.einsum("mn,mnd->md", mean_weight_MN, means_MND)
        weights = torch.cat([weight_MN, mean_weight_MN], dim=-1).double().mul(1e6).round().long()
        keys = [
            (row, *values, prediction if any(values[self.num_experts :]) else "")
            for row, values in zip(row_M.tolist(), weights.tolist())
        ]
        place = {key: i for i, key in enumerate(keys) if key not in self._known}
        if place:
            new = torch.tensor(list(place.values()))
            values = zip(*self.loss(h_MD[new], row_M[new]))
            self._known.update(zip(place, values))
        loss_M = torch.stack([self._known[key][0] for key in keys])
        slope_MD = torch.stack([self._known[key][1] for key in keys])
        return Evaluation(
            loss_M,
            torch.einsum("md,mnd->mn", slope_MD, outputs_MND),
            torch.einsum("md,mnd->mn", slope_MD, means_MND),
        )

    def every_expert(self, weight_RN: Tensor) -> Tuple[Tensor, Tensor]:
        """(R, N) each: f(h_i) and f'(h_i) . E_i at h_i = weight_i E_i, for every expert i."""
        rows, num_experts = weight_RN.shape
        row_M = torch.arange(rows).repeat_interleave(num_experts)
        weight_MN = torch.diag_embed(weight_RN).reshape(-1, num_experts)
        at_h = self.evaluate(row_M, weight_MN, torch.zeros_like(weight_MN))
        slope_RNN = at_h.expert_slope.reshape(rows, num_experts, num_experts)
        return at_h.loss.reshape(rows, num_experts), slope_RNN.diagonal(dim1=-2, dim2=-1)

    def exact_gradient(self, probs_RN: Tensor, gates_RN: Optional[Tensor] = None) -> Tensor:
        """(R, N): the gradient to z of E_{D ~ q}[f(g_D E_D)], by computing every expert.

        grad_0 + grad_1 = sum_i f(h_i) dq_i + q_i f'(h_i) . E_i dg_i with h_i = g_i E_i.

        Args:
            probs_RN: q, a softmax over all experts or over some of them.
            gates_RN: g, the same; None for q.
        """
        gates_RN = probs_RN if gates_RN is None else gates_RN
        value_RN, slope_RN = self.every_expert(gates_RN)
        # Any constant may be taken off, because sum_i dq_i = 0; this one keeps rounding small.
        grad_0_RN = through_softmax(value_RN - value_RN[:, :1], probs_RN)
        return grad_0_RN + through_softmax(probs_RN * slope_RN, gates_RN)


def through_softmax(grad_probs: Tensor, probs: Tensor) -> Tensor:
    """(..., N): the gradient to z of p = softmax(z), given the one to p."""
    return probs * (grad_probs - (grad_probs * probs).sum(-1, keepdim=True))
