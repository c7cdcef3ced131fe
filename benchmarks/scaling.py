"""What an update costs each worker, and which way of spreading experts to take (docs/scaling.md).

  python -m benchmarks.scaling --loads RUN/points.jsonl --output scaling.json --figure FOLDER
  python -m benchmarks.scaling --table scaling.json

Computed, not measured: formulas for memory, bytes sent and seconds, and figures of data sheets.
Three ways: ``replicated``, all experts in each worker; ``expert-parallel g``, each worker of a
group of g holds 1/g of them, and tokens travel; ``fully_sharded``, each holds a part of every
tensor, and weights travel. Expert-parallel workers wait for the one with the most tokens: how many
those are is drawn from the shares that experts of a trained model had. What the formulas say of
bytes is held against counts by benchmarks.exchanges.
"""

import argparse
import functools
import itertools
import random
from pathlib import Path
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import torch
from fairseq.models import build_model

from benchmarks import models
from benchmarks.measuring import Record, output_file
from fairseq_sparsemixer.files import read_json, write_json
from fairseq_sparsemixer.moe.feed_forward import moe_layers
from fairseq_sparsemixer.plotting import COLOURS, pyplot, save
from fairseq_sparsemixer.runs.points import read_points
from fairseq_sparsemixer.tables import markdown
from fairseq_sparsemixer.training import resources

REPLICATED, SHARDED, PARALLEL = "replicated", "fully_sharded", "expert-parallel"
SIZES: Dict[str, Record] = {
    "base": {"embed_dim": 512, "ffn_dim": 2048, "heads": 8},
    "big": {"embed_dim": 1024, "ffn_dim": 4096, "heads": 16},
}
"""Transformers of six layers a side; every other has experts."""
EXPERTS = (8, 32, 128, 1024)
WORKERS = (8, 16, 32, 64, 128, 256)
TOKENS = 8192
"""Of a worker in an update, on each side."""
CLOSE = 0.15
"""Of the fastest way's time, which a simpler one may take more: none of this is truer than that."""
DRAWS = 400
WIDTH = 2
"""Bytes of a number that is sent, in half precision."""
TRAFFIC = 52
"""Bytes of memory that fairseq's step reads and writes for a parameter in half precision: gradient
to fp32 (6), scaled (8), its norm (4), Adam (28), weight to half precision (6)."""


class Cluster(NamedTuple):
    """GPUs, as data sheets have them, and what is assumed besides.

    The defaults are NVIDIA's data sheets of the H100 SXM (80 GB, 3.35 TB/s, NVLink 900 GB/s both
    ways) and of the DGX H100 (eight of them, and a port of 400 Gb/s for each).

    Attributes:
        per_node: GPUs of a node.
        memory: bytes of a GPU.
        memory_bandwidth, link, port: bytes a second of a GPU, of memory, to others of its node, and
            to other nodes.
        tflops: peak in half precision.
        reached: assumed share of the bandwidths that is reached.
        usable: assumed share of the memory that is training's.
        latency: assumed seconds of an exchange among few workers, however small.
    """

    per_node: int = 8
    memory: float = 80e9
    memory_bandwidth: float = 3.35e12
    link: float = 450e9
    port: float = 50e9
    tflops: int = resources.PEAK_TFLOPS["H100"]
    reached: float = 0.7
    usable: float = 0.9
    latency: float = 30e-6


class Shape(NamedTuple):
    """Parameters of a model, and what its batches take.

    Attributes:
        embed_dim: d.
        layers: with experts.
        expert: parameters of one expert of one layer.
        shared: all other parameters; of a router, those for two experts.
        activations: bytes, of :data:`TOKENS` tokens.
    """

    embed_dim: int
    layers: int
    expert: int
    shared: int
    activations: int

    def total(self, experts: int) -> int:
        """Parameters of the model with so many experts in a layer."""
        routers = self.layers * (self.embed_dim + 1) * (experts - 2)
        return self.shared + routers + self.layers * experts * self.expert


def shape_of(size: str) -> Shape:
    """The shape of a model of :data:`SIZES`, counted."""
    parser = argparse.ArgumentParser()
    models.add_arguments(parser)
    parser.set_defaults(**SIZES[size], num_experts=2, device="cpu")
    args = parser.parse_args([])
    with torch.device("meta"):
        cfg = models.configuration(args, "switch", data="")
        model = build_model(cfg.model, models.RandomWords(args.vocabulary))
    layers = list(moe_layers(model))
    expert = sum(p.numel() for p in layers[0].experts.parameters()) // 2
    total = resources.count_parameters(model).total
    activations = sum(resources.activation_bytes(model, TOKENS, half=True).values())
    shared = total - len(layers) * 2 * expert
    return Shape(args.embed_dim, len(layers), expert, shared, activations)


# Bytes that a worker sends


def all_reduce_bytes(size: float, workers: int) -> float:
    """Of a tensor of ``size`` bytes that is summed, around a ring: 2 (W - 1) / W of it."""
    return 2 * (workers - 1) / workers * size


def all_to_all_bytes(size: float, workers: int) -> float:
    """Of ``size`` bytes of tokens, in the mean over workers: all but what stays, (W - 1) / W."""
    return (workers - 1) / workers * size


# Seconds


def all_reduce_seconds(size: float, inside: int, nodes: int, cluster: Cluster) -> float:
    """Of a sum over ``inside`` workers of each of so many nodes; the slower way counts.

    What leaves a node is shared by the ports of its workers.
    """
    if inside * nodes == 1 or not size:
        return 0.0
    within = all_reduce_bytes(size, inside) / cluster.link
    between = all_reduce_bytes(size, nodes) / (inside * cluster.port)
    return cluster.latency + max(within, between) / cluster.reached


def all_to_all_seconds(size: float, group: int, cluster: Cluster) -> float:
    """Of an exchange of ``size`` bytes of tokens in a group; both ways are used at once."""
    inside = min(group, cluster.per_node)
    within = (inside - 1) / group * size / cluster.link
    between = (group - inside) / group * size / cluster.port
    return cluster.latency + max(within, between) / cluster.reached


class Cost(NamedTuple):
    """Of an update, for each worker.

    Attributes:
        memory: bytes, by part.
        sent: bytes, by exchange.
        seconds: by part; exchanges do not overlap with computing.
    """

    memory: Dict[str, float]
    sent: Dict[str, float]
    seconds: Dict[str, float]


def cost(
    way: str, shape: Shape, experts: int, workers: int, group: int, uneven: float, cluster: Cluster
) -> Cost:
    """Of a way of spreading experts.

    Args:
        way: one of the three.
        shape: of the model.
        experts: N, of each layer.
        workers: W.
        group: g, that share the experts; 1 where each holds all.
        uneven: tokens of the worker with the most over their mean (:func:`unevenness`).
        cluster: they run on.
    """
    inside, nodes = min(workers, cluster.per_node), -(-workers // cluster.per_node)
    total = shape.total(experts)
    of_experts = shape.layers * experts * shape.expert
    rest, own = total - of_experts, of_experts // group
    held = total / workers if way == SHARDED else rest + own
    of_ddp = 1 if way == SHARDED else workers
    spread = own if way == PARALLEL else 0
    state = resources.state_bytes(int(held), half=True, workers=of_ddp, spread=spread)
    memory: Dict[str, float] = {"state": sum(state.values()), "activations": shape.activations}
    sent, seconds = {}, {}
    flops = 6.0 * TOKENS * 1e-12 / (cluster.tflops * resources.UTILISATION)
    active = shape.layers * shape.expert
    seconds["computing"] = flops * (rest + active * uneven)
    seconds["optimiser"] = TRAFFIC * held / cluster.memory_bandwidth / cluster.reached
    if way == SHARDED:
        # fairscale gathers a layer's weights twice, and scatters the sum of its gradients.
        unit = max(experts * shape.expert, rest)
        memory["whole layer"] = 2 * WIDTH * unit
        sent["weights and gradients"] = 1.5 * all_reduce_bytes(WIDTH * total, workers)
        seconds["weights and gradients"] = 1.5 * all_reduce_seconds(
            WIDTH * total, inside, nodes, cluster
        )
        return Cost(memory, sent, seconds)
    sent["gradients"] = all_reduce_bytes(WIDTH * rest, workers)
    seconds["gradients"] = all_reduce_seconds(WIDTH * rest, inside, nodes, cluster)
    replicas = workers // group
    if replicas > 1:
        peers = max(1, inside // group)
        sent["gradients of experts"] = all_reduce_bytes(WIDTH * own, replicas)
        seconds["gradients of experts"] = all_reduce_seconds(
            WIDTH * own, peers, replicas // peers, cluster
        )
    if group > 1:
        rows = WIDTH * TOKENS * shape.embed_dim
        memory["tokens of others"] = 2 * rows * uneven * shape.layers
        # There and back, and the same for their gradients.
        sent["tokens"] = 4 * shape.layers * all_to_all_bytes(rows, group)
        once = all_to_all_seconds(rows * uneven, group, cluster)
        seconds["tokens"] = shape.layers * (4 * once + cluster.latency)  # their numbers first
    return Cost(memory, sent, seconds)


# Loads that are not even


def of_workers(shares: Sequence[float], workers: int) -> List[float]:
    """The shares of workers that hold so many neighbouring experts each."""
    own = len(shares) // workers or 1
    return [sum(shares[i * own : (i + 1) * own]) for i in range(workers)]


def unevenness(layers: Sequence[Sequence[float]], experts: int, group: int) -> List[float]:
    """Tokens of the worker with the most over their mean: :data:`DRAWS` of a layer, sorted.

    Experts are drawn from those of the trained layers, each with its load over the mean of its
    layer, and dealt out in the order in which they come. So, loads of more experts than were
    trained are as uneven as those, and no two of them go together.
    """
    pool = [share * len(shares) for shares in layers for share in shares]
    rng = random.Random(0)
    found = []
    for _ in range(DRAWS):
        drawn = rng.choices(pool, k=experts)
        found.append(group * max(of_workers(drawn, group)) / sum(drawn))
    return sorted(found)


# Which way to take


def ways(experts: int, workers: int) -> Iterator[Tuple[str, int]]:
    """Each way, and the size of its group."""
    yield REPLICATED, 1
    yield SHARDED, 1
    for group in (2**n for n in range(1, 11)):
        if workers % group == 0 and experts % group == 0:
            yield PARALLEL, group


def compare(layers: Sequence[Sequence[float]], cluster: Optional[Cluster] = None) -> List[Record]:
    """A row for each size, number of experts and of workers, with the best of each way."""
    cluster = cluster or Cluster()
    shapes = {size: shape_of(size) for size in SIZES}
    even = functools.lru_cache(None)(lambda *counts: unevenness(layers, *counts))

    def found(shape: Shape, way: str, experts: int, workers: int, group: int) -> Record:
        draws = even(experts, group)
        mean = sum(draws) / len(draws)
        one = cost(way, shape, experts, workers, group, mean, cluster)
        fits = sum(one.memory.values()) <= cluster.usable * cluster.memory
        return {"way": way, "group": group, "uneven": mean, "fits": fits, **one._asdict()}

    rows = []
    for size, experts, workers in itertools.product(SIZES, EXPERTS, WORKERS):
        shape = shapes[size]
        every = [found(shape, way, experts, workers, g) for way, g in ways(experts, workers)]
        costs = [
            best(every, way) or min((c for c in every if c["way"] == way), key=seconds_of)
            for way in (REPLICATED, PARALLEL, SHARDED)
        ]
        key = {"size": size, "experts": experts, "workers": workers}
        rows.append({**key, "parameters": shape.total(experts), "costs": costs})
    return rows


def seconds_of(found: Record) -> float:
    """Of an update."""
    return float(sum(found["seconds"].values()))


def best(costs: Sequence[Record], way: Optional[str] = None) -> Optional[Record]:
    """The fastest that fits into memory, of a way or of all; None where none does."""
    possible = [c for c in costs if c["fits"] and way in (None, c["way"])]
    return min(possible, key=seconds_of, default=None)


def to_take(costs: Sequence[Record]) -> Optional[Record]:
    """The simplest way whose best is within :data:`CLOSE` of the fastest; None where none fits."""
    fastest = best(costs)
    for way in (REPLICATED, PARALLEL, SHARDED):
        found = best(costs, way)
        if found and fastest and seconds_of(found) <= (1 + CLOSE) * seconds_of(fastest):
            return found
    return None


def _named(costs: Sequence[Record]) -> str:
    found = to_take(costs)
    if found is None:
        return "none fits"
    group = f" {found['group']}" if found["way"] == PARALLEL else ""
    return f"{found['way']}{group}, {1000 * seconds_of(found):.0f} ms"


def table(results: Record) -> str:
    """The way to take, by experts and workers, for each size."""
    texts = []
    for size in SIZES:
        cells = [["experts", "parameters", *(f"{workers} GPUs" for workers in WORKERS)]]
        for experts in EXPERTS:
            own = [r for r in results["rows"] if (r["size"], r["experts"]) == (size, experts)]
            total = f"{own[0]['parameters'] / 1e9:.1f} G"
            cells.append([str(experts), total, *(_named(row["costs"]) for row in own)])
        texts.append(f"{size}\n\n{markdown(cells)}")
    return "\n\n".join(texts)


# The figure

_STYLES = {
    REPLICATED: (COLOURS["black"], "s"),
    PARALLEL: (COLOURS["blue"], "o"),
    SHARDED: (COLOURS["vermilion"], "^"),
}
_SHOWN = ("big", 64)
"""Size and workers of the first panel."""


def draw(results: Record, folder: Path) -> List[Path]:
    """Time over experts, the way to take, and what uneven loads cost."""
    figure, axes = pyplot().subplots(1, 3, figsize=(10, 3.5), layout="constrained")
    _draw_seconds(axes[0], results["rows"])
    _draw_choice(axes[1], results["rows"])
    _draw_unevenness(axes[2], list(results["loads"]["layers"].values()))
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize="small")
    return save(figure, folder, "scaling")


def _draw_seconds(axis: Any, rows: List[Record]) -> None:
    own = [row for row in rows if (row["size"], row["workers"]) == _SHOWN]
    for way, (colour, marker) in _STYLES.items():
        found = [(row["experts"], best(row["costs"], way)) for row in own]
        fitting = [(n, 1000 * seconds_of(c)) for n, c in found if c is not None]
        axis.plot(*zip(*fitting), color=colour, marker=marker, ms=4, lw=1.2, label=way)
        if len(fitting) < len(found):
            axis.annotate("more do\nnot fit", fitting[-1], (-4, 8), color=colour, ha="right",
                          textcoords="offset points", fontsize="x-small")  # fmt: skip
    axis.set(xscale="log", yscale="log", xlabel="experts of a layer", ylabel="ms of an update")
    axis.set_xticks(EXPERTS, list(map(str, EXPERTS)))
    axis.set_xticks([], minor=True)
    axis.set_title(f"Transformer {_SHOWN[0]} on {_SHOWN[1]} H100", fontsize="medium")
    axis.grid(alpha=0.3)


def _draw_choice(axis: Any, rows: List[Record]) -> None:
    for row in (r for r in rows if r["size"] == _SHOWN[0]):
        place = WORKERS.index(row["workers"]), EXPERTS.index(row["experts"])
        found = to_take(row["costs"])
        colour, text = COLOURS["grey"], "none\nfits"
        if found is not None:
            colour = _STYLES[found["way"]][0]
            text = str(found["group"]) if found["way"] == PARALLEL else ""
        axis.add_patch(pyplot().Rectangle(place, 0.94, 0.94, color=colour, alpha=0.8))
        axis.text(place[0] + 0.47, place[1] + 0.47, text, ha="center", va="center",
                  color="white", fontsize="small")  # fmt: skip
    axis.set(xlim=(0, len(WORKERS)), ylim=(0, len(EXPERTS)), xlabel="GPUs", ylabel="experts")
    axis.set_xticks([i + 0.47 for i in range(len(WORKERS))], list(map(str, WORKERS)))
    axis.set_yticks([i + 0.47 for i in range(len(EXPERTS))], list(map(str, EXPERTS)))
    axis.tick_params(length=0)
    axis.set_title("What to take (number: g)", fontsize="medium")


def _draw_unevenness(axis: Any, layers: List[List[float]]) -> None:
    groups = (2, 4, 8, 16, 32, 64, 128)
    for experts, colour in ((32, "sky"), (128, "blue"), (1024, "purple")):
        own = [group for group in groups if group <= experts]
        draws = [unevenness(layers, experts, group) for group in own]
        axis.plot(own, [d[len(d) // 2] for d in draws], color=COLOURS[colour], marker="o", ms=3,
                  lw=1.2, label=f"{experts} experts")  # fmt: skip
        low, high = ([d[int(part * len(d))] for d in draws] for part in (0.1, 0.9))
        axis.fill_between(own, low, high, color=COLOURS[colour], alpha=0.2, lw=0)
    axis.axhline(1, color=COLOURS["grey"], ls=":", lw=1)
    axis.set_xscale("log", base=2)
    axis.set(xlabel="workers that share the experts (g)", ylabel="most tokens / mean tokens")
    axis.set_xticks(groups, list(map(str, groups)))
    axis.legend(fontsize="x-small")
    axis.set_title("Loads as they were trained", fontsize="medium")
    axis.grid(alpha=0.3)


def main() -> None:
    """Compute, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--loads", type=Path, metavar="points.jsonl", help="of a run, whose last point is taken"
    )
    source.add_argument("--table", type=Path, metavar="FILE.json", help="what --output wrote")
    parser.add_argument("--output", type=output_file, metavar="FILE.json")
    parser.add_argument("--figure", type=Path, metavar="DIR", help="for scaling.svg and .png")
    args = parser.parse_args()
    if args.table:
        results = read_json(args.table, {"rows": [dict], "loads": dict}, "give another")
    else:
        last = read_points(args.loads)[-1]
        layers = {name: values["load"] for name, values in last["layers"].items()}
        loads = {"updates": last["updates"], "layers": layers}
        assumed = {**Cluster()._asdict(), "utilisation": resources.UTILISATION, "tokens": TOKENS}
        results = {"assumed": assumed, "loads": loads, "rows": compare(list(layers.values()))}
    if args.output:
        write_json(args.output, results)
    if args.figure:
        draw(results, args.figure)
    print(table(results))


if __name__ == "__main__":
    main()
