"""A router made of three parts, so that each can be exchanged alone."""

from typing import Any

import torch
from torch import Tensor, nn

from fairseq_sparsemixer.moe.routers.sparsemixer import (
    FIRST_ORDER,
    GRAD_1,
    MIDPOINT,
    SparseMixerBase,
)
from fairseq_sparsemixer.moe.routers.topk import check_jitter, jittered
from fairseq_sparsemixer.moe.routing import Context, Routing, register_router

CHOICES = ("argmax", "jittered-argmax", "masked-sample", "full-sample")
"""How training chooses the expert."""
SAMPLES = ("masked-sample", "full-sample")
"""Those that draw it."""
RULES = {"grad-1": GRAD_1, "first-order": FIRST_ORDER, "midpoint": MIDPOINT}
"""The estimators."""


@register_router("composed")
class ComposedRouter(SparseMixerBase):
    """A choice, a gate and an estimator, of which Switch and SparseMixer are two points.

    ``switch-omega`` is (jittered-argmax, full, grad-1), ``sparsemixer-1st`` (masked-sample, masked,
    first-order) and ``sparsemixer`` (masked-sample, masked, midpoint), the default; see the head
    of :mod:`fairseq_sparsemixer.moe.routers.sparsemixer` for what is estimated. Evaluation: the
    arg-max, and the same gate. With a balance bias all is read from z + b.

    Args:
        jitter_eps: eps of the jitter (below 1) or of the mask (above 0); else not used.
        choice: ``"argmax"``; ``"jittered-argmax"``, of z u with u ~ U(1 - eps, 1 + eps) for each
            logit; ``"masked-sample"``, D ~ p~; ``"full-sample"``, D ~ p.
        gate: ``"full"``, p_D; ``"masked"``, p~_D, for choices within the mask; ``"one"``, 1.
        estimator: ``"grad-1"`` is plain backpropagation through the gate; ``"first-order"`` and
            ``"midpoint"`` add the gradient of the choice, for choices that are drawn. With gate 1
            that is all there is, f'(m E_D) E_D dlog q_D; ``"first-order"`` alone also takes an
            arg-max for it, as if it had been drawn from p.
        first_order_on_argmax: of ``"midpoint"``: m = 1 wherever D is the arg-max.
        omega: whether the output is multiplied by a learned omega.
        **options: see :class:`~fairseq_sparsemixer.moe.Router`.

    Raises:
        ValueError: for a combination that means nothing; the message says why.
    """

    gates = ("masked", "full", "one")

    def __init__(
        self,
        *,
        choice: str = "masked-sample",
        gate: str = "masked",
        estimator: str = "midpoint",
        first_order_on_argmax: bool = True,
        omega: bool = True,
        **options: Any,
    ) -> None:
        for name, value, allowed in (
            ("choice", choice, CHOICES),
            ("gate", gate, self.gates),
            ("estimator", estimator, tuple(RULES)),
        ):
            if value not in allowed:
                raise ValueError(f"{name} must be {' or '.join(allowed)}, not {value!r}")
        _check_combination(choice, gate, estimator)
        self.choice, self.estimator = choice, estimator
        self.sampled, self.rule = choice in SAMPLES, RULES[estimator]
        # An arg-max is never outside the mask, so that its gate may be p~.
        self.masked = choice == "masked-sample" or gate == "masked"
        super().__init__(gate=gate, **options)
        if choice == "jittered-argmax":
            check_jitter(self)
        self.first_order_on_argmax = first_order_on_argmax
        if omega:
            self.output_scale = nn.Parameter(torch.ones(self.embed_dim))

    def select(self, logits_TN: Tensor, context: Context) -> Routing:
        """See :meth:`Router.select`."""
        if self.training and self.choice == "jittered-argmax":
            logits_TN = jittered(logits_TN, self.jitter_eps)
        return super().select(logits_TN, context)


def _check_combination(choice: str, gate: str, estimator: str) -> None:
    """Refuse what means nothing.

    Raises:
        ValueError: with the reason and the cure.
    """
    if choice == "full-sample" and gate == "masked":
        raise ValueError(
            "gate 'masked' is 0 for experts outside the mask, which choice 'full-sample' may draw: "
            "use gate full or one, or choice masked-sample"
        )
    if gate == "one" and estimator == "grad-1":
        raise ValueError(
            "gate 'one' is a constant, so that estimator 'grad-1' leaves the router without a "
            "gradient: use estimator first-order or midpoint"
        )
    if choice not in SAMPLES and (estimator, gate) not in (
        ("grad-1", "full"),
        ("grad-1", "masked"),
        ("first-order", "one"),
    ):
        raise ValueError(
            f"estimator {estimator!r} is of the gradient of drawing an expert, and choice "
            f"{choice!r} draws none: use estimator grad-1, or first-order with gate one"
        )
