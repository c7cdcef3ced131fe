"""The Switch router: arg-max routing that keeps one of the two terms of the router's gradient."""

from typing import Any

from torch import Tensor

from fairseq_sparsemixer.moe.routing import Router, Routing, register_router


@register_router("switch")
class SwitchRouter(Router):
    """Switch Transformer (Fedus et al. 2021, arXiv 2101.03961).

    Training: z <- z * u with u ~ U(1 - eps, 1 + eps) for each logit; D = argmax z; the gate is
    p_D. Evaluation: the same without jitter. The gradient is that of p_D alone: the choice of D
    is treated as a constant.

    Args:
        jitter_eps: eps, 0 up to but not including 1 (the jitter must not change a logit's sign).
        **options: see :class:`~fairseq_sparsemixer.moe.Router`.
    """

    def __init__(self, *, jitter_eps: float = 0.1, **options: Any) -> None:
        super().__init__(jitter_eps=jitter_eps, **options)
        if jitter_eps >= 1:
            raise ValueError(
                f"jitter_eps must be at least 0 and below 1 for router {self.name!r}, "
                f"not {jitter_eps}"
            )

    def select(self, logits_TN: Tensor) -> Routing:
        """See :meth:`Router.select`."""
        if self.training and self.jitter_eps > 0:
            eps = self.jitter_eps
            logits_TN = logits_TN * logits_TN.new_empty(logits_TN.shape).uniform_(1 - eps, 1 + eps)
        probs_TN = logits_TN.softmax(dim=-1)
        index_T1 = probs_TN.argmax(dim=-1, keepdim=True)
        return Routing(
            expert_index=index_T1,
            gate=probs_TN.gather(-1, index_T1),
            logits=logits_TN,
            probs=probs_TN,
            sampling_probs=probs_TN,
        )
