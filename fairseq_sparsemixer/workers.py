"""Lets several workers train together on a CPU too, and lets none of them outlive the others.

fairseq starts its workers on GPUs only: on a CPU it divides by the number of GPUs under torchrun,
starts no process at all without it, and hands pytorch_ddp a device that is none. Whoever loads the
extension has this, ``fairseq-train --user-dir`` too. ``fairseq-hydra-train`` loads it only when its
workers are there: it finds them by settings (:mod:`.training.machine`).
"""

import ctypes
import functools
import importlib.util
import multiprocessing
import os
import signal
import socket
import sys
from typing import Any, Dict, List

import torch
from fairseq.distributed import utils as distributed_utils
from fairseq.models import distributed_fairseq_model
from fairseq.trainer import Trainer
from torch.multiprocessing.spawn import ProcessException, ProcessExitedException
from torch.nn.parallel import DistributedDataParallel

from fairseq_sparsemixer.errors import UserError

TORCHRUN = "TORCHELASTIC_RUN_ID"
"""In the environment of what torchrun started."""
_ERRORS = f"{__package__}."
"""Begins the names of this package's errors in a traceback."""


def apply() -> None:
    """Put this in the place of what fairseq does."""
    _start()
    _reduce_on_a_cpu()
    _gather_on_a_cpu()
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
    return UserError(text) if kind.startswith(_ERRORS) else error


def ended_by(worker: int, number: int) -> str:
    """What a user can do where a signal of this number ended a worker."""
    name = signal.Signals(number).name
    why = ", as the system does where memory runs out" if number == signal.SIGKILL else ""
    return (
        f"worker {worker} was ended by {name}{why}; the others are stopped: start the same command "
        "again to go on from the last checkpoint"
    )


# Training


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
