"""The workers and nodes to train on, and what a training process is told of them."""

import os
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Sequence

import torch

from fairseq_sparsemixer.errors import UserError
from fairseq_sparsemixer.training.settings import PYTHON

DEFAULT_PORT = "29500"


class Machine(NamedTuple):
    """The workers to train on.

    Attributes:
        gpus: their names, on this node, a worker each; empty where the CPU trains.
        bf16: whether all of them compute in bf16.
        nodes: as large as this one, itself included.
        rank: of this node, from 0.
        master: address and port of node 0.
        on_cpu: workers that share this node's CPU where it trains.
    """

    gpus: List[str]
    bf16: bool
    nodes: int = 1
    rank: int = 0
    master: Sequence[str] = ("localhost", DEFAULT_PORT)
    on_cpu: int = 1

    @property
    def workers_here(self) -> int:
        """Those of this node."""
        return len(self.gpus) or self.on_cpu

    @property
    def workers(self) -> int:
        """Processes that train together."""
        return self.nodes * self.workers_here


def find_machine(nodes: int, workers: Optional[int] = None, cpu: bool = False) -> Machine:
    """The GPUs that CUDA shows (``CUDA_VISIBLE_DEVICES``), and this node's place among others.

    Args:
        nodes: as large as this one, itself included.
        workers: on each node; None for one on each GPU, or one on the CPU.
        cpu: train on the CPU although there are GPUs.

    Raises:
        UserError: workers that the GPUs are not for, or several nodes without the environment
            that joins them.
    """
    for flag, number in (("--nodes", nodes), ("--workers", workers)):
        if number is not None and number < 1:
            raise UserError(f"{flag} must be at least 1, not {number}")
    devices = range(0 if cpu else torch.cuda.device_count())
    gpus = [torch.cuda.get_device_name(device) for device in devices]
    bf16 = all(torch.cuda.get_device_capability(device) >= (8, 0) for device in devices)
    if gpus and workers not in (None, len(gpus)):
        raise UserError(
            f"--workers {workers} does not fit {len(gpus)} GPUs, a worker each: choose them with "
            "CUDA_VISIBLE_DEVICES, or train on the CPU with --cpu"
        )
    machine = Machine(gpus, bool(gpus) and bf16, on_cpu=workers or 1)
    if nodes == 1:
        return machine
    rank = os.environ.get("NODE_RANK", os.environ.get("SLURM_NODEID"))
    address = os.environ.get("MASTER_ADDR")
    if rank is None or not rank.isdigit() or int(rank) >= nodes or not address:
        raise UserError(
            f"--nodes {nodes} needs MASTER_ADDR (the host of node 0) and NODE_RANK (0 to "
            f"{nodes - 1}) in the environment"
        )
    port = os.environ.get("MASTER_PORT", DEFAULT_PORT)
    return machine._replace(nodes=nodes, rank=int(rank), master=(address, port))


PRECISION = frozenset(("common.fp16", "common.bf16", "common.amp", "common.cpu"))
"""Settings that are chosen by the machine, unless one of them is given."""


def precision_overrides(machine: Machine, recipe: Optional[str] = None) -> List[str]:
    """Overrides: bf16 where the GPU has it, fp16 elsewhere and in the released recipe."""
    if not machine.gpus:
        return ["common.cpu=true", "common.fp16=false"]
    if machine.bf16 and recipe != "released":
        return ["common.bf16=true", "common.fp16=false"]
    return ["common.fp16=true"]


def precision_of(common: Mapping[str, Any]) -> str:
    """``fp16``, ``bf16`` or ``fp32``, of fairseq's settings of that name."""
    return "fp16" if common["fp16"] else "bf16" if common["bf16"] else "fp32"


def launcher(machine: Machine) -> List[str]:
    """What starts the module: several workers are torchrun's."""
    if machine.workers == 1:
        return [*PYTHON]
    if machine.nodes == 1:
        # Whoever looks for the name of this host may not find it.
        place = ["--standalone", "--local_addr=localhost"]
    else:
        place = [f"--nnodes={machine.nodes}", f"--node_rank={machine.rank}"]
        place += [f"--master_addr={machine.master[0]}", f"--master_port={machine.master[1]}"]
    processes = f"--nproc_per_node={machine.workers_here}"
    return [*PYTHON, "torch.distributed.run", *place, processes, "-m"]


_JOINED_ON_A_CPU = (
    "distributed_training.distributed_backend=gloo",
    "distributed_training.distributed_init_method='env://'",
    "distributed_training.distributed_rank='${oc.decode:${oc.env:RANK}}'",
    "distributed_training.distributed_no_spawn=true",
)


def joining_overrides(machine: Machine) -> List[str]:
    """Overrides for a worker of torchrun, whose place fairseq finds by itself on a GPU alone."""
    return [] if machine.gpus or machine.workers == 1 else [*_JOINED_ON_A_CPU]


def environment_for(machine: Machine) -> Dict[str, str]:
    """The environment of the training process.

    On one node fairseq must join no others, though a launcher or Slurm tells it of some. Workers
    share the cores.
    """
    environment = dict(os.environ)
    if machine.workers_here > 1:
        threads = max(1, (os.cpu_count() or 1) // machine.workers_here)
        environment.setdefault("OMP_NUM_THREADS", str(threads))
    if machine.nodes == 1:
        for name in _OTHER_WORKERS:
            environment.pop(name, None)
    return environment


_OTHER_WORKERS = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "SLURM_JOB_NODELIST",
    "SLURM_STEP_NODELIST",
)
"""Variables by which fairseq finds processes that it did not start."""
