"""fairseq criterions that know of experts."""

import fairseq  # noqa: F401  (registers all three, in whichever order they are imported)

from fairseq_sparsemixer.criterions.label_smoothed_cross_entropy_with_routing import (
    LabelSmoothedCrossEntropyWithRouting,
    LabelSmoothedCrossEntropyWithRoutingConfig,
)

__all__ = [
    "LabelSmoothedCrossEntropyWithRouting",
    "LabelSmoothedCrossEntropyWithRoutingConfig",
]
