"""The loss of masked tokens plus the routing losses."""

from dataclasses import dataclass
from typing import Any, Dict, List

from fairseq import utils
from fairseq.criterions import register_criterion
from fairseq.criterions.masked_lm import MaskedLmConfig, MaskedLmLoss
from fairseq.logging import metrics

from fairseq_sparsemixer.criterions.routing_losses import RoutingLossesConfig, WithOneLoss


@dataclass
class MaskedLmWithRoutingConfig(MaskedLmConfig, RoutingLossesConfig):
    """Settings of :class:`MaskedLmWithRouting`."""


@register_criterion("masked_lm_with_routing", dataclass=MaskedLmWithRoutingConfig)
class MaskedLmWithRouting(WithOneLoss, MaskedLmLoss):
    """fairseq's cross-entropy of masked tokens plus balance loss and z-loss."""

    name = "masked_lm_with_routing"
    task_name = "masked_lm"
    labels = False

    @classmethod
    def reduce_metrics(cls, logging_outputs: List[Dict[str, Any]]) -> None:
        """Log the losses; ``nll_loss`` is in bits per masked token, and ``ppl`` is of it."""
        # Before fairseq's, which would be of the whole loss: the first counts.
        metrics.log_derived("ppl", lambda meters: utils.get_perplexity(meters["nll_loss"].avg))
        super().reduce_metrics(logging_outputs)
