"""Lets several workers train together on a CPU too, and lets none of them outlive the others.

fairseq starts its workers on GPUs only: on a CPU it divides by the number of GPUs under torchrun,
starts no process at all without it, and hands pytorch_ddp a device that is none. And where the
batches of an epoch do not come out even, those that there are count, on GPUs too. Whoever loads the
extension has this, ``fairseq-train --user-dir`` too. ``fairseq-hydra-train`` loads it only when its
workers are there: it finds them by settings (:mod:`.training.machine`).
"""

import copy
import ctypes
import functools
import importlib.util
import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import MutableMapping
from typing import Any, Dict, List

import torch
from fairseq.distributed import utils as distributed_utils
from fairseq.models import distributed_fairseq_model
from fairseq.tasks import FairseqTask
from fairseq.trainer import Trainer
from torch.multiprocessing.spawn import ProcessException, ProcessExitedException
from torch.nn.parallel import DistributedDataParallel

from fairseq_sparsemixer.errors import UserError
from fairseq_sparsemixer.moe.feed_forward import moe_layers

TORCHRUN = "TORCHELASTIC_RUN_ID"
"""In the environment of what torchrun started."""
_OWN = f"{__package__}."
"""Begins the names of this package's modules, and so of its errors in a traceback."""


def apply() -> None:
    """Put this in the place of what fairseq does."""
    _start()
    _reduce_on_a_cpu()
    _gather_on_a_cpu()
    _leave_out_dummy_batches()
    _end_together()


# Starting


def _start() -> None:
    """Start workers on a CPU, and say in one line why they ended."""
    original = distributed_utils.call_main

    @functools.wraps(original)
    def call_main(cfg: Any, main: Any, **kwargs: Any) -> Any:
        where = cfg.distributed_training
        if where.ddp_backend == "fully_sharded":
            _check_sharding()
        workers = int(os.environ.get("WORLD_SIZE", 1)) if TORCHRUN in os.environ else 1
        if workers > 1 and where.distributed_init_method is None and not cfg.common.tpu:
            # Of a world of 1, fairseq's default, it makes as many trainings, all in one folder.
            where.distributed_world_size = workers
        try:
            if _is_on_cpu(cfg.common) and _begin(where, by_torchrun=workers > 1):
                where.distributed_rank = None  # by the number of the process
                arguments = (main, cfg, {"start_rank": 0, **kwargs})
                torch.multiprocessing.spawn(
                    distributed_utils.distributed_main, arguments, where.distributed_world_size
                )
            else:
                original(cfg, main, **kwargs)
        except ProcessException as error:
            raise _in_one_line(error) from error

    distributed_utils.call_main = call_main


def _check_sharding() -> None:
    for missing, cure in (
        (importlib.util.find_spec("fairscale") is None, "fairscale: pip install fairscale"),
        (not torch.cuda.is_available(), "GPUs: take --ddp-backend pytorch_ddp"),
    ):
        if missing:
            raise UserError(f"--ddp-backend fully_sharded needs {cure}")


def _is_on_cpu(common: Any) -> bool:
    return not common.tpu and (common.cpu or not torch.cuda.is_available())


def _begin(where: Any, by_torchrun: bool) -> bool:
    """Tell the workers on a CPU how they find each other; whether they are still to be started."""
    if where.distributed_world_size == 1:
        return False
    if where.distributed_backend == "nccl":
        where.distributed_backend = "gloo"
    if where.distributed_init_method is not None:
        return False
    if by_torchrun:
        where.distributed_init_method = "env://"
        where.distributed_rank = int(os.environ["RANK"])
        where.distributed_no_spawn = True
        return False
    port = where.distributed_port if where.distributed_port > 0 else _free_port()
    where.distributed_init_method = f"tcp://localhost:{port}"
    return True


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("localhost", 0))
        return int(server.getsockname()[1])


def _in_one_line(error: ProcessException) -> Exception:
    """The error of workers that were started from here: a user's own, or what a user can do."""
    if isinstance(error, ProcessExitedException) and error.exit_code < 0:
        return UserError(ended_by(error.error_index, -error.exit_code))
    kind, _, text = str(error).rstrip().rpartition("\n")[2].partition(": ")
    return UserError(text) if kind.startswith(_OWN) else error


def ended_by(worker: int, number: int) -> str:
    """What a user can do where a signal of this number ended a worker."""
    return (
        f"worker {worker} was {by_signal(number)}; the others are stopped: start the same command "
        "again to go on from the last checkpoint"
    )


def by_signal(number: int) -> str:
    """How a signal of this number ends a process, in words."""
    why = ", as the system does where memory runs out" if number == signal.SIGKILL else ""
    return f"ended by {signal.Signals(number).name}{why}"


# Training


def _leave_out_dummy_batches() -> None:
    """Tell criterion and experts which batches do not count, and count the others.

    At the end of an epoch fairseq gives a worker without a batch an old one, whose gradient it sets
    to 0 only after the criterion has run. Where that is the last of an update (--update-freq), it
    takes the worker to have had none at all: it drops the sizes and logs of those before, too.
    """
    step, prepare, update = FairseqTask.train_step, Trainer._prepare_sample, Trainer.train_step

    @functools.wraps(step)
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
        # Criteria and tasks of others may have samples of any kind.
        if isinstance(sample, MutableMapping):
            ignore_grad |= sample.get("is_dummy", False)
            if ignore_grad:
                sample = copy.copy(sample)
                sample["is_dummy"] = True
        for layer in moe_layers(model):
            layer.observing = not ignore_grad
        loss, size, logged = step(
            self, sample, model, criterion, optimizer, update_num, ignore_grad, **kwargs
        )
        if ignore_grad:
            size, logged = 0 * size, {key: _nothing(value) for key, value in logged.items()}
        return loss, size, logged

    @functools.wraps(prepare)
    def _prepare_sample(self: Any, sample: Any, is_dummy: bool = False) -> Any:
        sample, empty = prepare(self, sample, is_dummy)
        among_others = empty and getattr(self, "has_batches", False)
        if among_others and isinstance(sample, MutableMapping) and _steps_as_usual(self.task):
            return {**sample, "is_dummy": True}, False
        return sample, empty

    @functools.wraps(update)
    def train_update(self: Any, samples: Any, *args: Any, **kwargs: Any) -> Any:
        self.has_batches = any(sample is not None and len(sample) > 0 for sample in samples)
        try:
            return update(self, samples, *args, **kwargs)
        finally:
            self.has_batches = False

    FairseqTask.train_step, Trainer._prepare_sample = train_step, _prepare_sample
    Trainer.train_step = train_update


def _nothing(value: Any) -> Any:
    """A sum over no batch, in place of one that was logged."""
    return 0 * value if isinstance(value, (int, float, torch.Tensor)) else value


def _steps_as_usual(task: Any) -> bool:
    """Whether a task has fairseq's common step, apart from what this package adds."""
    defining = [kind for kind in type(task).__mro__ if "train_step" in vars(kind)]
    others = [kind for kind in defining if not kind.__module__.startswith(_OWN)]
    return others[:1] == [FairseqTask]


class _OnAnyDevice(DistributedDataParallel):
    """pytorch_ddp, which takes no number of a device for a model that is on none."""

    def __init__(
        self, module: Any, *, device_ids: Any = None, output_device: Any = None, **more: Any
    ) -> None:
        devices: Dict[str, Any] = {"device_ids": device_ids, "output_device": output_device}
        on_cpu = next(module.parameters()).device.type == "cpu"
        super().__init__(module, **({} if on_cpu else devices), **more)


def _reduce_on_a_cpu() -> None:
    distributed_fairseq_model.DistributedDataParallel = _OnAnyDevice


def _gather_on_a_cpu() -> None:
    """Without a GPU gather what cannot be added up, too, such as predictions of a validation."""
    original = distributed_utils.all_gather_list

    @functools.wraps(original)
    def all_gather_list(data: Any, group: Any = None, **kwargs: Any) -> List[Any]:
        if torch.cuda.is_available():
            return original(data, group=group, **kwargs)
        group = distributed_utils.get_global_group() if group is None else group
        found: List[Any] = [None] * distributed_utils.get_world_size(group)
        torch.distributed.all_gather_object(found, data, group=group)
        return found

    distributed_utils.all_gather_list = all_gather_list


# Ending


def end_with_parent() -> None:
    """Let this process be killed with the one that started it."""
    if sys.platform == "linux":
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)


def _end_together() -> None:
    """Let no worker go on alone when what started it was killed.

    torchrun's go on; those that fairseq starts are sent SIGINT, which what was started in the
    background does not hear.
    """
    original = Trainer.__init__

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        if TORCHRUN in os.environ or multiprocessing.parent_process() is not None:
            end_with_parent()
        original(self, *args, **kwargs)

    Trainer.__init__ = __init__
