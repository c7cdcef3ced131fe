"""Label-smoothed cross-entropy plus the routing losses of a Switch Transformer."""

from dataclasses import dataclass, field
from typing import Any, Callable, Dict, List, Optional, Tuple

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

from fairseq_sparsemixer.models.config import LARGEST_FACTOR, ConfigError
from fairseq_sparsemixer.models.layers import Call, routing_statistics
from fairseq_sparsemixer.moe import RoutingStatistics

RoutingLoss: Any = ChoiceEnum(["corrected", "released"])
BalanceLoss: Any = ChoiceEnum(["switch", "importance"])
BalanceScope: Any = ChoiceEnum(["all-workers", "worker"])
WatchdogMode: Any = ChoiceEnum(["off", "warn", "stop"])

Meters = Dict[str, Any]

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
    balance_weight: float = field(
        default=0.01, metadata={"help": "weight of the balance loss, 0 for none"}
    )
    balance_loss: BalanceLoss = field(
        default="switch",
        metadata={
            "help": "switch: N sum F_i P_i; importance: the importance and load losses of noisy "
            "top-k (Shazeer et al. 2017)"
        },
    )
    balance_scope: BalanceScope = field(
        default="all-workers",
        metadata={"help": "whose tokens are to be balanced: all workers' together, or each's own"},
    )
    z_loss_weight: float = field(
        default=0.0, metadata={"help": "weight of the router's z-loss (ST-MoE uses 0.001)"}
    )
    watchdogs: WatchdogMode = field(
        default="warn",
        metadata={
            "help": "when experts starve, a router's entropy collapses, its gradient vanishes or "
            "explodes, or the loss scale sinks: warn in the log, stop training too, or nothing"
        },
    )
    watchdog_share: float = field(
        default=0.02,
        metadata={"help": "an expert starves below this part of an even share of the tokens"},
    )
    watchdog_updates: int = field(
        default=500, metadata={"help": "how long it has to last (not of the loss scale)"}
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

    The balance loss is ``switch``, N sum F_i P_i, or ``importance``, the squared coefficients of
    variation of the summed gates and of the smooth load (arXiv 1701.06538). ``balance_scope``
    ``worker`` takes each worker's own sums.

    A model without experts gets the plain cross-entropy.

    Raises:
        ConfigError: for a negative weight, or a z-loss or another balance loss under ``released``.
    """

    uses_routing_statistics = True
    """Without this, training warns that nothing balances the experts."""

    def __init__(
        self,
        task: FairseqTask,
        sentence_avg: bool,
        label_smoothing: float,
        ignore_prefix_size: int = 0,
        report_accuracy: bool = False,
        routing_loss: str = "corrected",
        balance_weight: float = 0.01,
        balance_loss: str = "switch",
        balance_scope: str = "all-workers",
        z_loss_weight: float = 0.0,
        watchdogs: str = "warn",
        watchdog_share: float = 0.02,
        watchdog_updates: int = 500,
    ) -> None:
        super().__init__(task, sentence_avg, label_smoothing, ignore_prefix_size, report_accuracy)
        for flag, weight in (
            ("--balance-weight", balance_weight),
            ("--z-loss-weight", z_loss_weight),
        ):
            if not 0 <= weight < LARGEST_FACTOR:
                raise ConfigError(
                    f"{flag} must be a number of at least 0 and below {LARGEST_FACTOR}, "
                    f"not {weight}"
                )
        if routing_loss == "released" and z_loss_weight > 0:
            raise ConfigError("--z-loss-weight must be 0 with --routing-loss released")
        if routing_loss == "released" and balance_loss != "switch":
            raise ConfigError("--balance-loss must be switch with --routing-loss released")
        self.routing_loss = routing_loss
        self.balance_loss = balance_loss
        self.balance_scope = balance_scope
        self.balance_weight = balance_weight
        self.z_loss_weight = z_loss_weight
        # Read by :mod:`fairseq_sparsemixer.watchdogs`.
        self.watchdogs = watchdogs
        self.watchdog_share = watchdog_share
        self.watchdog_updates = watchdog_updates

    def forward(
        self, model: nn.Module, sample: Dict[str, Any], reduce: bool = True
    ) -> Tuple[Tensor, int, Dict[str, Any]]:
        """See fairseq; the statistics of each layer are logged beside the losses."""
        seen: Any = _ModelCall(model)
        loss, sample_size, logging_output = super().forward(seen, sample, reduce=reduce)
        packed_by_layer = routing_statistics(model, seen.output)
        if packed_by_layer and reduce:
            packed_LX = torch.stack(list(packed_by_layer.values()))
            counted = not sample.get("is_dummy", False)  # see compat.py
            loss = loss + self._routing_loss(packed_LX, sample_size, model.training, counted)
            logging_output["loss"] = loss.data
        for name, packed in packed_by_layer.items():
            logging_output[PREFIX + name] = packed.detach()
        return loss, sample_size, logging_output

    def _routing_loss(
        self, packed_LX: Tensor, sample_size: int, training: bool, counted: bool
    ) -> Tensor:
        statistics = RoutingStatistics.unpack(packed_LX)
        if self.routing_loss == "released":
            return self.balance_weight * statistics.sampling_load_balance_loss.sum()
        total_size = packed_LX.new_full((), float(sample_size))
        workers = 1
        if training and self.balance_scope == "all-workers":
            workers = distributed_utils.get_data_parallel_world_size()
            # This worker's part of the loss of the whole batch: its own p and z, everybody's
            # shares and numbers. The sum over workers, which DDP forms, is the whole.
            total_size = _all_reduce_shares(statistics, total_size, counted)
        layers = statistics.tokens.gt(0).sum().clamp_min(1)
        if self.balance_loss == "importance":
            # Of all workers' sums, and so the same on each: in value it counts once altogether.
            whole = statistics.importance_loss.sum() / layers
            balance = whole - whole.detach() + whole.detach() / workers
        else:
            balance = statistics.load_balance_loss.sum() / layers
        z_loss = statistics.z_loss.sum() / layers
        return total_size * (self.balance_weight * balance + self.z_loss_weight * z_loss)

    @classmethod
    def reduce_metrics(cls, logging_outputs: List[Dict[str, Any]]) -> None:
        """Log the losses, and the routing by layer (``balance_loss/encoder.0``) and overall.

        ``balance_loss``, ``z_loss`` and ``router_entropy`` (nats), overall the mean over layers;
        ``max_expert_share`` and ``min_expert_share``, overall the extremes over layers. All are
        those of all tokens since the last log line, or of the whole validation set, whatever the
        batches and workers they came in.
        """
        super().reduce_metrics(logging_outputs)
        for output in logging_outputs:
            for key, packed in output.items():
                if key.startswith(PREFIX):
                    # Only the sum of this meter is read; fairseq does not print "_..." keys.
                    metrics.log_scalar(f"_{key}", packed.double().cpu())
                    _log_derived(key[len(PREFIX) :])

    @staticmethod
    def logging_outputs_can_be_summed() -> bool:
        """True: all logging outputs are sums."""
        return True


class _ModelCall(Call):
    """A model whose output fairseq's criterion keeps to itself."""

    output: Any

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.output = self._module(*args, **kwargs)
        return self.output


def _all_reduce_shares(statistics: RoutingStatistics, sample_size: Tensor, counted: bool) -> Tensor:
    """Sum token counts, gates and loads over the workers, in place; returns the summed size.

    A worker whose batch is not ``counted`` takes part with zeros.
    """
    if distributed_utils.get_data_parallel_world_size() == 1:
        return sample_size
    counts_LX = torch.cat([statistics.tokens.unsqueeze(-1), statistics.expert_tokens], dim=-1)
    smooth_LX = torch.cat([statistics.sampling_probs, statistics.load], dim=-1)
    own_LX = torch.cat([counts_LX, smooth_LX], dim=-1).detach()
    buffer = torch.cat([own_LX.flatten(), sample_size.reshape(1)]).double() * counted
    distributed_utils.all_reduce(buffer, group=distributed_utils.get_data_parallel_group())
    total_LX = buffer[:-1].view_as(own_LX).to(own_LX.dtype)
    counts_LX, smooth_total_LX = total_LX.split([counts_LX.shape[-1], smooth_LX.shape[-1]], dim=-1)
    statistics.tokens, statistics.expert_tokens = counts_LX[:, 0], counts_LX[:, 1:]
    # Of all workers in value, of this one in gradient.
    smooth_LX = smooth_total_LX + smooth_LX - smooth_LX.detach()
    statistics.sampling_probs, statistics.load = smooth_LX.chunk(2, dim=-1)
    return buffer[-1].to(sample_size.dtype)


def _mean(values: List[float]) -> float:
    return sum(values) / len(values)


METRICS: Dict[str, Tuple[Callable[[RoutingStatistics], Tensor], Callable[[List[float]], float]]] = {
    "balance_loss": (lambda statistics: statistics.load_balance_loss, _mean),
    "z_loss": (lambda statistics: statistics.z_loss, _mean),
    "router_entropy": (lambda statistics: statistics.mean_entropy, _mean),
    "max_expert_share": (lambda statistics: statistics.expert_share.max(), max),
    "min_expert_share": (lambda statistics: statistics.expert_share.min(), min),
}
"""What is logged: a function of one layer's statistics, and how layers are summed up."""


def _log_derived(layer_name: str) -> None:
    """Have fairseq compute the metrics of one layer, and those of all, when it writes a line."""
    for metric, (of_layer, over_layers) in METRICS.items():

        def one(meters: Meters, of_layer: Any = of_layer) -> Optional[float]:
            return _evaluate(meters[f"_{PREFIX}{layer_name}"], of_layer)

        def overall(
            meters: Meters, of_layer: Any = of_layer, over_layers: Any = over_layers
        ) -> Optional[float]:
            keys = [key for key in meters if key.startswith(f"_{PREFIX}")]
            values = [_evaluate(meters[key], of_layer) for key in keys]
            ran = [value for value in values if value is not None]
            return round(over_layers(ran), 4) if ran else None

        metrics.log_derived(metric, overall)
        metrics.log_derived(f"{metric}/{layer_name}", one)


def _evaluate(meter: Any, of_layer: Callable[[RoutingStatistics], Tensor]) -> Optional[float]:
    """One metric of one layer, None where it has not run since the last line."""
    if not meter.count:
        return None
    statistics = RoutingStatistics.unpack(meter.sum)
    return round(of_layer(statistics).item(), 4) if statistics.tokens else None
