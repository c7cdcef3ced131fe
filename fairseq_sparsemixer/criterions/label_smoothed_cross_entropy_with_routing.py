"""Label-smoothed cross-entropy plus the routing losses: translation and language models."""

from dataclasses import dataclass

from fairseq.criterions import register_criterion
from fairseq.criterions.label_smoothed_cross_entropy import (
    LabelSmoothedCrossEntropyCriterion,
    LabelSmoothedCrossEntropyCriterionConfig,
)

from fairseq_sparsemixer.criterions.routing_losses import RoutingLossesConfig, WithRoutingLosses


@dataclass
class LabelSmoothedCrossEntropyWithRoutingConfig(
    LabelSmoothedCrossEntropyCriterionConfig, RoutingLossesConfig
):
    """Settings of :class:`LabelSmoothedCrossEntropyWithRouting`."""


@register_criterion(
    "label_smoothed_cross_entropy_with_routing",
    dataclass=LabelSmoothedCrossEntropyWithRoutingConfig,
)
class LabelSmoothedCrossEntropyWithRouting(WithRoutingLosses, LabelSmoothedCrossEntropyCriterion):
    """fairseq's label-smoothed cross-entropy (0 by default) plus balance loss and z-loss."""
