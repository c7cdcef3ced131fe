"""The training command, the configs of WMT14, and what it says a run will need."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from support import commands

from fairseq_sparsemixer import cli
from fairseq_sparsemixer.commands.train import request
from fairseq_sparsemixer.errors import UserError
from fairseq_sparsemixer.files import sha256_of
from fairseq_sparsemixer.moe import ROUTERS
from fairseq_sparsemixer.moe.feed_forward import moe_layers
from fairseq_sparsemixer.runs import mending as checkpoints
from fairseq_sparsemixer.runs import record
from fairseq_sparsemixer.runs.arms import build_variant
from fairseq_sparsemixer.runs.logs import read_log
from fairseq_sparsemixer.training import dry_run as report
from fairseq_sparsemixer.training import launch, plan, process, resources, settings
from fairseq_sparsemixer.training.machine import (
    Machine,
    environment_for,
    find_machine,
    precision_overrides,
)
from fairseq_sparsemixer.training.plan import Batch

CONFIGS = settings.CONFIGS
SCRIPTS = settings.CHECKOUT / "scripts"
TINY_MODEL = {
    **{f"{side}_layers": 1 for side in ("encoder", "decoder")},
    **{f"{side}_embed_dim": 16 for side in ("encoder", "decoder")},
    **{f"{side}_ffn_embed_dim": 16 for side in ("encoder", "decoder")},
    **{f"{side}_attention_heads": 2 for side in ("encoder", "decoder")},
}
TINY = [
    *(f"+model.{key}={value}" for key, value in TINY_MODEL.items()),
    "dataset.max_tokens=100",
    "optimization.update_freq=[2]",
    "optimization.lr=[0.01]",
    "lr_scheduler.warmup_updates=1",
    "dataset.num_workers=0",
    "common.log_interval=1",
    "checkpoint.save_interval_updates=4",
    "checkpoint.keep_interval_updates=2",
]


def compose(*overrides):
    """The settings of WMT14."""
    return settings.compose(CONFIGS, ["checkpoint.save_dir=unused", *overrides], "wmt14")


def plan_for(machine, monkeypatch, *arguments):
    """The plan of a command on another machine."""
    monkeypatch.setattr(plan, "find_machine", lambda nodes: machine)
    return plan.plan_launch(request(commands.parse("train", *arguments)))


# Batches


def gpus(number, nodes=1, name="NVIDIA A100-SXM4-80GB", **more):
    return Machine([name] * (number // nodes), True, nodes=nodes, **more)


@pytest.mark.parametrize(
    ("machine", "wanted", "update_freq"),
    [
        (Machine([], False), None, 16),
        (gpus(1), None, 16),
        (gpus(2), None, 8),
        (gpus(4), None, 4),
        (gpus(8), None, 2),
        (gpus(16, nodes=2), None, 1),
        (gpus(1), 4096, 32),
        (gpus(32, nodes=4), 4096, 1),
        (gpus(64, nodes=8), 1024, 2),
    ],
)
def test_an_update_has_the_same_tokens_on_any_number_of_gpus(machine, wanted, update_freq):
    batch = plan.spread(8192, [16], machine, wanted)
    assert batch == Batch(machine.workers, update_freq, wanted or 8192)
    assert batch.tokens_per_update == 16 * 8192


@pytest.mark.parametrize(
    ("workers", "wanted", "cure"),
    [
        (3, None, "train on 1, 2, 4, 8 or 16 GPUs (CUDA_VISIBLE_DEVICES, --nodes)"),
        (5, None, "train on 1, 2, 4, 8 or 16 GPUs"),
        (7, 4096, "train on 1, 2, 4, 8, 16 or 32 GPUs"),
        (3, 5000, "give another --max-tokens"),
        (32, None, "give --max-tokens 4096, 2048, 1024 or 512"),
        (2, 5000, "give --max-tokens 4096, 2048, 1024 or 512"),
        (1, 0, "--max-tokens must be at least 1"),
    ],
)
def test_a_batch_that_does_not_come_out_even_is_refused(workers, wanted, cure):
    with pytest.raises(UserError) as info:
        plan.spread(8192, [16], gpus(workers), wanted)
    assert cure in str(info.value)


def test_a_batch_by_sentences_is_refused():
    with pytest.raises(UserError, match=r"dataset\.max_tokens and one update_freq"):
        plan.spread(None, [16], gpus(1), None)


# Machines


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


def test_a_machine_without_gpus_is_one_worker(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert find_machine(1).workers == 1
    with pytest.raises(UserError, match="--nodes 2 needs GPUs"):
        find_machine(2)
    with pytest.raises(UserError, match="--nodes must be at least 1"):
        find_machine(0)


def test_precision_is_that_of_the_machine(monkeypatch):
    assert "common.bf16=true" in precision_overrides(gpus(1), "recommended")
    assert precision_overrides(gpus(1), "released") == []
    assert precision_overrides(Machine(["Tesla T4"], False), "recommended") == []
    assert "common.cpu=true" in precision_overrides(Machine([], False), "released")
    assert plan_for(gpus(1), monkeypatch, "--recipe", "released").precision == "fp16"
    assert plan_for(gpus(1), monkeypatch, "common.fp16=false").precision == "fp32"


def test_command_for_one_node_and_for_several(monkeypatch):
    plan = plan_for(gpus(8), monkeypatch, "--router", "gshard", "--seed", "3", "--model", "big")
    assert plan.folder == Path("runs/wmt14/gshard-4-big-seed3")
    assert plan.command[1:4] == ["-m", "fairseq_cli.hydra_train", "--config-dir"]
    assert "distributed_training.distributed_world_size=8" in plan.command
    assert "optimization.update_freq=[2]" in plan.command
    assert "model.top_k=2" in plan.command
    assert plan.settings["model"]["encoder_embed_dim"] == 1024
    machine = gpus(16, nodes=2, rank=1, master=("first", "29500"))
    command = plan_for(machine, monkeypatch, "--router", "dense").command
    assert command[1:9] == [
        *("-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=8", "--node_rank=1"),
        *("--master_addr=first", "--master_port=29500", "-m"),
    ]
    assert "distributed_training.distributed_world_size=16" in command


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


def test_on_one_node_training_joins_no_others(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "SLURM_JOB_NODELIST"):
        monkeypatch.setenv(name, "1")
    assert not {"RANK", "WORLD_SIZE", "SLURM_JOB_NODELIST"} & environment_for(gpus(2)).keys()
    assert environment_for(gpus(2, nodes=2))["SLURM_JOB_NODELIST"] == "1"


# Flags


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gpus=two"], "gpus=... is not set here: use CUDA_VISIBLE_DEVICES and --nodes"),
        (["model.router=switch"], "use --router"),
        (["model.dropot=0.1"], "hydra: Could not override 'model.dropot'"),
        (["+modle.dropout=0.3"], "modle: fairseq has no such group of settings"),
        (["--router", "swtch"], "did you mean 'switch'"),
        (["model.top_k=9"], "--top-k must be 1"),
        ([], "run scripts/prepare_wmt14_en_de.sh, or name your own folder with task.data=FOLDER"),
        (["--pipeline", "moses"], "run scripts/prepare_wmt14_en_de.sh --pipeline moses, or"),
    ],
)
def test_what_does_not_work_is_told_in_one_sentence(
    arguments, message, monkeypatch, tmp_path, capsys
):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_names_of_runs():
    def name(*arguments):
        asked = request(commands.parse("train", *arguments))
        return plan.name_of(asked, build_variant(asked.router, asked.experts).name)

    assert name() == "sparsemixer-4-seed1"
    assert name("--router", "dense", "--seed", "2") == "dense-seed2"
    flags = ["--recipe", "released", "--schedule", "short", "--pipeline", "moses"]
    assert name("--experts", "8", *flags) == "sparsemixer-8-released-short-moses-seed1"


# Recipes


def test_released_recipe_is_that_of_the_example():
    """The flags of example/run_moe.sh in github.com/microsoft/SparseMixer."""
    cfg = compose("recipe=released", "data=wmt14_en_de_moses")
    resources.build_on_meta(cfg.model, plan.make_task(cfg, 100))
    expected = {
        "dataset": {
            "num_workers": 8,
            "max_tokens": 8192,
            "skip_invalid_size_inputs_valid_test": True,
            "required_batch_size_multiple": 8,
        },
        "distributed_training": {"ddp_backend": "legacy_ddp"},
        "criterion": {"label_smoothing": 0.1, "balance_weight": 0.01},
        "model": {
            "share_all_embeddings": True,
            "encoder_layers": 6,
            "decoder_layers": 6,
            "encoder_embed_dim": 512,
            "decoder_ffn_embed_dim": 2048,
            "encoder_normalize_before": False,
            "decoder_normalize_before": False,
            "dropout": 0.1,
            "activation_dropout": 0.1,
            "attention_dropout": 0.1,
            "jitter_eps": 0.1,
            "moe_every": 2,
            "moe_offset": 0,
        },
        "optimizer": {"adam_betas": [0.9, 0.98], "weight_decay": 0.0},
        "lr_scheduler": {"warmup_updates": 8000, "warmup_init_lr": 1e-7},
        "optimization": {
            "max_update": 400_000,
            "lr": [0.0007],
            "update_freq": [16],
            "clip_norm": 0.0,
        },
        "common": {"fp16": True, "fp16_init_scale": 4, "fp16_scale_window": 256, "seed": 1},
        "checkpoint": {"best_checkpoint_metric": "loss", "save_interval": 10},
    }
    for section, values in expected.items():
        assert {key: cfg[section][key] for key in values} == values
    assert cfg.optimizer._name == "adam" and cfg.lr_scheduler._name == "inverse_sqrt"
    assert str(cfg.criterion.routing_loss) == "released"


def test_recommended_recipe_differs_where_it_says():
    recommended, released = compose(), compose("recipe=released")
    assert str(recommended.criterion.routing_loss) == "corrected"
    assert recommended.checkpoint.best_checkpoint_metric == "nll_loss"
    for section in ("model", "optimizer", "lr_scheduler", "optimization", "task"):
        assert recommended[section] == released[section]
    short = compose("schedule=short")
    assert short.lr_scheduler == recommended.lr_scheduler
    assert short.optimization.max_update == 100_000


@pytest.mark.parametrize("router", ROUTERS)
def test_every_router_composes(router):
    tiny = [f"+model.{key}={value}" for key, value in TINY_MODEL.items()]
    cfg = compose(*build_variant(router, 6).overrides, *tiny)
    layers = list(moe_layers(resources.build_on_meta(cfg.model, plan.make_task(cfg, 100))))
    assert {layer.experts.num_experts for layer in layers} == {6}


def test_gpus_share_the_tokens_of_an_update():
    for number in ("one", "two", "four", "eight"):
        cfg = compose(f"gpus={number}")
        workers = cfg.distributed_training.distributed_world_size
        batch = Batch(workers, cfg.optimization.update_freq[0], cfg.dataset.max_tokens)
        assert batch.tokens_per_update == 16 * 8192
    assert workers == 8


@pytest.mark.filterwarnings("ignore")  # of hydra, about fairseq's way of naming its schema
def test_slurm_gives_a_job_the_gpus_of_the_run():
    import hydra
    from fairseq.dataclass.initialize import hydra_init

    hydra_init("wmt14")
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.1"):
        overrides = ["hydra/launcher=slurm", "gpus=four", "hydra.launcher.partition=p"]
        cfg = hydra.compose("wmt14", overrides, return_hydra_config=True)
    launcher = cfg.hydra.launcher
    assert launcher._target_.endswith("SlurmLauncher")
    assert (launcher.gpus_per_node, launcher.tasks_per_node, launcher.nodes) == (4, 1, 1)
    assert launcher.partition == "p"
    assert launcher.additional_parameters.requeue and launcher.max_num_timeout > 0


# What a run needs


@pytest.fixture(scope="module")
def base_models():
    """Real base models, dense and with 2 and 8 experts, over a dictionary of 1000 entries."""
    models = {}
    for name, number in (("dense", 1), ("two", 2), ("eight", 8)):
        cfg = compose(f"experts={name}")
        meta = resources.build_on_meta(cfg.model, plan.make_task(cfg, 1000))
        models[number] = meta, plan.make_task(cfg, 1000).build_model(cfg.model)
    return models


@pytest.mark.parametrize("number", [1, 2, 8])
def test_parameters_are_those_of_the_real_model(base_models, number):
    meta, real = base_models[number]
    assert all(parameter.is_meta for parameter in meta.parameters())
    counted = resources.count_parameters(meta)
    assert (
        counted.total
        == sum(
            p.numel()
            for p in real.state_dict(keep_vars=True).values()
            if isinstance(p, torch.nn.Parameter)
        )
        - 512 * 1000 * 2
    )
    dense = resources.count_parameters(base_models[1][0])
    # Router weight and bias, and omega, in six layers.
    router = 0 if number == 1 else 6 * (number * 512 + number + 512)
    expert = 2 * 512 * 2048 + 2048 + 512
    assert counted.active == counted.computed == dense.total + router
    assert counted.total == sum(parameter.numel() for parameter in real.parameters())
    dense = resources.count_parameters(base_models[1][0])
    # Router weight and bias, and omega, in six layers.
    router = 0 if number == 1 else 6 * (number * 512 + number + 512)
    expert = 2 * 512 * 2048 + 2048 + 512
    assert counted.active == counted.computed == dense.total + router
    assert counted.total == counted.active + 6 * (number - 1) * expert


def test_one_token_uses_the_active_parameters():
    """Those that get a gradient from a sentence of one word, top_k of N experts in each layer."""
    tiny = [f"+model.{key}={value}" for key, value in TINY_MODEL.items()]
    cfg = compose(*build_variant("gshard", 4).overrides, "model.jitter_eps=0", *tiny)
    model = plan.make_task(cfg, 100).build_model(cfg.model)
    word = torch.tensor([[7]])
    model.eval()(word, torch.tensor([1]), word)[0].sum().backward()
    for layer in moe_layers(model):
        used = layer.experts.b2.grad.abs().sum(-1) > 0
        assert used.sum() == layer.router.top_k == 2
    counted = resources.count_parameters(model)
    assert counted.total - counted.active == 2 * 2 * (2 * 16 * 16 + 16 + 16)


def test_a_yardstick_computes_more_than_it_counts_as_active():
    tiny = [f"+model.{key}={value}" for key, value in TINY_MODEL.items()]
    cfg = compose(*build_variant("straight-through", 4).overrides, *tiny)
    counted = resources.count_parameters(plan.make_task(cfg, 100).build_model(cfg.model))
    assert counted.active < counted.computed == counted.total


@pytest.mark.parametrize("half", [False, True])
def test_memory_is_that_of_a_real_optimiser(half):
    from fairseq import optim
    from fairseq.optim.fp16_optimizer import FP16Optimizer

    tiny = [f"+model.{key}={value}" for key, value in TINY_MODEL.items()]
    cfg = compose("common.fp16=false", f"common.bf16={half}", *tiny)
    model = plan.make_task(cfg, 100).build_model(cfg.model)
    parameters = list((model.bfloat16() if half else model).parameters())
    build = FP16Optimizer.build_optimizer if half else optim.build_optimizer
    optimizer = build(cfg if half else cfg.optimizer, parameters)
    optimizer.zero_grad()
    optimizer.backward(sum(parameter.float().sum() for parameter in parameters))
    optimizer.step()
    kept = [*parameters, *(parameter.grad for parameter in parameters)]
    if half:
        kept += [*optimizer.fp32_params, *(copy.grad for copy in optimizer.fp32_params)]
    for state in optimizer.optimizer.state.values():
        kept += [value for value in state.values() if torch.is_tensor(value) and value.dim()]
    truth = sum(tensor.numel() * tensor.element_size() for tensor in kept)
    total = resources.count_parameters(model).total
    assert sum(resources.state_bytes(total, half).values()) == truth
    assert truth == total * (20 if half else 16)
    shared = resources.state_bytes(total, half, workers=2)
    assert shared["buffer of legacy_ddp"] == total * (2 if half else 4)


@pytest.mark.parametrize("number", [1, 2])
def test_activations_are_about_those_that_autograd_keeps(base_models, number):
    """In fp32 on the CPU, where dropout keeps masks four times as wide as on a GPU."""
    model = base_models[number][1]
    words = torch.randint(4, 1000, (8, 32))
    kept = {}
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage  # held, or its place would be used again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.train()(words, torch.full((8,), 32), words)
    truth = sum(storage.nbytes() for storage in kept.values())
    estimate = resources.activation_bytes(model, words.numel(), half=False)
    assert 0.75 < estimate["activations of the layers"] / truth < 1.05


def test_peaks_are_told_by_the_names_that_cuda_gives():
    names = {
        "Tesla V100-SXM2-16GB": 125,
        "Tesla V100-PCIE-16GB": None,
        "Tesla T4": 65,
        "NVIDIA A10": 125,
        "NVIDIA A10G": None,
        "NVIDIA A100-SXM4-80GB": 312,
        "NVIDIA A100 80GB PCIe": 312,
        "NVIDIA H100 80GB HBM3": 989,
        "NVIDIA H100 PCIe": None,
        "NVIDIA H200": 989,
        "NVIDIA L4": 121,
        "NVIDIA L40S": 362,
        "NVIDIA GeForce RTX 4090": 165,
        "NVIDIA GeForce RTX 4090 Laptop GPU": None,
        "Quadro P600": None,
    }
    assert {name: resources.peak_tflops(name) for name in names} == names


def test_time_follows_from_the_formula():
    assert resources.update_flops(60_000_000, 131_072) == 6 * 60e6 * 131_072
    at_peak = resources.training_hours(312e12 * 3600, 10, workers=2, tflops=312)
    assert at_peak == pytest.approx(10 / 2 / resources.UTILISATION)


def test_dry_run_does_nothing_but_print(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plan, "find_machine", lambda nodes: gpus(8))
    assert cli.main(["train", "--dry-run", "--experts", "8"]) == 0
    out = capsys.readouterr().out
    assert not list(tmp_path.iterdir())
    assert "-m fairseq_cli.hydra_train --config-dir" in out
    assert "131,072 tokens a side at most: workers 8 x update_freq 2 x max_tokens 8,192" in out
    assert "149,131,312; a token uses 60,943,408 (a dictionary of 32,768 entries is assumed)" in out
    assert "2.98 GB" not in out and "0.30 GB  weights" in out and "(an estimate)" in out
    assert "at 312 TFLOP/s for each GPU" in out and "assumed, not measured" in out


def test_dry_run_without_a_gpu_tells_of_others(monkeypatch, tmp_path):
    text = report.format_launch(plan_for(Machine([], False), monkeypatch, *TINY))
    assert "on one GPU in half precision" in text
    assert "not known for this machine" in text and "RTX 4090" in text
    text = report.format_launch(plan_for(gpus(2, name="New GPU"), monkeypatch, *TINY))
    assert "not known for this machine" in text


# Runs


def command(corpus, runs, *arguments):
    flags = ["--runs", str(runs), "--experts", "2", "--router", "switch"]
    data = f"task.data={corpus / 'bin'}"
    return ["train", *flags, *arguments, *TINY, data, "optimization.max_update=160"]


@pytest.fixture(scope="module")
def interrupted(corpus, tmp_path_factory):
    """A run that was ended by SIGTERM after its first checkpoints; returns its ``runs``."""
    runs = tmp_path_factory.mktemp("interrupted")
    folder = runs / "switch-2-seed1"
    started = commands.start(
        "fairseq_sparsemixer.cli", *command(corpus, runs), prelude=commands.HEAR_INTERRUPTIONS
    )
    deadline = time.monotonic() + commands.TIMEOUT_SECONDS
    while not list(folder.glob("checkpoint_*_8.pt")):
        assert started.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    started.send_signal(signal.SIGTERM)
    (result,) = commands.finish(started)
    assert result.returncode == 130, result.stderr
    assert "run the same command again to go on" in result.stderr
    return runs


def test_an_interrupted_run_goes_on(interrupted, corpus, capsys):
    folder = interrupted / "switch-2-seed1"
    # Killed while fairseq copied it.
    last = folder / "checkpoint_last.pt"
    last.write_bytes(last.read_bytes()[:2000])
    (folder / "checkpoint_1_12.pt.tmp").write_bytes(b"")
    with process.sole_user(folder):  # whoever trained in it has ended
        pass
    arguments = command(corpus, interrupted, "--max-tokens", "50")

    assert cli.main([*arguments, "model.dropout=0.2"]) == 2
    assert "was trained with model.dropout=0.1, not 0.2:" in capsys.readouterr().err
    assert cli.main([*arguments, "dataset.max_tokens=200"]) == 2
    assert "was trained with tokens_per_update=200, not 400:" in capsys.readouterr().err

    copied = folder / "dict.en.txt"
    written = json.loads((folder / record.RECORD).read_text())
    assert written["data"][copied.name] == sha256_of(copied)
    with pytest.raises(UserError, match=r"was trained with dict\.en\.txt="):
        record.check_same(folder, written, {**written, "data": {copied.name: "another"}})

    assert cli.main(arguments) == 0
    out = capsys.readouterr().out
    assert "goes on from checkpoint_" in out
    assert "1 x 4 x 50 tokens an update, fp32, on the CPU" in out
    assert f"score      scripts/evaluate_wmt14.sh {folder}" in out
    assert "Loaded checkpoint" in (folder / launch.LOG).read_text()
    assert checkpoints.is_intact(last)
    assert commands.load(last)["optimizer_history"][-1]["num_updates"] == 160
    assert not list(folder.glob("*.tmp"))
    # All that is needed to translate.
    for name in ("dict.en.txt", "dict.de.txt", "sentencepiece.bpe.model"):
        assert (folder / name).read_bytes() == (corpus / "bin" / name).read_bytes()
    config = OmegaConf.load(folder / ".hydra" / "config.yaml")
    assert config.dataset.max_tokens == 50 and config.optimization.update_freq == [4]

    before = (folder / launch.LOG).read_text()
    assert cli.main(arguments) == 0
    assert "finished before" in capsys.readouterr().out
    assert (folder / launch.LOG).read_text() == before

    written = json.loads((folder / record.RECORD).read_text())
    assert [start["update_freq"] for start in written["starts"]] == [2, 4]
    assert written["update_freq"] == 4 and written["tokens_per_update"] == 200
    assert written["workers"] == 1 and written["gpus"] == []
    assert written["settings"]["model"]["num_experts"] == 2
    assert written["settings"]["optimizer"]["adam_eps"] == 1e-8
    assert written["versions"]["torch"] == torch.__version__
    total = read_log(folder / launch.LOG).parameters  # as fairseq counted
    assert written["parameters"]["total"] == total > written["parameters"]["active"]


def test_a_folder_of_another_origin_is_left_alone(corpus, tmp_path, capsys):
    folder = tmp_path / "switch-2-seed1"
    folder.mkdir()
    (folder / "checkpoint_last.pt").write_bytes(b"of somebody")
    assert cli.main(command(corpus, tmp_path)) == 2
    assert "holds checkpoints, but no run.json" in capsys.readouterr().err
    assert (folder / "checkpoint_last.pt").read_bytes() == b"of somebody"


def test_only_one_process_trains_in_a_folder(tmp_path):
    with process.sole_user(tmp_path) as inherited:
        heir = subprocess.Popen(["sleep", "60"], pass_fds=inherited)
    with (
        pytest.raises(UserError, match="another process is training in"),
        process.sole_user(tmp_path),
    ):
        pass
    heir.kill()
    heir.wait()
    with process.sole_user(tmp_path):
        pass


def test_the_newest_whole_checkpoint_takes_the_place_of_a_damaged_one(tmp_path):
    assert checkpoints.mend_last(tmp_path) is None
    for age, name in enumerate(["checkpoint_1_4.pt", "checkpoint_1_2.pt", "checkpoint_average.pt"]):
        torch.save({"name": name}, tmp_path / name)
        os.utime(tmp_path / name, (1000 - age, 1000 - age))
    (tmp_path / "checkpoint_1_6.pt").write_bytes((tmp_path / "checkpoint_1_4.pt").read_bytes()[:99])
    last = tmp_path / "checkpoint_last.pt"
    last.write_bytes(b"")
    assert checkpoints.mend_last(tmp_path).name == "checkpoint_1_4.pt"
    assert commands.load(last) == {"name": "checkpoint_1_4.pt"}
    assert checkpoints.mend_last(tmp_path) is None
    data = bytearray(last.read_bytes())
    data[data.index(b"checkpoint_1_4")] ^= 1  # one bit
    last.write_bytes(data)
    assert checkpoints.mend_last(tmp_path).name == "checkpoint_1_4.pt"
    for path in tmp_path.glob("checkpoint*.pt"):
        path.write_bytes(b"")
    with pytest.raises(UserError, match=r"checkpoint_last\.pt is damaged, and so is every other"):
        checkpoints.mend_last(tmp_path)


def test_record_of_a_checkout(tmp_path):
    assert record.git_state(tmp_path) is None
    assert record.read_record(tmp_path) == {}
    (tmp_path / record.RECORD).write_text("{")
    with pytest.raises(UserError, match=r"cannot read .*run\.json"):
        record.read_record(tmp_path)


# Sweeps


@pytest.fixture(scope="module")
def tiny_configs(corpus, tmp_path_factory):
    """The configs, and a schedule that makes everything tiny."""
    configs = shutil.copytree(CONFIGS, tmp_path_factory.mktemp("sweep") / "configs")
    tiny = {
        "task": {"data": str(corpus / "bin")},
        "common": {"cpu": True, "fp16": False, "user_dir": str(settings.PACKAGE)},
        "model": TINY_MODEL,
        "optimization": {"max_update": 2, "update_freq": [1]},
        "dataset": {"max_tokens": 200, "num_workers": 0},
    }
    text = OmegaConf.to_yaml(OmegaConf.create(tiny))
    # As a group of its own, after all others.
    (configs / "size").mkdir()
    (configs / "size" / "tiny.yaml").write_text(f"# @package _global_\n{text}")
    primary = configs / "wmt14.yaml"
    defaults = "  - gpus: one\n"
    assert defaults in primary.read_text()
    primary.write_text(primary.read_text().replace(defaults, f"{defaults}  - size: tiny\n"))
    return configs


def sweep(configs, folder, *arguments):
    commands.run(
        "fairseq_cli.hydra_train",
        *("--config-dir", configs, "--config-name", "wmt14", "--multirun", *arguments),
        cwd=folder,
    )
    runs, with_best = (
        {
            str(path.parent.relative_to(folder / "runs" / "wmt14"))
            for path in (folder / "runs").rglob(name)
        }
        for name in ("checkpoint_last.pt", "checkpoint_best.pt")
    )
    # fairseq alone lets the runs of a sweep compete for the best checkpoint.
    assert runs == with_best
    return runs


def test_a_sweep_trains_the_runs_of_the_table(tiny_configs, tmp_path):
    arguments = ["experts=two,four", "model.router=switch,sparsemixer"]
    assert sweep(tiny_configs, tmp_path, *arguments) == {
        "switch-2-seed1",
        "sparsemixer-2-seed1",
        "switch-4-seed1",
        "sparsemixer-4-seed1",
    }


def test_a_sweep_over_processes_of_its_own(tiny_configs, tmp_path):
    """submitit's way of starting jobs, which Slurm's is, too."""
    arguments = ["hydra/launcher=submitit_local", "experts=dense", "schedule=short"]
    assert sweep(tiny_configs, tmp_path, *arguments) == {"schedule=short/dense-seed1"}


# Scripts


@pytest.mark.parametrize("name", ["train_wmt14.sh", "train_wmt14.sbatch"])
def test_scripts_are_bash(name):
    subprocess.run(["bash", "-n", SCRIPTS / name], check=True)


def test_job_starts_every_node_and_is_handed_in_again(tmp_path):
    """Under a stand-in for Slurm: srun waits, and the signal before the limit requeues the job."""
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "environment.sh").touch()
    stubs = {
        "scontrol": 'echo "$@" >>calls; echo first; echo second',
        "srun": 'echo "srun $MASTER_ADDR $MASTER_PORT $@" >>calls; sleep 60 & wait; exit 1',
    }
    for name, text in stubs.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    environment = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "SLURM_JOB_NODELIST": "list",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_ID": "40003",
        "SLURM_CPUS_PER_TASK": "16",
    }
    job = subprocess.Popen(
        ["bash", SCRIPTS / "train_wmt14.sbatch", "--experts", "8"],
        env=environment,
        stdout=subprocess.PIPE,
        start_new_session=True,
        text=True,
    )
    calls = tmp_path / "calls"

    def wait_for(text):
        deadline = time.monotonic() + 30
        while not calls.is_file() or text not in calls.read_text():
            assert time.monotonic() < deadline
            time.sleep(0.02)

    try:
        wait_for(
            "srun first 20003 --kill-on-bad-exit=1 --cpus-per-task=16 scripts/train_wmt14.sh "
            "--nodes 2 --experts 8\n"
        )
        job.send_signal(signal.SIGUSR1)
        wait_for("requeue 40003\n")
    finally:
        os.killpg(job.pid, signal.SIGKILL)
        job.communicate()


@pytest.mark.parametrize("gpu", [False, True])
def test_training_on_a_cpu_keeps_the_memory_that_it_releases(gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "5")
    monkeypatch.delenv("MALLOC_MMAP_MAX_", raising=False)
    names = ("MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_")
    log = tmp_path / "log"
    code = f"import os; print([os.environ.get(name) for name in {names}])"
    process.run_with_progress([sys.executable, "-c", code], log)
    assert log.read_text() == f"{[None if gpu else '0', '5']}\n"  # the user's own setting stays
