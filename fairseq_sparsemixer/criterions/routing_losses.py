"""The routing losses that a criterion of fairseq gets for a model with experts, and their logs."""

import math
from dataclasses import dataclass, field
from typing import Any, Callable, Dict, List, Optional, Tuple

import torch
from fairseq.criterions import FairseqCriterion
from fairseq.dataclass import ChoiceEnum, FairseqDataclass
from fairseq.distributed import utils as distributed_utils
from fairseq.logging import metrics
from fairseq.tasks import FairseqTask
from torch import Tensor, nn

from fairseq_sparsemixer.models.config import LARGEST_FACTOR, ConfigError
from fairseq_sparsemixer.models.layers import Recorded, routing_statistics
from fairseq_sparsemixer.moe import RoutingStatistics

RoutingLoss: Any = ChoiceEnum(["corrected", "released"])
BalanceLoss: Any = ChoiceEnum(["switch", "importance"])
BalanceScope: Any = ChoiceEnum(["all-workers", "worker"])
WatchdogMode: Any = ChoiceEnum(["off", "warn", "stop"])

Meters = Dict[str, Any]

WRITES, ENCODES, REPLACES = "writes text", "is an encoder alone", "replaces words"
CRITERIA = {
    WRITES: "label_smoothed_cross_entropy_with_routing",
    ENCODES: "masked_lm_with_routing or sentence_prediction_with_routing",
    REPLACES: "electra_with_routing",
}
"""By what a model does."""

PREFIX = "routing_statistics/"
"""Logging outputs of this prefix hold the packed sums of one layer."""


@dataclass
class RoutingLossesConfig(FairseqDataclass):
    """Settings of :class:`WithRoutingLosses`."""

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


def refuse_weight(flag: str, weight: float) -> None:
    """Raise a ConfigError for a weight of a loss that cannot be."""
    if not 0 <= weight < LARGEST_FACTOR:
        raise ConfigError(
            f"{flag} must be a number of at least 0 and below {LARGEST_FACTOR}, not {weight}"
        )


class WithRoutingLosses(FairseqCriterion):
    """The base, beside one of fairseq's, of a criterion that adds balance loss and z-loss.

    fairseq sums its loss over tokens, masked tokens or sentences and divides the gradient by
    their number, ``sample_size``, so the routing losses, which are means, are multiplied by it.

    ``corrected`` (the default): weight x sample_size x mean over layers. In training the shares
    F_i are those of the whole batch over all workers, so that the gradient is the one that a
    single process would get from that batch. Under ``--update-freq`` each micro-batch has its own
    F_i: those of the micro-batches to come are not known yet.

    ``released``: weight x sum over layers, without the factor sample_size, on each worker's own
    shares and on the masked probabilities p~ (facts of the example released with arXiv
    2310.00811). Its z-loss weight must be 0. That example also routes padding, which is not
    reproduced.

    The balance loss is ``switch``, N sum F_i P_i, or ``importance``, the squared coefficients of
    variation of importance and smooth load (:attr:`RoutingStatistics.importance_loss`).
    ``balance_scope`` ``worker`` takes each worker's own sums.

    A model without experts gets the plain loss. Either way that is logged as ``nll_loss``, and the
    whole as ``loss``.

    Raises:
        ConfigError: for a negative weight, a z-loss or another balance loss under ``released``, or
            a model or task of another kind.
    """

    uses_routing_statistics = True
    """Without this, training warns that nothing balances the experts."""

    routing: Any = RoutingLossesConfig()
    model_kind = WRITES
    """What it is for, of :data:`CRITERIA`."""

    @classmethod
    def build_criterion(cls, cfg: Any, task: FairseqTask) -> "WithRoutingLosses":
        """See fairseq."""
        criterion = super().build_criterion(cfg, task)
        criterion.configure(cfg)
        return criterion

    def configure(self, cfg: Any) -> None:
        """Take the settings of the routing losses, of :class:`RoutingLossesConfig`."""
        for flag, weight in (
            ("--balance-weight", cfg.balance_weight),
            ("--z-loss-weight", cfg.z_loss_weight),
        ):
            refuse_weight(flag, weight)
        if cfg.routing_loss == "released" and cfg.z_loss_weight > 0:
            raise ConfigError("--z-loss-weight must be 0 with --routing-loss released")
        if cfg.routing_loss == "released" and cfg.balance_loss != "switch":
            raise ConfigError("--balance-loss must be switch with --routing-loss released")
        self.routing = cfg

    def _check_model(self, model: nn.Module) -> None:
        kind = ENCODES if hasattr(getattr(model, "encoder", None), "lm_head") else WRITES
        kind = REPLACES if hasattr(model, "generator") else kind
        if kind != self.model_kind:
            raise ConfigError(
                f"the --criterion is for a model that {self.model_kind}, and --arch {kind}: choose "
                f"{CRITERIA[kind]}, or another --arch"
            )

    def forward(
        self, model: nn.Module, sample: Dict[str, Any], reduce: bool = True
    ) -> Tuple[Tensor, Any, Dict[str, Any]]:
        """See fairseq; the statistics of each layer are logged beside the losses."""
        self._check_model(model)
        seen: Any = Recorded(model)
        loss, sample_size, logging_output = super().forward(seen, sample, reduce=reduce)
        logging_output.setdefault("nll_loss", loss.data)
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
        self, packed_LX: Tensor, sample_size: Any, training: bool, counted: bool
    ) -> Tensor:
        routing, statistics = self.routing, RoutingStatistics.unpack(packed_LX)
        if routing.routing_loss == "released":
            return routing.balance_weight * statistics.sampling_load_balance_loss.sum()
        total_size = torch.as_tensor(sample_size).to(packed_LX)
        workers = 1
        if training and routing.balance_scope == "all-workers":
            workers = distributed_utils.get_data_parallel_world_size()
            # This worker's part of the loss of the whole batch: its own p and z, everybody's
            # shares and numbers. The sum over workers, which DDP forms, is the whole.
            total_size = _all_reduce_shares(statistics, total_size, counted)
        layers = statistics.tokens.gt(0).sum().clamp_min(1)
        if routing.balance_loss == "importance":
            # Of all workers' sums, and so the same on each: in value it counts once altogether.
            whole = statistics.importance_loss.sum() / layers
            balance = whole - whole.detach() + whole.detach() / workers
        else:
            balance = statistics.load_balance_loss.sum() / layers
        z_loss = statistics.z_loss.sum() / layers
        return total_size * (routing.balance_weight * balance + routing.z_loss_weight * z_loss)

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


class WithOneLoss(WithRoutingLosses):
    """The base beside a criterion of fairseq's encoders, which logs one loss."""

    model_kind = ENCODES
    name: str
    """As it is registered."""
    task_name: str
    """fairseq's, for which it is."""
    labels: bool
    """Whether that task has labels of sentences."""

    @classmethod
    def build_criterion(cls, cfg: Any, task: FairseqTask) -> WithRoutingLosses:
        """See fairseq."""
        if hasattr(task, "label_dictionary") != cls.labels:
            raise ConfigError(
                f"--criterion {cls.name} needs --task {cls.task_name}, or another --criterion"
            )
        return super().build_criterion(cfg, task)

    @classmethod
    def reduce_metrics(cls, logging_outputs: List[Dict[str, Any]]) -> None:
        """Log, besides, ``nll_loss``: the loss without the routing losses, in base 2, by masked
        token or sentence."""
        # Of ntokens fairseq's would log as nll_loss the whole loss by token of the input.
        super().reduce_metrics(
            [{**output, "ntokens": output["sample_size"]} for output in logging_outputs]
        )
        size = sum(output["sample_size"] for output in logging_outputs)
        nll_loss = sum(output["nll_loss"] for output in logging_outputs)
        metrics.log_scalar("nll_loss", nll_loss / size / math.log(2), size, round=3)


def sum_over_workers(own: Tensor, counted: bool) -> Tensor:
    """The sum of the workers' values in float64, without gradient.

    A worker whose batch is not ``counted`` takes part with zeros.
    """
    total = own.detach().double() * counted
    if distributed_utils.get_data_parallel_world_size() > 1:
        distributed_utils.all_reduce(total, group=distributed_utils.get_data_parallel_group())
    return total


def _all_reduce_shares(statistics: RoutingStatistics, sample_size: Tensor, counted: bool) -> Tensor:
    """Sum token counts, gates and loads over the workers, in place; returns the summed size."""
    if distributed_utils.get_data_parallel_world_size() == 1:
        return sample_size
    counts_LX = torch.cat([statistics.tokens.unsqueeze(-1), statistics.expert_tokens], dim=-1)
    smooth_LX = torch.cat([statistics.sampling_probs, statistics.load], dim=-1)
    own_LX = torch.cat([counts_LX, smooth_LX], dim=-1)
    buffer = sum_over_workers(torch.cat([own_LX.flatten(), sample_size.reshape(1)]), counted)
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
