"""The benchmarks run; what they measure is nobody's test."""

import argparse
import json

import pytest
import torch
from support import commands

from benchmarks import layer, measuring, models
from fairseq_sparsemixer.moe import ROUTERS, MoEFeedForward

TINY_MODEL = {"embed-dim": 16, "ffn-dim": 32, "heads": 2, "layers": 2, "vocabulary": 100}
KIB = 1 << 10


def run(name, output, *arguments, **settings):
    """What a benchmark of two rounds on the CPU writes, and what it prints."""
    settings = {"device": "cpu", "repetitions": 2, "output": output, **settings}
    words = [*arguments, *commands.flags(settings)]
    result = commands.run(f"benchmarks.{name}", *words, cwd=commands.PACKAGE.parent)
    results = json.loads(output.read_text())
    if "machine" in results:
        assert results["machine"]["device"] and results["machine"]["torch"] == torch.__version__
        assert measuring.in_words(results["machine"]) in result.stdout
    return results, result.stdout


def test_cost_of_a_layer(tmp_path):
    output = tmp_path / "layer.json"
    arguments = ("--tokens", 40, "--num-experts", 2, 4, "--size", "8,16")
    more = ("--router", "sparsemixer", "--backend", "auto", "loop", "--recompute")
    results, printed = run("layer", output, *arguments, *more)
    # Two backends beside three yardsticks, with and without recompute where that matters.
    assert len(results["rows"]) == 2 * (3 + 2) + 2 * (3 + 4)
    for row in results["rows"]:
        assert len(row["seconds"]) == 2 and 1 <= row["calls"] <= layer.MOST_CALLS
        if row["mode"] == layer.BACKWARD:
            assert row["peak_bytes"] > 0
        elif row["arm"] != layer.LOOP:
            experts = row["num_experts"] if "router" in row else 1
            assert row["weight_bytes"] == experts * 4 * (8 * 16 * 2 + 8 + 16)
        if "router" in row:
            assert 0 < row["smallest_share"] <= 1 / row["num_experts"] <= row["largest_share"] < 1
    again = commands.run("benchmarks.layer", "--table", output, output, cwd=commands.PACKAGE.parent)
    machine, tables = printed.split("\n\n", 1)
    assert again.stdout == f"{machine}\n\n{tables}{tables}"
    assert tables.count("\n| sparsemixer, loop, recompute ") == 2


def test_without_settings_a_layer_is_measured_in_the_default_cases():
    for device, cases in layer.DEFAULT_CASES.items():
        assert layer.cases(layer.build_parser().parse_args(["--device", device])) == cases


def test_yardsticks_compute_what_the_layer_computes():
    torch.manual_seed(0)
    moe = MoEFeedForward(8, 16, 4, router="switch").eval()
    x = torch.randn(50, 8)
    torch.testing.assert_close(layer.LoopOverModules(moe)(x), moe(x)[0])
    dense = layer.Dense(8, 16)
    if layer.has_onednn():
        with torch.no_grad():
            torch.testing.assert_close(layer.OneDNNDense(dense)(x), dense(x))
        x.requires_grad_()
        gradients = [
            torch.autograd.grad(module(x).square().sum(), [x, *dense.parameters()])
            for module in (dense, layer.OneDNNDense(dense))
        ]
        torch.testing.assert_close(*gradients)


def test_a_layer_laid_out_for_inference(tmp_path):
    settings = ("--mode", "forward", "--tokens", 64, "--num-experts", 2, "--size", "256,512")
    results, _ = run("layer", tmp_path / "layer.json", *settings, "--laid-out")
    rows = [row for row in results["rows"] if row.get("router") == "switch"]
    arms = [row["arm"] for row in rows]
    assert arms == ["switch", "switch, laid out, float32", "switch, laid out, bfloat16"]
    of_experts = 2 * (2 * 256 * 512 + 256 + 512)
    assert [row["weight_bytes"] / of_experts for row in rows] == [4, 4, 2]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_peak_memory_of_known_allocations(device):
    def take(kib):
        return torch.empty(kib * KIB, dtype=torch.uint8, device=device)

    before = [take(64)]

    def step():
        before.clear()  # takes nothing off what the step itself holds
        first, second = take(1000), take(2000)
        del first
        third = take(4000)
        del third, second
        take(5000)

    assert measuring.peak_bytes(step, [], device) == 6000 * KIB


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_peak_memory_without_gradients(device):
    weight = torch.ones(256 * KIB, device=device, requires_grad=True)

    def step():
        weight.grad = None
        weight.sum().backward()
        torch.empty(500 * KIB, dtype=torch.uint8, device=device)

    for _ in range(2):  # the second time there is an old gradient
        assert measuring.peak_bytes(step, [weight], device) == 500 * KIB
        assert measuring.peak_bytes(step, [], device) == (1024 + 500) * KIB


def test_peak_memory_of_a_dense_network():
    tokens, embed_dim, ffn_dim = 64, 128, 256
    dense = layer.Dense(embed_dim, ffn_dim)
    x = torch.randn(tokens, embed_dim, requires_grad=True)

    def step():
        for tensor in (x, *dense.parameters()):
            tensor.grad = None
        dense(x).sum().backward()

    # When the derivative of the activation is taken: the inner layer, its gradient after and
    # before the activation. The output is gone by then, its gradient is one number.
    expected = 4 * tokens * 3 * ffn_dim
    assert expected <= measuring.peak_bytes(step, dense.parameters(), "cpu") < 1.1 * expected


def test_words_per_second_of_training(tmp_path):
    results, printed = run(
        "train", tmp_path / "train.json", **TINY_MODEL, **{"num-experts": 2, "max-tokens": 100}
    )
    rows = {row["arm"]: row for row in results["rows"]}
    assert list(rows) == ["dense", "switch", "sparsemixer"]
    assert rows["switch"]["parameters"] > rows["dense"]["parameters"]
    # With one expert a token, only the routers are more than what the dense model has.
    routers = 2 * (2 * 16 + 2)
    assert rows["switch"]["active_parameters"] == rows["dense"]["active_parameters"] + routers
    for row in rows.values():
        assert len(row["seconds"]) == 2 and all(50 < words <= 100 for words in row["words"])
    assert printed.count("\n| ") == 5


def test_what_every_router_costs_in_training(tmp_path):
    settings = {**TINY_MODEL, "ffn-dim": 256, "num-experts": 8, "max-tokens": 100}
    results, _ = run("train", tmp_path / "train.json", **settings, router="all", repetitions=1)
    rows = {row["arm"]: row for row in results["rows"]}
    assert rows.keys() == {"dense", *ROUTERS} - {"language"}
    # Every expert's inner layer is held, not one expert's.
    assert rows["reinmax"]["peak_bytes"] > 1.5 * rows["switch"]["peak_bytes"]


def test_options_of_the_routers_that_are_measured():
    parser = argparse.ArgumentParser()
    models.add_arguments(parser)
    parser.set_defaults(device="cpu")
    options = '{"prediction": "linear"}'
    args = parser.parse_args(["--router", "sparsemixer-cv", "--router-options", options])
    _, router = models.arms(args)
    assert models.configuration(args, router, data="").model.router_options == options


def test_tokens_per_second_of_generation(tmp_path):
    results, printed = run(
        "generate",
        tmp_path / "generate.json",
        *("--sentences", 1, 3),
        **TINY_MODEL,
        **{"num-experts": 2, "length": 6},
    )
    rows = results["rows"]
    models = ["dense", "switch", "sparsemixer"]
    laid_out = [f"{model}, laid out{more}" for model in models for more in ("", ", int8")]
    assert [row["arm"] for row in rows[:9]] == [*models, *laid_out]
    assert {(row["beam"], row["sentences"]) for row in rows} == {(4, 1), (4, 3), (1, 1), (1, 3)}
    for row in rows:
        assert row["tokens"] == 6 * row["sentences"] and len(row["seconds"]) == 2
        assert len(row["experts"]) == (row["model"] != "dense")  # one decoder layer has experts
        if row["arm"].endswith(("laid out", *models)):
            assert row["alike"] == row["sentences"]
    assert printed.count("\n| ") == 4 * 2 + len(rows)
