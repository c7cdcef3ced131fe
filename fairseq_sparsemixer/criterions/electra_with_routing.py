"""ELECTRA's loss, of words that a generator predicts and of words that it has replaced, plus the
routing losses."""

import math
from dataclasses import dataclass, field
from typing import Any, Dict, List, Tuple

import torch
from fairseq.criterions import register_criterion
from fairseq.criterions.masked_lm import MaskedLmLoss
from fairseq.logging import metrics
from fairseq.tasks import FairseqTask
from torch import Tensor
from torch.nn import functional

from fairseq_sparsemixer.criterions.masked_lm_with_routing import (
    MaskedLmWithRouting,
    MaskedLmWithRoutingConfig,
)
from fairseq_sparsemixer.criterions.routing_losses import (
    REPLACES,
    refuse_weight,
    sum_over_workers,
)
from fairseq_sparsemixer.models.layers import Recorded
from fairseq_sparsemixer.models.switch_electra import REPLACED, uniform_draws


@dataclass
class ElectraWithRoutingConfig(MaskedLmWithRoutingConfig):
    """Settings of :class:`ElectraWithRouting`."""

    discriminator_weight: float = field(
        default=50.0, metadata={"help": "weight of the loss of replaced tokens"}
    )


class _ElectraLoss(MaskedLmLoss):
    """fairseq's loss of masked tokens, the generator's, plus that of the discriminator.

    Both are means in arXiv 2003.10555, of masked tokens and of all that are no padding. fairseq
    divides by the number of masked tokens, so the second is multiplied by it: in training those of
    all workers together, so that the gradient is the one of a single process.
    """

    def __init__(self, cfg: Any, task: FairseqTask) -> None:
        super().__init__(cfg, task)
        self.discriminator_weight = cfg.discriminator_weight
        self.seed: int = task.cfg.seed

    def forward(
        self, model: Any, sample: Dict[str, Any], reduce: bool = True
    ) -> Tuple[Tensor, Any, Dict[str, Any]]:
        """See fairseq."""
        target = sample["target"]
        # At a validation always the same; in training others in each epoch, as the masks are.
        update = model.num_updates if model.training else 0
        draws = uniform_draws(self.seed, update, sample["id"], target.size(1))
        net_input = {**sample["net_input"], "target": target, "draws": draws}
        seen: Any = Recorded(model)
        of_words, sample_size, logging_output = super().forward(
            seen, {**sample, "net_input": net_input}, reduce=reduce
        )
        logits_BL, replaced_BL = seen.output[1][REPLACED]
        counted_BL = net_input["src_tokens"].ne(self.padding_idx)
        losses_BL = functional.binary_cross_entropy_with_logits(
            logits_BL.float(), replaced_BL.float(), reduction="none"
        )
        of_tokens = (losses_BL * counted_BL).sum()
        sizes = torch.stack([sample_size, counted_BL.sum()])
        if model.training:
            sizes = sum_over_workers(sizes, counted=not sample.get("is_dummy", False))
        share = (sizes[0] / sizes[1].clamp_min(1)).to(of_tokens)
        loss = of_words + self.discriminator_weight * share * of_tokens
        named_BL = logits_BL.gt(0) & counted_BL
        logging_output.update(
            loss=loss.data,
            nll_loss=of_words.data,
            discriminator_loss=of_tokens.data,
            counted=counted_BL.sum(),
            correct=(named_BL.eq(replaced_BL) & counted_BL).sum(),
            named=named_BL.sum(),
            replaced=replaced_BL.sum(),
            found=(named_BL & replaced_BL).sum(),
        )
        return loss, sample_size, logging_output

    @classmethod
    def reduce_metrics(cls, logging_outputs: List[Dict[str, Any]]) -> None:
        """Log, besides, what the discriminator did: its loss in bits per token, and in percent how
        many tokens it judged rightly and are replaced, and of these precision and recall."""
        super().reduce_metrics(logging_outputs)

        def total(key: str) -> Any:
            return sum(output[key] for output in logging_outputs)

        counted = total("counted")
        bits = total("discriminator_loss") / counted / math.log(2)
        metrics.log_scalar("discriminator_loss", bits, counted, round=4)
        for name, part, whole in (
            ("accuracy", "correct", "counted"),
            ("replaced", "replaced", "counted"),
            ("precision", "found", "named"),
            ("recall", "found", "replaced"),
        ):
            size = total(whole)
            metrics.log_scalar(name, 100.0 * total(part) / max(size, 1), size, round=2)


@register_criterion("electra_with_routing", dataclass=ElectraWithRoutingConfig)
class ElectraWithRouting(MaskedLmWithRouting, _ElectraLoss):
    """ELECTRA's loss plus balance loss and z-loss of the discriminator's experts.

    ``nll_loss`` is the generator's alone.
    """

    name = "electra_with_routing"
    model_kind = REPLACES

    def configure(self, cfg: Any) -> None:
        """See :meth:`WithRoutingLosses.configure`."""
        refuse_weight("--discriminator-weight", cfg.discriminator_weight)
        super().configure(cfg)
