"""fairseq criterions that know of experts."""

from fairseq_sparsemixer.criterions.label_smoothed_cross_entropy_with_routing import (
    LabelSmoothedCrossEntropyWithRouting,
    LabelSmoothedCrossEntropyWithRoutingConfig,
)

__all__ = [
    "LabelSmoothedCrossEntropyWithRouting",
    "LabelSmoothedCrossEntropyWithRoutingConfig",
]
