"""What the command says that a run will need."""

import pytest
import torch
from support.wmt14 import TINY, TINY_MODEL, compose, gpus, plan_for

from fairseq_sparsemixer import cli
from fairseq_sparsemixer.moe.feed_forward import moe_layers
from fairseq_sparsemixer.runs.arms import build_variant
from fairseq_sparsemixer.training import dry_run as report
from fairseq_sparsemixer.training import plan, resources
from fairseq_sparsemixer.training.machine import (
    Machine,
)


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
    monkeypatch.setattr(plan, "find_machine", lambda *_: gpus(8))
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


def test_experts_that_are_spread_take_their_share_of_memory(monkeypatch):
    plain, spread = (
        plan_for(gpus(4), monkeypatch, *(f"model.expert_parallel_size={group}" for group in groups))
        for groups in ([], [4])
    )
    before, after = (
        report._memory_parts(launch, half=True, workers=4) for launch in (plain, spread)
    )
    experts = resources.expert_parameters(plain.model)
    assert before["weights"] - after["weights"] == 2 * experts * 3 // 4
    assert after["buffer of legacy_ddp"] == before["weights"] - 2 * experts
