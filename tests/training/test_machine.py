"""GPUs and nodes, and the command line for them."""

import os
from pathlib import Path

import pytest
import torch
from support.wmt14 import compose, gpus, plan_for

from fairseq_sparsemixer.errors import UserError
from fairseq_sparsemixer.training.machine import (
    Machine,
    environment_for,
    find_machine,
    precision_overrides,
)


def test_gpus_are_counted_and_nodes_found(monkeypatch):
    capability = {0: (8, 0), 1: (7, 0)}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device}")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability[device])
    assert find_machine(1) == Machine(["GPU 0", "GPU 1"], bf16=False)
    capability[1] = (9, 0)
    monkeypatch.setenv("SLURM_NODEID", "1")
    with pytest.raises(UserError, match="--nodes 2 needs MASTER_ADDR"):
        find_machine(2)
    monkeypatch.setenv("MASTER_ADDR", "first")
    machine = find_machine(2)
    assert machine == Machine(["GPU 0", "GPU 1"], True, 2, 1, ("first", "29500"))
    assert machine.workers == 4
    monkeypatch.setenv("NODE_RANK", "2")
    with pytest.raises(UserError, match=r"NODE_RANK \(0 to 1\)"):
        find_machine(2)


def test_gpus_are_a_worker_each(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert find_machine(1, 2).gpus == ["GPU", "GPU"]
    with pytest.raises(UserError, match="--workers 4 does not fit 2 GPUs"):
        find_machine(1, 4)
    assert find_machine(1, 4, cpu=True) == Machine([], False, on_cpu=4)


def test_a_machine_without_gpus_is_one_worker_unless_it_is_told(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert find_machine(1).workers == 1
    assert find_machine(1, 4).workers == find_machine(1, 4, cpu=True).workers == 4
    monkeypatch.setenv("MASTER_ADDR", "first")
    monkeypatch.setenv("NODE_RANK", "1")
    assert find_machine(2, 4).workers == 8
    with pytest.raises(UserError, match="--workers must be at least 1"):
        find_machine(1, 0)
    with pytest.raises(UserError, match="--nodes must be at least 1"):
        find_machine(0)


def test_precision_is_that_of_the_machine(monkeypatch):
    assert "common.bf16=true" in precision_overrides(gpus(1), "recommended")
    assert precision_overrides(gpus(1), "released") == ["common.fp16=true"]
    assert precision_overrides(Machine(["Tesla T4"], False), "recommended") == ["common.fp16=true"]
    assert "common.cpu=true" in precision_overrides(Machine([], False), "released")
    assert plan_for(gpus(1), monkeypatch, "--recipe", "released").precision == "fp16"
    assert plan_for(gpus(1), monkeypatch, "common.fp16=false").precision == "fp32"


def test_command_for_one_node_and_for_several(monkeypatch):
    plan = plan_for(gpus(8), monkeypatch, "--router", "gshard", "--seed", "3", "--model", "big")
    assert plan.folder == Path("runs/wmt14/gshard-4-big-seed3")
    assert plan.command[1:8] == [
        *("-m", "torch.distributed.run", "--standalone", "--local_addr=localhost"),
        *("--nproc_per_node=8", "-m", "fairseq_cli.hydra_train"),
    ]
    assert "distributed_training.distributed_world_size=8" in plan.command
    assert "optimization.update_freq=[2]" in plan.command
    assert "model.top_k=2" in plan.command
    assert plan.settings["model"]["encoder_embed_dim"] == 1024
    machine = gpus(16, nodes=2, rank=1, master=("first", "29500"))
    command = plan_for(machine, monkeypatch, "--router", "dense").command
    assert command[1:9] == [
        *("-m", "torch.distributed.run", "--nnodes=2", "--node_rank=1", "--master_addr=first"),
        *("--master_port=29500", "--nproc_per_node=8", "-m"),
    ]
    assert "distributed_training.distributed_world_size=16" in command
    assert not [word for word in command if "distributed_rank" in word]  # fairseq's to find
    assert plan_for(gpus(1), monkeypatch).command[1:3] == ["-m", "fairseq_cli.hydra_train"]


def test_workers_on_a_cpu_are_told_their_place(monkeypatch):
    """As the settings that are composed on the way, in the worker of this number."""
    plan = plan_for(Machine([], False, on_cpu=4), monkeypatch)
    assert "--nproc_per_node=4" in plan.command
    told = [word for word in plan.command if word.startswith("distributed_training.")]
    monkeypatch.setenv("RANK", "3")
    where = compose(*told).distributed_training
    assert (where.distributed_rank, where.distributed_world_size) == (3, 4)
    assert (where.distributed_init_method, where.distributed_no_spawn) == ("env://", True)
    assert where.distributed_backend == "gloo"
    assert plan.settings["distributed_training"]["distributed_rank"] == 0  # of each worker


def test_fairseq_finds_its_place_under_torchrun_and_slurm(monkeypatch, tmp_path):
    """What the command and configs/hydra/launcher/slurm.yaml rely on, in fairseq itself."""
    from fairseq.distributed.utils import infer_init_method

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)

    def found(workers, **environment):
        cfg = compose(f"distributed_training.distributed_world_size={workers}")
        with monkeypatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            infer_init_method(cfg.distributed_training)
        return cfg.distributed_training

    torchrun = {"MASTER_ADDR": "first", "MASTER_PORT": "29500", "WORLD_SIZE": "16", "RANK": "11"}
    place = found(16, **torchrun)
    assert (place.distributed_init_method, place.distributed_no_spawn) == ("env://", True)
    assert (place.distributed_rank, place.distributed_world_size, place.device_id) == (11, 16, 3)
    # With a world of 1, which is fairseq's default on a login node, each worker would be alone.
    assert found(1, **torchrun).distributed_init_method is None

    scontrol = tmp_path / "scontrol"
    scontrol.write_text("#!/bin/sh\necho first\n")
    scontrol.chmod(0o755)
    slurm = {"SLURM_JOB_NODELIST": "first", "SLURM_NNODES": "1", "SLURM_NTASKS_PER_NODE": "1"}
    slurm.update(SLURM_NODEID="0", SLURM_JOB_ID="7", PATH=f"{tmp_path}:{os.environ['PATH']}")
    place = found(8, **slurm)
    assert place.distributed_init_method.startswith("tcp://localhost:")
    assert (place.distributed_rank, place.distributed_world_size) == (0, 8)
    assert not place.distributed_no_spawn


def test_workers_share_the_cores(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert "OMP_NUM_THREADS" not in environment_for(gpus(1))
    assert environment_for(gpus(8, nodes=2))["OMP_NUM_THREADS"] == "4"
    assert environment_for(Machine([], False, on_cpu=32))["OMP_NUM_THREADS"] == "1"
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert environment_for(gpus(8))["OMP_NUM_THREADS"] == "3"


def test_on_one_node_training_joins_no_others(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "SLURM_JOB_NODELIST"):
        monkeypatch.setenv(name, "1")
    assert not {"RANK", "WORLD_SIZE", "SLURM_JOB_NODELIST"} & environment_for(gpus(2)).keys()
    assert environment_for(gpus(2, nodes=2))["SLURM_JOB_NODELIST"] == "1"
