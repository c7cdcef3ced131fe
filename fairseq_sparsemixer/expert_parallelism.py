"""Lets fairseq train experts that are spread over workers (``--expert-parallel-size``).

What differs from training in which every worker holds everything: gradients of experts are summed
over the workers that hold the same ones; their norm is put together over all; one file, the
ordinary one, holds all of them. fairseq marks such parameters itself (:func:`.parallel.is_spread`),
and then neither averages their gradients nor counts them in the norm, so that clipping, and the
test of fp16 for an overflow, would differ between workers.
"""

import functools
import logging
from typing import Any, Dict, Iterator, List, Optional, Tuple

import torch
from fairseq import checkpoint_utils
from fairseq.distributed.legacy_distributed_data_parallel import LegacyDistributedDataParallel
from fairseq.models.ema.ema import EMA
from fairseq.optim import FairseqOptimizer
from fairseq.trainer import Trainer
from torch import Tensor, nn

from fairseq_sparsemixer.models.config import ConfigError, check_workers
from fairseq_sparsemixer.moe.feed_forward import MoEFeedForward, moe_layers
from fairseq_sparsemixer.moe.parallel import ExpertParallel, is_spread

logger = logging.getLogger(__name__)


def apply() -> None:
    """Put this in the place of what fairseq does."""
    _refuse_what_would_be_wrong()
    _average_gradients()
    _sum_no_empty_buffer()
    _agree_on_norm()
    _end_without_memory()
    _save_one_file()
    _load_own_part()


def parallel_of(model: nn.Module) -> Optional[ExpertParallel]:
    """Where the experts of a model are, wrapped or not; None where all lie here."""
    layer = next(moe_layers(model), None)
    return None if layer is None else layer.experts.parallel


# Settings


def _refuse_what_would_be_wrong() -> None:
    original = Trainer.__init__

    @functools.wraps(original)
    def __init__(self: Any, cfg: Any, task: Any, *args: Any, **kwargs: Any) -> None:
        size = getattr(cfg.model, "expert_parallel_size", None) or 1
        if size > 1:
            check_workers(size, cfg.distributed_training.distributed_world_size)
            _check_settings(cfg, task)
        original(self, cfg, task, *args, **kwargs)

    Trainer.__init__ = __init__


OPTIMIZERS = ("adam", "fused_adam", "sgd", "nag", "adagrad", "adadelta", "adamax")
"""Those that treat each element of a parameter alike, whatever lies beside it."""
_BACKENDS = ("pytorch_ddp", "c10d", "legacy_ddp", "no_c10d")


def _check_settings(cfg: Any, task: Any) -> None:
    common, distributed = cfg.common, cfg.distributed_training
    flat = common.fp16 and not (common.memory_efficient_fp16 or common.fp16_no_flatten_grads)
    for flag, is_set, cure in (
        (
            f"--ddp-backend {distributed.ddp_backend}",
            distributed.ddp_backend not in _BACKENDS,
            "choose legacy_ddp or pytorch_ddp",
        ),
        ("--use-bmuf", cfg.optimization.use_bmuf, "leave it out"),
        ("--zero-sharding", distributed.zero_sharding != "none", "leave it out"),
        ("--amp", common.amp, "choose --bf16 or --fp16"),
        ("--fp16 with gradients in one piece", flat, "add --fp16-no-flatten-grads"),
        # These look at all experts of a layer together, or are several optimisers.
        (
            f"--optimizer {cfg.optimizer._name}",
            cfg.optimizer._name not in OPTIMIZERS,
            f"choose from {', '.join(OPTIMIZERS)}",
        ),
        # Translating takes each worker its own number of steps.
        ("--eval-bleu", getattr(task.cfg, "eval_bleu", False), "translate with the checkpoints"),
    ):
        if is_set:
            raise ConfigError(f"--expert-parallel-size cannot be had with {flag}: {cure}")


# Gradients


def _average_gradients() -> None:
    """Behind the wrapper's own reduction, which leaves experts alone."""
    original = FairseqOptimizer.all_reduce_grads

    @functools.wraps(original)
    def all_reduce_grads(self: Any, module: nn.Module) -> None:
        original(self, module)
        average_gradients(module)

    FairseqOptimizer.all_reduce_grads = all_reduce_grads


def average_gradients(module: nn.Module) -> None:
    """Of the experts of a model that are spread (:meth:`.ExpertParallel.average_gradients`)."""
    for layer in moe_layers(module):
        if layer.experts.parallel is not None:
            layer.experts.parallel.average_gradients(layer.experts.parameters())


def _sum_no_empty_buffer() -> None:
    """Let ``legacy_ddp`` send what is shared, and no room for experts behind it.

    It sums its buffer as a whole, of the size of all parameters of the worker.
    """
    original = LegacyDistributedDataParallel.__init__

    @functools.wraps(original)
    def __init__(self: Any, module: nn.Module, *args: Any, **kwargs: Any) -> None:
        original(self, module, *args, **kwargs)
        shared = sum(p.numel() for p in module.parameters() if not is_spread(p))
        self.buffer_size = min(self.buffer_size, shared)

    LegacyDistributedDataParallel.__init__ = __init__


def _agree_on_norm() -> None:
    """Count each expert once, and come to the same number on all workers.

    Clipping is then alike, and an overflow in one worker's expert leaves out the update everywhere.
    """
    original = Trainer.clip_grad_norm

    @functools.wraps(original)
    def clip_grad_norm(self: Any, clip_norm: float) -> Tensor:
        parallel = parallel_of(self.model)
        if parallel is None:
            return original(self, clip_norm)

        def with_experts(norm: Tensor) -> Tensor:
            return parallel.joined_norm(norm, [p.grad for _, p in _spread(self.optimizer)])

        return self.optimizer.clip_grad_norm(clip_norm, aggregate_norm_fn=with_experts)

    Trainer.clip_grad_norm = clip_grad_norm


def _spread(optimizer: Any) -> Iterator[Tuple[int, nn.Parameter]]:
    """Those of an optimiser that are spread (its copies, under fp16), with their numbers in it."""
    groups = optimizer.optimizer.param_groups
    parameters = (parameter for group in groups for parameter in group["params"])
    return ((i, value) for i, value in enumerate(parameters) if is_spread(value))


def _end_without_memory() -> None:
    """End a worker whose memory is full, where fairseq would leave its batch out.

    The others wait for its tokens.
    """
    for name in ("train_step", "valid_step"):
        original = getattr(Trainer, name)

        @functools.wraps(original)
        def step(self: Any, samples: Any, raise_oom: bool = False, original: Any = original) -> Any:
            return original(self, samples, raise_oom or parallel_of(self.model) is not None)

        setattr(Trainer, name, step)


# Checkpoints


def _save_one_file() -> None:
    """Let the first worker write all experts, with what the optimiser knows of each.

    Gathered by all workers before each saving, expert by expert, into the first one's memory,
    which holds all experts, their moments and averages once. What fairseq writes when a worker
    fails is left out: the others may have failed elsewhere, and would not take part.
    """
    save, save_state, build_state = (
        checkpoint_utils.save_checkpoint,
        Trainer.save_checkpoint,
        Trainer.state_dict,
    )

    @functools.wraps(save)
    def save_checkpoint(cfg: Any, trainer: Any, *args: Any, **kwargs: Any) -> Any:
        parallel = parallel_of(trainer.model)
        if parallel is None or cfg.no_save:
            return save(cfg, trainer, *args, **kwargs)
        trainer.consolidate_optimizer()  # which fairseq asks for before it asks for the state
        trainer.whole_state = _gathered(trainer, build_state(trainer), parallel)
        try:
            return save(cfg, trainer, *args, **kwargs)
        finally:
            trainer.whole_state = None

    @functools.wraps(save_state)
    def save_whole_state(self: Any, filename: str, extra_state: Dict[str, Any]) -> Any:
        apart = parallel_of(self.model) is not None
        if apart and getattr(self, "whole_state", None) is None:
            if self.is_data_parallel_master:
                logger.warning("%s is not written: it would lack other workers' experts", filename)
            return None
        return save_state(self, filename, extra_state)

    @functools.wraps(build_state)
    def state_dict(self: Any) -> Dict[str, Any]:
        return getattr(self, "whole_state", None) or build_state(self)

    checkpoint_utils.save_checkpoint = save_checkpoint
    Trainer.save_checkpoint, Trainer.state_dict = save_whole_state, state_dict


def _gathered(trainer: Any, state: Dict[str, Any], parallel: ExpertParallel) -> Dict[str, Any]:
    """``state`` of this worker, on the first worker with the experts of all."""
    names = _names(trainer.get_model())

    def whole(values: Dict[str, Tensor]) -> Dict[str, Any]:
        return {**values, **{name: parallel.gather(values[name]) for name in names}}

    state["model"] = whole(state["model"])
    for key in ("ema", "ema_fp32_params"):
        if key in state["extra_state"]:
            state["extra_state"][key] = whole(state["extra_state"][key])
    optimizer_state = state.get("last_optimizer_state")
    if optimizer_state is not None:
        of_each = dict(optimizer_state["state"])
        for i, parameter in _spread(trainer.optimizer):
            of_each[i] = {
                key: parallel.gather(value) if _has_shape(value, parameter.shape) else value
                for key, value in of_each.get(i, {}).items()
            }
        state["last_optimizer_state"] = {**optimizer_state, "state": of_each}
    return state


def _names(model: nn.Module) -> List[str]:
    """Of the parameters that are spread; a copy of a model lacks their mark."""
    return [
        f"{prefix}.experts.{name}"
        for prefix, layer in model.named_modules()
        if isinstance(layer, MoEFeedForward)
        for name, _ in layer.experts.named_parameters()
    ]


def _has_shape(value: Any, shape: torch.Size) -> bool:
    return isinstance(value, Tensor) and value.shape == shape


def _load_own_part() -> None:
    """Let each worker take its own from a checkpoint: what the model does not load by itself."""
    build, average = Trainer._build_optimizer, EMA.build_fp32_params

    @functools.wraps(build)
    def _build_optimizer(self: Any) -> None:
        build(self)
        parallel, optimizer = parallel_of(self.model), self._optimizer
        if parallel is not None:
            load = optimizer.load_state_dict
            optimizer.load_state_dict = lambda state, overrides=None: load(
                _own_state(state, optimizer, parallel), overrides
            )

    @functools.wraps(average)
    def build_fp32_params(self: Any, state_dict: Optional[Dict[str, Tensor]] = None) -> None:
        parallel = parallel_of(self.model)
        if parallel is not None and state_dict is not None:
            own = {name: parallel.own(state_dict[name]) for name in _names(self.model)}
            state_dict = {**state_dict, **own}
        average(self, state_dict)

    Trainer._build_optimizer, EMA.build_fp32_params = _build_optimizer, build_fp32_params


def _own_state(state: Dict[str, Any], optimizer: Any, parallel: ExpertParallel) -> Dict[str, Any]:
    """This worker's part of what an optimiser wrote."""
    ids = [i for group in state["param_groups"] for i in group["params"]]
    of_each = dict(state["state"])
    for i, parameter in _spread(optimizer):
        whole = torch.Size([parallel.size * len(parameter), *parameter.shape[1:]])
        of_each[ids[i]] = {
            key: parallel.own(value).clone() if _has_shape(value, whole) else value
            for key, value in of_each.get(ids[i], {}).items()
        }
    return {**state, "state": of_each}
