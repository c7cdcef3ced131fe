"""The Switch router: arg-max routing that keeps one of the two terms of the router's gradient."""

from typing import Any, Optional

import torch
from torch import nn

from fairseq_sparsemixer.moe.routers.topk import TopKRouter
from fairseq_sparsemixer.moe.routing import register_router


@register_router("switch")
class SwitchRouter(TopKRouter):
    """Switch Transformer (Fedus et al. 2021, arXiv 2101.03961).

    Training: z <- z * u with u ~ U(1 - eps, 1 + eps) for each logit; D = argmax z; the gate is
    p_D. Evaluation: the same without jitter. The gradient is that of p_D alone: the choice of D
    is treated as a constant.

    Args:
        jitter_eps: eps, 0 up to but not including 1 (the jitter must not change a logit's sign).
        **options: see :class:`~fairseq_sparsemixer.moe.Router`.
    """

    max_top_k: Optional[int] = 1

    def __init__(self, **options: Any) -> None:
        super().__init__(renormalise=False, **options)


@register_router("switch-omega")
class SwitchOmegaRouter(SwitchRouter):
    """Switch with SparseMixer's learned output scale: the control for omega.

    As :class:`SwitchRouter`, and the expert output is multiplied by omega in R^D, initially 1.

    Args:
        jitter_eps: eps, 0 up to but not including 1.
        **options: see :class:`~fairseq_sparsemixer.moe.Router`.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.output_scale = nn.Parameter(torch.ones(self.embed_dim))
