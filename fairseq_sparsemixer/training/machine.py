"""The GPUs and nodes to train on, and what a training process is told of them."""

import os
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Sequence

import torch

from fairseq_sparsemixer.errors import UserError
from fairseq_sparsemixer.training.settings import PYTHON

DEFAULT_PORT = "29500"


class Machine(NamedTuple):
    """The GPUs to train on.

    Attributes:
        gpus: their names, on this node; empty where it has none and its CPU is one worker.
        bf16: whether all of them compute in bf16.
        nodes: as large as this one, itself included.
        rank: of this node, from 0.
        master: address and port of node 0.
    """

    gpus: List[str]
    bf16: bool
    nodes: int = 1
    rank: int = 0
    master: Sequence[str] = ("localhost", DEFAULT_PORT)

    @property
    def workers(self) -> int:
        """Processes that train together."""
        return self.nodes * max(1, len(self.gpus))


def find_machine(nodes: int) -> Machine:
    """The GPUs that CUDA shows (``CUDA_VISIBLE_DEVICES``), and this node's place among others.

    Raises:
        UserError: several nodes without a GPU, or without the environment that joins them.
    """
    if nodes < 1:
        raise UserError(f"--nodes must be at least 1, not {nodes}")
    devices = range(torch.cuda.device_count())
    gpus = [torch.cuda.get_device_name(device) for device in devices]
    bf16 = all(torch.cuda.get_device_capability(device) >= (8, 0) for device in devices)
    machine = Machine(gpus, bool(gpus) and bf16)
    if nodes == 1:
        return machine
    if not gpus:
        raise UserError(f"--nodes {nodes} needs GPUs, and there is none: leave out --nodes")
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
    """What starts the module: on one node fairseq makes a process for each GPU by itself."""
    if machine.nodes == 1:
        return [*PYTHON]
    return [
        *(*PYTHON, "torch.distributed.run"),
        *(f"--nnodes={machine.nodes}", f"--nproc_per_node={len(machine.gpus)}"),
        *(f"--node_rank={machine.rank}", f"--master_addr={machine.master[0]}"),
        *(f"--master_port={machine.master[1]}", "-m"),
    ]


def environment_for(machine: Machine) -> Dict[str, str]:
    """The environment of the training process.

    On one node fairseq must join no others, though a launcher or Slurm tells it of some.
    """
    environment = dict(os.environ)
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
