"""Label-smoothed cross-entropy plus the routing losses of a Switch Transformer."""

import math
from dataclasses import dataclass, field
from typing import Any, Dict, List, Tuple

import torch
from fairseq.criterions import register_criterion
from fairseq.criterions.label_smoothed_cross_entropy import (
    LabelSmoothedCrossEntropyCriterion,
    LabelSmoothedCrossEntropyCriterionConfig,
)
from fairseq.dataclass import ChoiceEnum
from fairseq.distributed import utils as distributed_utils
from fairseq.logging import metrics
from fairseq.tasks import FairseqTask
from torch import Tensor, nn

from fairseq_sparsemixer.models.config import ConfigError
from fairseq_sparsemixer.models.layers import SwitchLayer
from fairseq_sparsemixer.moe import RoutingStatistics

RoutingLoss: Any = ChoiceEnum(["corrected", "released"])

PREFIX = "routing_statistics/"
"""Logging outputs of this prefix hold the packed sums of one layer."""


@dataclass
class LabelSmoothedCrossEntropyWithRoutingConfig(LabelSmoothedCrossEntropyCriterionConfig):
    """Settings of :class:`LabelSmoothedCrossEntropyWithRouting`."""

    routing_loss: RoutingLoss = field(
        default="corrected",
        metadata={
            "help": "corrected: balance and z-loss per token, averaged over layers; "
            "released: the weighting of the example released with the paper"
        },
    )
    balance_weight: float = field(default=0.01, metadata={"help": "weight of the balance loss"})
    z_loss_weight: float = field(
        default=0.0, metadata={"help": "weight of the router's z-loss (ST-MoE uses 0.001)"}
    )


@register_criterion(
    "label_smoothed_cross_entropy_with_routing",
    dataclass=LabelSmoothedCrossEntropyWithRoutingConfig,
)
class LabelSmoothedCrossEntropyWithRouting(LabelSmoothedCrossEntropyCriterion):
    """Label-smoothed cross-entropy plus balance loss and z-loss.

    fairseq sums the cross-entropy over tokens and divides the gradient by ``sample_size``, so the
    routing losses, which are means, are multiplied by ``sample_size``.

    ``corrected`` (the default): weight x sample_size x mean over layers. In training the shares
    F_i are those of the whole batch over all workers, so that the gradient is the one that a
    single process would get from that batch. Under ``--update-freq`` each micro-batch has its own
    F_i: those of the micro-batches to come are not known yet.

    ``released``: weight x sum over layers, without the factor sample_size, on each worker's own
    shares and on the masked probabilities p~ (facts of the example released with arXiv
    2310.00811). Its z-loss weight must be 0. That example also routes padding, which is not
    reproduced.

    A model without experts gets the plain cross-entropy.

    Raises:
        ConfigError: for a negative weight, or a z-loss under ``released``.
    """

    def __init__(
        self,
        task: FairseqTask,
        sentence_avg: bool,
        label_smoothing: float,
        ignore_prefix_size: int = 0,
        report_accuracy: bool = False,
        routing_loss: str = "corrected",
        balance_weight: float = 0.01,
        z_loss_weight: float = 0.0,
    ) -> None:
        super().__init__(task, sentence_avg, label_smoothing, ignore_prefix_size, report_accuracy)
        for flag, weight in (
            ("--balance-weight", balance_weight),
            ("--z-loss-weight", z_loss_weight),
        ):
            if not (weight >= 0 and math.isfinite(weight)):
                raise ConfigError(f"{flag} must be a number of at least 0, not {weight}")
        if routing_loss == "released" and z_loss_weight > 0:
            raise ConfigError("--z-loss-weight must be 0 with --routing-loss released")
        self.routing_loss = routing_loss
        self.balance_weight = balance_weight
        self.z_loss_weight = z_loss_weight

    def forward(
        self, model: nn.Module, sample: Dict[str, Any], reduce: bool = True
    ) -> Tuple[Tensor, int, Dict[str, Any]]:
        """See fairseq; the statistics of each layer are logged beside the losses."""
        loss, sample_size, logging_output = super().forward(model, sample, reduce=reduce)
        packed_by_layer = take_routing_statistics(model)
        if packed_by_layer and reduce:
            packed_LX = torch.stack(list(packed_by_layer.values()))
            if self.routing_loss == "released":
                loss = loss + self._released_loss(RoutingStatistics.unpack(packed_LX))
            else:
                loss = loss + self._corrected_loss(packed_LX, sample_size, model.training)
            logging_output["loss"] = loss.data
        for name, packed in packed_by_layer.items():
            logging_output[PREFIX + name] = packed.detach()
        return loss, sample_size, logging_output

    def _released_loss(self, statistics: RoutingStatistics) -> Tensor:
        return self.balance_weight * statistics.sampling_load_balance_loss.sum()

    def _corrected_loss(self, packed_LX: Tensor, sample_size: int, training: bool) -> Tensor:
        statistics = RoutingStatistics.unpack(packed_LX)
        total_size = packed_LX.new_tensor(float(sample_size))
        if training:
            # This worker's part of the loss of the whole batch: its own p and z, everybody's
            # shares and numbers. The sum over workers, which DDP forms, is the whole.
            total_size = _all_reduce_shares(statistics, total_size)
        balance = statistics.load_balance_loss.mean()
        z_loss = statistics.z_loss.mean()
        return total_size * (self.balance_weight * balance + self.z_loss_weight * z_loss)

    @classmethod
    def reduce_metrics(cls, logging_outputs: List[Dict[str, Any]]) -> None:
        """Log the losses, and the routing by layer and overall.

        ``balance_loss``, ``z_loss``, ``router_entropy`` (nats) are means over batches;
        ``max_expert_share`` and ``min_expert_share`` are the shares of all tokens since the last
        log line (or in the whole validation set). Per layer under ``balance_loss/encoder.0`` etc.
        """
        super().reduce_metrics(logging_outputs)
        packed_by_layer: Dict[str, Tensor] = {}
        for output in logging_outputs:
            for key, packed in output.items():
                if key.startswith(PREFIX):
                    name = key[len(PREFIX) :]
                    before = packed_by_layer.get(name)
                    packed_by_layer[name] = packed if before is None else before + packed
        if not packed_by_layer:
            return
        names = list(packed_by_layer)
        packed_LX = torch.stack([packed_by_layer[name].double().cpu() for name in names])
        statistics = RoutingStatistics.unpack(packed_LX)
        for key, values_L in (
            ("balance_loss", statistics.load_balance_loss),
            ("z_loss", statistics.z_loss),
            ("router_entropy", statistics.mean_entropy),
        ):
            weight = statistics.tokens.mean().item()
            metrics.log_scalar(key, values_L.mean().item(), weight, round=4)
            for name, value, tokens in zip(names, values_L.tolist(), statistics.tokens.tolist()):
                metrics.log_scalar(f"{key}/{name}", value, tokens, round=4)
        _log_shares(names, statistics.expert_tokens.tolist())

    @staticmethod
    def logging_outputs_can_be_summed() -> bool:
        """True: all logging outputs are sums."""
        return True


def take_routing_statistics(model: nn.Module) -> Dict[str, Tensor]:
    """The packed statistics (3 + 3N,) that the layers of the last forward left, by layer.

    Each is handed out once. Layers that did not run (LayerDrop) are missing.
    """
    layers = [module for module in model.modules() if isinstance(module, SwitchLayer)]
    taken = {layer.layer_name: layer.take_routing_statistics() for layer in layers}
    return {name: packed for name, packed in taken.items() if packed is not None}


def _all_reduce_shares(statistics: RoutingStatistics, sample_size: Tensor) -> Tensor:
    """Sum token and expert counts over the workers, in place; returns the summed sample_size."""
    if distributed_utils.get_data_parallel_world_size() == 1:
        return sample_size
    counts_LX = torch.cat([statistics.tokens.unsqueeze(-1), statistics.expert_tokens], dim=-1)
    # Under LayerDrop the workers agree on the layers: fairseq seeds them alike at each update.
    buffer = torch.cat([counts_LX.detach().flatten(), sample_size.reshape(1)]).double()
    distributed_utils.all_reduce(buffer, group=distributed_utils.get_data_parallel_group())
    counts_LX = buffer[:-1].view_as(counts_LX).to(statistics.tokens.dtype)
    statistics.tokens, statistics.expert_tokens = counts_LX[:, 0], counts_LX[:, 1:]
    return buffer[-1].to(sample_size.dtype)


def _log_shares(names: List[str], expert_tokens_LN: List[List[float]]) -> None:
    """Log the largest and smallest share of tokens of an expert.

    Shares of an interval are not means of the shares of its batches, so hidden meters (fairseq
    does not print keys that begin with "_") add up the tokens of each expert.
    """
    for name, tokens_N in zip(names, expert_tokens_LN):
        for expert, tokens in enumerate(tokens_N):
            metrics.log_scalar(_token_meter(name, expert), tokens)
    num_experts = len(expert_tokens_LN[0])
    for label, extreme in (("max_expert_share", max), ("min_expert_share", min)):
        for name in names:
            metrics.log_derived(
                f"{label}/{name}",
                lambda meters, e=extreme, n=name: round(e(_shares(meters, n, num_experts)), 4),
            )
        metrics.log_derived(
            label,
            lambda meters, e=extreme: round(
                e(share for name in names for share in _shares(meters, name, num_experts)), 4
            ),
        )


def _token_meter(name: str, expert: int) -> str:
    return f"_expert_tokens/{name}/{expert}"


def _shares(meters: Dict[str, Any], name: str, num_experts: int) -> List[float]:
    tokens = [meters[_token_meter(name, expert)].sum for expert in range(num_experts)]
    total = max(sum(tokens), 1.0)
    return [count / total for count in tokens]
