"""The only file that knows how fairseq and torch versions differ.

It applies itself when it is imported.
"""

import argparse
import functools
import logging
import os
import sys
from types import TracebackType
from typing import Any, Optional, Type

import torch
from fairseq.data import data_utils
from fairseq.dataclass import utils as dataclass_utils
from fairseq.distributed import utils as distributed_utils
from fairseq.tasks import FairseqTask
from omegaconf.errors import ConfigKeyError

from fairseq_sparsemixer import restarts
from fairseq_sparsemixer.errors import UserError
from fairseq_sparsemixer.models.config import ConfigError
from fairseq_sparsemixer.moe.feed_forward import moe_layers

logger = logging.getLogger(__name__)

MINIMUM_TORCH = (1, 13)


def apply() -> None:
    """Cure what can be cured, and name what cannot.

    Raises:
        UserError: for an environment in which training could not work.
    """
    _check_environment()
    _allow_checkpoint_classes()
    _warn_of_dropped_sentences()
    _mark_dummy_batches()
    _end_updates()
    _report_unknown_keys()
    restarts.apply()
    _print_user_errors_alone()


def _check_environment() -> None:
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < MINIMUM_TORCH:
        raise UserError(
            f"torch {torch.__version__} is too old: install torch >= "
            f"{'.'.join(map(str, MINIMUM_TORCH))}"
        )
    if "TORCHELASTIC_RUN_ID" in os.environ and not torch.cuda.is_available():
        raise UserError(
            "fairseq cannot be started by torchrun on a machine without a GPU: start each process "
            "yourself with --distributed-world-size, --distributed-rank, "
            "--distributed-init-method tcp://HOST:PORT, --distributed-no-spawn, "
            "--distributed-backend gloo, --ddp-backend legacy_ddp and --cpu"
        )


def _allow_checkpoint_classes() -> None:
    """Let torch >= 2.6 load fairseq's checkpoints without giving up ``weights_only``.

    Checkpoints that ``fairseq-train`` wrote hold the flags as an ``argparse.Namespace``, a plain
    record; nothing else is let in.
    """
    if hasattr(torch.serialization, "add_safe_globals"):
        torch.serialization.add_safe_globals([argparse.Namespace])


def _warn_of_dropped_sentences() -> None:
    """Say so when fairseq leaves out sentences.

    fairseq's last versions drop the last batch of a data set, silently, unless its size is a
    multiple of --required-batch-size-multiple (8 by default).
    """
    original = data_utils.batch_by_size

    @functools.wraps(original)
    def batch_by_size(indices: Any, *args: Any, **kwargs: Any) -> Any:
        batches = original(indices, *args, **kwargs)
        dropped = len(indices) - sum(len(batch) for batch in batches)
        if dropped > 0:
            logger.warning(
                "fairseq leaves out %d of %d sentences; pass --required-batch-size-multiple 1 "
                "when you validate or generate",
                dropped,
                len(indices),
            )
        return batches

    data_utils.batch_by_size = batch_by_size


def _mark_dummy_batches() -> None:
    """Tell criterion and experts which batches do not count.

    At the end of an epoch fairseq gives a worker without a batch an old one, whose gradient and
    sample size it sets to 0 only after the criterion has run.
    """
    original = FairseqTask.train_step

    @functools.wraps(original)
    def train_step(
        self: Any,
        sample: Any,
        model: Any,
        criterion: Any,
        optimizer: Any,
        update_num: int,
        ignore_grad: bool = False,
        **kwargs: Any,
    ) -> Any:
        if ignore_grad:
            sample = {**sample, "is_dummy": True}
        for layer in moe_layers(model):
            layer.observing = not ignore_grad
        return original(
            self, sample, model, criterion, optimizer, update_num, ignore_grad, **kwargs
        )

    FairseqTask.train_step = train_step


def _end_updates() -> None:
    """Let experts learn what they learn without a gradient, when the optimiser has made its step.

    On all workers alike, outside of forward and backward, and before a checkpoint is written.
    """
    original = FairseqTask.optimizer_step

    def all_reduce(value: torch.Tensor) -> None:
        group = distributed_utils.get_data_parallel_group()
        distributed_utils.all_reduce(value, group=group)

    @functools.wraps(original)
    def optimizer_step(self: Any, optimizer: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, optimizer, model, *args, **kwargs)
        several = distributed_utils.get_data_parallel_world_size() > 1
        for layer in moe_layers(model):
            layer.end_update(all_reduce if several else None)
        return result

    FairseqTask.optimizer_step = optimizer_step


def _report_unknown_keys() -> None:
    """Name an unknown key of a hydra configuration in one line.

    fairseq merges the settings with our dataclasses before the model sees them.
    """
    original = dataclass_utils.merge_with_parent

    @functools.wraps(original)
    def merge_with_parent(dc: Any, cfg: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return original(dc, cfg, *args, **kwargs)
        except ConfigKeyError as error:
            module = (dc if isinstance(dc, type) else type(dc)).__module__
            if not module.startswith("fairseq_sparsemixer."):
                raise
            part = module.split(".")[1].rstrip("s")  # model, criterion
            raise ConfigError(f"{part} settings: {str(error).splitlines()[0]}") from None

    dataclass_utils.merge_with_parent = merge_with_parent


def _print_user_errors_alone() -> None:
    """Print a :class:`UserError` that ends the program as one line, without its traceback."""
    previous = sys.excepthook

    def hook(
        kind: Type[BaseException], error: BaseException, traceback: Optional[TracebackType]
    ) -> None:
        cause: Optional[BaseException] = error
        while cause is not None:
            # fairseq's trainer wraps what goes wrong while loading a checkpoint.
            if isinstance(cause, UserError):
                print(f"error: {cause}", file=sys.stderr)
                return
            cause = cause.__cause__ or cause.__context__
        previous(kind, error, traceback)

    sys.excepthook = hook


apply()
