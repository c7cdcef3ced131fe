"""The formulas of what an update costs, and what counts the bytes."""

import json
import socket

import pytest
import torch
from fairseq.models import build_model
from support import commands

from benchmarks import exchanges, models, scaling
from benchmarks.scaling import PARALLEL, REPLICATED, SHARDED, Cluster, Shape
from fairseq_sparsemixer.training.resources import count_parameters

EVEN = [[0.25] * 4]
SHAPE = Shape(embed_dim=1000, layers=2, expert=8_000_000, shared=10_000_000, activations=0)
"""Experts of f = 4000, but for their biases."""


@pytest.fixture(scope="module")
def base():
    return scaling.shape_of("base")


def test_the_shape_is_that_of_a_model(base):
    parser = scaling.argparse.ArgumentParser()
    models.add_arguments(parser)
    args = parser.parse_args(["--num-experts", "6"])
    args.device = "cpu"
    with torch.device("meta"):
        cfg = models.configuration(args, "switch", data="")
        model = build_model(cfg.model, models.RandomWords(args.vocabulary))
    assert base.total(6) == count_parameters(model).total
    assert (base.layers, base.embed_dim) == (6, 512)


def test_bytes_by_hand():
    assert (
        scaling.all_reduce_bytes(8.0, 4) == 2 * 6
    )  # around the ring, there and back: 3 of 4 parts
    assert scaling.all_to_all_bytes(8.0, 4) == 6
    sent = scaling.cost(PARALLEL, SHAPE, 8, 16, 4, 1.0, Cluster()).sent
    rest = SHAPE.shared + 2 * 1001 * 6  # routers of 8, not 2
    assert sent["gradients"] == pytest.approx(2 * 2 * rest * 15 / 16)
    assert sent["gradients of experts"] == pytest.approx(2 * 2 * 2 * 2 * 8_000_000 * 3 / 4)
    assert sent["tokens"] == pytest.approx(4 * 2 * 2 * 8192 * 1000 * 3 / 4)


def test_expert_parallel_sends_less_from_as_many_experts_as_it_is_told():
    """Where N f is more than the tokens of a worker, whatever the workers."""
    for experts, less in ((2, False), (4, True)):  # f is 4000, and tokens are 8192
        of_experts = scaling.cost(REPLICATED, SHAPE, experts, 2, 1, 1.0, Cluster()).sent
        tokens = scaling.cost(PARALLEL, SHAPE, experts, 2, 2, 1.0, Cluster()).sent["tokens"]
        assert (of_experts["gradients of experts"] > tokens) is less


def test_memory_and_time_by_hand():
    cluster = Cluster(reached=1.0, latency=0.0)
    whole, shared, sharded = (
        scaling.cost(way, SHAPE, 8, 8, group, 1.0, cluster)
        for way, group in ((REPLICATED, 1), (PARALLEL, 8), (SHARDED, 1))
    )
    total = SHAPE.total(8)
    assert whole.memory["state"] == pytest.approx(22 * total)  # 2 for the buffer of legacy_ddp
    spread = 16 * 8_000_000  # which the buffer has no room for
    assert shared.memory["state"] == pytest.approx(22 * (total - spread) + 20 * spread / 8)
    assert sharded.memory["state"] == pytest.approx(20 * total / 8)
    assert sharded.seconds["weights and gradients"] == pytest.approx(
        1.5 * 2 * 7 / 8 * 2 * total / cluster.link
    )
    rows = 2 * 8192 * 1000
    assert shared.seconds["tokens"] == pytest.approx(2 * 4 * 7 / 8 * rows / cluster.link)
    # Across nodes: the part that leaves the node, by the port of the worker.
    assert scaling.all_to_all_seconds(rows, 16, cluster) == pytest.approx(rows / 2 / cluster.port)
    uneven = scaling.cost(PARALLEL, SHAPE, 8, 8, 8, 1.5, cluster)
    assert uneven.seconds["tokens"] == pytest.approx(1.5 * shared.seconds["tokens"])
    assert uneven.sent == shared.sent


def test_uneven_loads():
    assert scaling.of_workers([0.1, 0.2, 0.3, 0.4], 2) == pytest.approx([0.3, 0.7])
    assert set(scaling.unevenness(EVEN, 8, 4)) == {1.0}
    assert set(scaling.unevenness([[1.0, 0.0], [0.5, 0.5]], 8, 1)) == {1.0}
    found = scaling.unevenness([[0.7, 0.1, 0.1, 0.1]], 64, 8)
    assert found == sorted(found) and found[0] > 1 and found[-1] < 8
    assert sum(scaling.unevenness([[0.7, 0.1, 0.1, 0.1]], 64, 64)) > sum(found)


def test_the_simplest_way_that_is_fast_enough_is_taken():
    def made(way, seconds, fits=True):
        return {"way": way, "group": 1, "fits": fits, "seconds": {"computing": seconds}}

    ways = [made(REPLICATED, 1.1), made(PARALLEL, 1.3), made(SHARDED, 1.0)]
    assert scaling.to_take(ways)["way"] == REPLICATED
    assert scaling.to_take([made(REPLICATED, 1.1, fits=False), *ways[1:]])["way"] == SHARDED
    assert scaling.to_take([made(REPLICATED, 1.2), *ways[1:]])["way"] == SHARDED
    assert scaling.to_take([made(way, 1.0, fits=False) for way in (REPLICATED, SHARDED)]) is None


def test_the_committed_results_are_drawn_again(tmp_path, capsys, monkeypatch):
    results = commands.PACKAGE.parent / "docs" / "results" / "scaling.json"
    arguments = ["scaling", "--table", str(results), "--figure", str(tmp_path)]
    monkeypatch.setattr("sys.argv", arguments)
    scaling.main()
    assert "| 1024    |     51.7 G |" in capsys.readouterr().out
    assert (tmp_path / "scaling.svg").stat().st_size > 10_000


def test_the_kernels_count_is_ours():
    server = socket.create_server(("localhost", 0))
    with server, socket.create_connection(server.getsockname()) as one, server.accept()[0] as other:
        before = exchanges.bytes_sent()
        one.sendall(b"x" * 1000)
        other.recv(1000, socket.MSG_WAITALL)
        assert exchanges.bytes_sent() - before == 1000


@pytest.mark.slow
def test_workers_send_what_the_formulas_say(tmp_path):
    """Of large tensors to a thousandth; small ones have headers."""
    output = tmp_path / "exchanges.json"
    arguments = ["--repetitions", 2, "--shares", 0.1, 0.2, 0.3, 0.4, "--output", output]
    commands.run("benchmarks.exchanges", *arguments, cwd=commands.PACKAGE.parent)
    rows = json.loads(output.read_text())["rows"]
    assert {row["workers"] for row in rows} == {2, 4}
    for row in (row for row in rows if row["bytes"] > 1e6):
        assert row["sent_bytes"] == pytest.approx(row["foretold_bytes"], rel=0.01), row
