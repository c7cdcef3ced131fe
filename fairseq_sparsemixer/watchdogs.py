"""Watchdogs: warnings of a training whose routing goes wrong, in time to do something about it.

They look at what training knows where it writes a line of its log, and so cost nothing between
two lines. What they find goes into the log (``update 400: ...``), from which the report reads it;
the router's gradients, which nothing else measures, also go into that line and TensorBoard.
"""

import functools
import logging
import math
from typing import Any, Dict, Iterable, Iterator, List, Mapping, NamedTuple, Optional, Set, Tuple

import torch
from fairseq.logging import metrics
from fairseq.trainer import Trainer
from torch import nn

from fairseq_sparsemixer.criterions.routing_losses import PREFIX
from fairseq_sparsemixer.errors import UserError
from fairseq_sparsemixer.expert_parallelism import parallel_of
from fairseq_sparsemixer.models.layers import switch_layers
from fairseq_sparsemixer.moe import Router, RoutingStatistics
from fairseq_sparsemixer.moe.parallel import ExpertParallel, is_spread

logger = logging.getLogger(__name__)

LEAST_ENTROPY = 0.01
"""Of log N. Below it a router gives its expert more than 99.5 % of a token's probability."""
LEAST_GRADIENT = 1e-5
"""The norm of a router's gradient over that of the whole model's."""
MOST_GRADIENT = 100
"""Its norm, of a loss per token: that of a whole model is a few once it has begun to learn."""
SCALE_LOSS = 256
"""The loss scale has sunk when it is so many times less than it was: eight halvings."""


class Layer(NamedTuple):
    """What a line of the log tells of one layer.

    Attributes:
        shares: (N,) of the tokens since the last line, by expert.
        entropy: mean of a token's softmax over experts in nats, over the same tokens; None where
            the router learns nothing.
        gradient: norm of that of the router's weight at the last update, as fairseq's ``gnorm``;
            None where it is not known (:func:`router_gradients`).
        part: the same over the norm of the whole model's.
        balancing: what balances its experts, to begin an enumeration.
    """

    shares: List[float]
    entropy: Optional[float]
    gradient: Optional[float]
    part: Optional[float]
    balancing: str = "a larger --balance-weight, --balance-bias-rate 0.001 or "


Symptom = Tuple[str, Optional[int]]
"""A key of :data:`ADVICE`, and the expert where it is one's."""

ADVICE = {
    "share": (
        "{who} got less than {share:g} % of the tokens ({least:g} of an even share): hardly "
        "trained, they are capacity that the model does not have; try {balancing}fewer "
        "--num-experts"
    ),
    "entropy": (
        f"the router's entropy is below {LEAST_ENTROPY:g} of its most (now {{entropy:.2g}} nats): "
        "it is certain of each token's expert and tries no other; try --z-loss-weight 0.001, a "
        "smaller --router-init-scale or a smaller --lr"
    ),
    "vanished": (
        f"the norm of the router's gradient is below {LEAST_GRADIENT:g} of the model's (now "
        "{part:.2g}): it learns nothing; see whether its entropy has collapsed, and try "
        "--z-loss-weight 0.001, a smaller --router-init-scale or another --router"
    ),
    "exploded": (
        f"the norm of the router's gradient is above {MOST_GRADIENT:g} (now {{gradient:.2g}}): it "
        "is thrown about, and with --clip-norm little is left of what the rest would learn; try a "
        "smaller --z-loss-weight, --balance-weight, --router-init-scale or --lr"
    ),
}
"""What it means, and what to try."""


def symptoms(layer: Layer, least_share: float) -> Iterator[Symptom]:
    """What is wrong with a layer at one line of the log.

    Args:
        layer: with two experts or more.
        least_share: of an expert, as a part of an even share 1/N.
    """
    experts = len(layer.shares)
    for expert, share in enumerate(layer.shares):
        if share * experts < least_share:
            yield "share", expert
    if layer.entropy is not None and layer.entropy < LEAST_ENTROPY * math.log(experts):
        yield "entropy", None
    if layer.part is not None and layer.part < LEAST_GRADIENT:
        yield "vanished", None
    if layer.gradient is not None and layer.gradient > MOST_GRADIENT:
        yield "exploded", None


class Watchdogs:
    """What has lasted for how long in one session of training, and what was said of it.

    A session that goes on from a checkpoint begins anew: what was mended in between has time to
    show.

    Args:
        least_share: see :func:`symptoms`.
        patience: updates from the first line of the log with a symptom to a line that still has it
            and all between, until there is a warning. One that lasts on is not told again.
    """

    def __init__(self, least_share: float, patience: int) -> None:
        self.least_share = least_share
        self.patience = patience
        self._since: Dict[Tuple[str, Symptom], int] = {}
        self._told: Set[Tuple[str, Symptom]] = set()
        self._highest_scale = 0.0

    def look(self, updates: int, layers: Mapping[str, Layer]) -> List[str]:
        """The warnings of a line of the log, after ``updates``, of its layers by their names."""
        warnings = []
        for name, layer in layers.items():
            now = list(symptoms(layer, self.least_share)) if len(layer.shares) > 1 else []
            self._forget(name, layer, now)
            due: Dict[Tuple[str, int], List[Optional[int]]] = {}
            for symptom in now:
                key = name, symptom
                since = self._since.setdefault(key, updates)
                if since < updates and updates - since >= self.patience and key not in self._told:
                    self._told.add(key)
                    due.setdefault((symptom[0], since), []).append(symptom[1])
            for (fault, since), experts in due.items():
                warnings.append(f"{name}, since update {since}: {self._say(fault, layer, experts)}")
        return warnings

    def _forget(self, name: str, layer: Layer, now: List[Symptom]) -> None:
        """What a layer had and has no more, as far as is known."""
        unknown = ("vanished", "exploded") if layer.gradient is None else ()
        for key in list(self._since):
            if key[0] == name and key[1] not in now and key[1][0] not in unknown:
                del self._since[key]
                self._told.discard(key)

    def _say(self, fault: str, layer: Layer, experts: List[Optional[int]]) -> str:
        who = f"{'expert' if len(experts) == 1 else 'experts'} {', '.join(map(str, experts))}"
        share = 100 * self.least_share / len(layer.shares)
        return ADVICE[fault].format(
            who=who,
            share=share,
            least=self.least_share,
            **layer._asdict(),
        )

    def look_at_scale(self, scale: float) -> List[str]:
        """The warning of the loss scale of fp16 or amp after an update, if there is one."""
        highest = self._highest_scale = max(scale, self._highest_scale)
        if scale * SCALE_LOSS > highest:
            return []
        self._highest_scale = scale  # told again when it has sunk as much again
        return [
            f"the loss scale has sunk from {highest:g} to {scale:g}: gradients overflow again and "
            "again, and below --min-loss-scale training ends; try a smaller --lr, more "
            "--warmup-updates, --clip-norm 1 or --bf16"
        ]


def apply() -> None:
    """Put the watchdogs behind each update of fairseq's trainer."""
    original = Trainer.train_step

    @functools.wraps(original)
    def train_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        before = self.get_num_updates()
        output = original(self, *args, **kwargs)
        settings = getattr(self.get_criterion(), "routing", None)  # None of another criterion
        if settings is not None and settings.watchdogs != "off":
            if not hasattr(self, "watchdogs"):
                self.watchdogs = Watchdogs(settings.watchdog_share, settings.watchdog_updates)
            _tell(self, settings.watchdogs, _look(self, before))
        return output

    Trainer.train_step = train_step


def _look(trainer: Any, before: int) -> List[str]:
    """The warnings after an update, or after one that was left out as its gradient overflowed."""
    updates = trainer.get_num_updates()
    meters = metrics.get_meters("train_inner") or {}  # what has come together for the next line
    warnings = []
    if "loss_scale" in meters:
        warnings += trainer.watchdogs.look_at_scale(meters["loss_scale"].smoothed_value)
    if updates > before and updates % trainer.cfg.common.log_interval == 0:
        warnings += trainer.watchdogs.look(updates, _layers(trainer.model, meters))
    return warnings


def _layers(model: nn.Module, meters: Mapping[str, Any]) -> Dict[str, Layer]:
    """Of each layer that has run since the last line."""
    parts = router_gradients(model)
    whole = meters["gnorm"].val if "gnorm" in meters else None
    gradients = {} if whole is None else {name: float(whole) * parts[name] for name in parts}
    for name, gradient in gradients.items():
        metrics.log_scalar(f"router_gradient/{name}", gradient, priority=450, round=6)
    layers = {}
    for name, layer in switch_layers(model).items():
        meter = meters.get(f"_{PREFIX}{name}")
        if meter is not None and meter.count:
            statistics = RoutingStatistics.unpack(meter.sum)
            if statistics.tokens:
                router = layer.moe.router
                learns = router.weight is not None
                entropy = statistics.mean_entropy.item() if learns else None
                shares = statistics.expert_share.tolist()
                known = gradients.get(name), parts.get(name), _balancing(router)
                layers[name] = Layer(shares, entropy, *known)
    return layers


def _balancing(router: Router) -> str:
    """:attr:`Layer.balancing` of a layer with this router."""
    cures = ["a larger --balance-weight"] * router.needs_balance
    cures += ["--balance-bias-rate 0.001"] * router.takes_balance_bias
    return f"{', '.join(cures)} or " if cures else ""


def router_gradients(model: nn.Module) -> Dict[str, float]:
    """The norm of the gradient of a router's weight over that of the whole model's, by its layer.

    A ratio, in which neither the loss scale nor clipping counts, of the last update. Not known, and
    left out, where no weight is trained, where parameters are sharded, and where LayerDrop left out
    the layer, whose experts have no gradient then either.
    """
    learning = {
        name: layer.moe
        for name, layer in switch_layers(model).items()
        if _is_trained_whole(layer.moe.router.weight)
    }
    if not learning:
        return {}
    parallel = parallel_of(model)
    norms = [_norm(model.parameters(), parallel)]
    for moe in learning.values():
        norms += [_norm(each, parallel) for each in ([moe.router.weight], moe.experts.parameters())]
    whole, *parts = torch.stack(norms).tolist()  # one wait for a GPU
    found = zip(learning, parts[::2], parts[1::2])
    return {name: router / whole for name, router, experts in found if experts > 0}


def _is_trained_whole(weight: Optional[torch.Tensor]) -> bool:
    """Not where fairscale keeps a view of it, or a shard."""
    is_own = isinstance(weight, nn.Parameter) and weight.requires_grad
    return is_own and not getattr(weight, "_is_sharded", False)


def _norm(parameters: Iterable[Any], parallel: Optional[ExpertParallel]) -> torch.Tensor:
    """() float32: of the gradients of all of them together, on whichever worker they are."""
    parameters = list(parameters)
    gradients = {p: p.grad.detach() for p in parameters if p.grad is not None}
    norms = [grad.float().norm() for p, grad in gradients.items() if not is_spread(p)]
    norm = torch.stack(norms or [parameters[0].new_zeros((), dtype=torch.float32)]).norm()
    if parallel is None:
        return norm
    return parallel.joined_norm(norm, (grad for p, grad in gradients.items() if is_spread(p)))


def _tell(trainer: Any, mode: str, warnings: List[str]) -> None:
    """Log them once, though several workers train; all of them have found the same."""
    for warning in warnings:
        if trainer.is_data_parallel_master:
            logger.warning("update %d: %s", trainer.get_num_updates(), warning)
    if warnings and mode == "stop":
        raise UserError(
            f"--watchdogs stop: {warnings[0]} (with --watchdogs warn, training goes on from its "
            "last checkpoint)"
        )
