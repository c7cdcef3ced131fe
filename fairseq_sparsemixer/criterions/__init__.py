"""fairseq criterions that know of experts: fairseq's own, with the part that they share.

``routing_losses``  that part: the losses, what is logged, and its settings
"""

import fairseq  # noqa: F401  (registers them, in whichever order they are imported)

from fairseq_sparsemixer.criterions.electra_with_routing import (
    ElectraWithRouting,
    ElectraWithRoutingConfig,
)
from fairseq_sparsemixer.criterions.label_smoothed_cross_entropy_with_routing import (
    LabelSmoothedCrossEntropyWithRouting,
    LabelSmoothedCrossEntropyWithRoutingConfig,
)
from fairseq_sparsemixer.criterions.masked_lm_with_routing import (
    MaskedLmWithRouting,
    MaskedLmWithRoutingConfig,
)
from fairseq_sparsemixer.criterions.routing_losses import RoutingLossesConfig
from fairseq_sparsemixer.criterions.sentence_prediction_with_routing import (
    SentencePredictionWithRouting,
    SentencePredictionWithRoutingConfig,
)

__all__ = [
    "ElectraWithRouting",
    "ElectraWithRoutingConfig",
    "LabelSmoothedCrossEntropyWithRouting",
    "LabelSmoothedCrossEntropyWithRoutingConfig",
    "MaskedLmWithRouting",
    "MaskedLmWithRoutingConfig",
    "RoutingLossesConfig",
    "SentencePredictionWithRouting",
    "SentencePredictionWithRoutingConfig",
]
