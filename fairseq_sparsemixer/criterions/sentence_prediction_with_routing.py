"""The loss of a sentence's class, or score, plus the routing losses."""

from dataclasses import dataclass
from typing import Any, Dict, Tuple

from fairseq.criterions import register_criterion
from fairseq.criterions.sentence_prediction import (
    SentencePredictionConfig,
    SentencePredictionCriterion,
)
from torch import Tensor, nn

from fairseq_sparsemixer.criterions.routing_losses import RoutingLossesConfig, WithOneLoss


@dataclass
class SentencePredictionWithRoutingConfig(SentencePredictionConfig, RoutingLossesConfig):
    """Settings of :class:`SentencePredictionWithRouting`."""


@register_criterion(
    "sentence_prediction_with_routing", dataclass=SentencePredictionWithRoutingConfig
)
class SentencePredictionWithRouting(WithOneLoss, SentencePredictionCriterion):
    """fairseq's loss of sentence prediction plus balance loss and z-loss."""

    name = "sentence_prediction_with_routing"
    task_name = "sentence_prediction"
    labels = True

    def forward(
        self, model: nn.Module, sample: Dict[str, Any], reduce: bool = True
    ) -> Tuple[Tensor, int, Dict[str, Any]]:
        """See fairseq."""
        heads: Any = getattr(model, "classification_heads", {})
        _ = heads[self.classification_head_name]  # which names it, where there is none
        return super().forward(model, sample, reduce)

    def logging_outputs_can_be_summed(self) -> bool:  # type: ignore[override]
        """Not where predictions are gathered for Matthews', Pearson's or another measure.

        fairseq says always, and then cannot add up the lists of several workers.
        """
        return not self.keep_pred_and_targ
