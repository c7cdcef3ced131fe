"""What workers send each other in an update: bytes that are counted, beside the formulas' bytes.

  python -m benchmarks.exchanges --output exchanges.json   # gloo on this machine's CPU
  python -m benchmarks.exchanges --table exchanges.json

Three exchanges among processes of gloo, in float32: ``legacy_ddp`` sums the gradients of a model
with experts, as a training does that holds all experts in each worker; tensors of many sizes are
summed alone; and ``all_to_all_single`` carries tokens to the workers of their experts, evenly, or
by the shares that a trained model gave its experts (``--shares``). Then an update without its
optimiser, forward to summed gradients, once with all experts in each worker and once with the
experts spread over all (``--expert-parallel-size``). The kernel counts each worker's bytes. A time
is the slowest worker's, the least over rounds, beside the time that two numbers foretell: seconds a
message and bytes a second, of the smallest and the largest sum; for spread experts, the time of the
update that does not spread them, and what its exchanges take more or less. Processes on few cores
share them: how times grow is what is checked, not a network.
"""

import argparse
import contextlib
import json
import os
import socket
import stat
import struct
import tempfile
import time
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Tuple

import torch
import torch.distributed as dist
from fairseq.distributed.legacy_distributed_data_parallel import LegacyDistributedDataParallel

from benchmarks import measuring, models, scaling
from benchmarks.measuring import Record
from fairseq_sparsemixer.expert_parallelism import average_gradients
from fairseq_sparsemixer.moe.feed_forward import moe_layers
from fairseq_sparsemixer.moe.parallel import is_spread
from fairseq_sparsemixer.tables import markdown

SIZES = (1 << 12, 1 << 16, 1 << 20, 1 << 22, 1 << 24)
"""Bytes of the tensors that are summed."""
LENGTH = 32
"""Tokens of a sentence in an update."""
REPLICATED, SPREAD = "update, all experts in each", "update, experts spread"
_BYTES_SENT = 200
"""Where struct tcp_info of Linux (4.19 and later) has ``tcpi_bytes_sent``."""


def bytes_sent() -> int:
    """What this process's connections have sent, resent packets included, by the kernel's count.

    Connections of a process that are closed count no longer.
    """
    total = 0
    for number in map(int, os.listdir("/proc/self/fd")):
        with contextlib.suppress(OSError):  # that of the listing itself is closed
            if stat.S_ISSOCK(os.fstat(number).st_mode):
                with socket.socket(fileno=os.dup(number)) as connection:
                    total += _sent_by(connection)
    return total


def _sent_by(connection: socket.socket) -> int:
    if connection.family not in (socket.AF_INET, socket.AF_INET6):
        return 0
    told = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
    return int(struct.unpack_from("Q", told, _BYTES_SENT)[0])


def _measured(exchange: Callable[[], Any], rounds: int) -> Tuple[float, List[float]]:
    """Bytes that a worker sends in an exchange, mean of all; seconds of the slowest, by round."""
    exchange()
    sent, seconds = 0, []
    for _ in range(rounds):
        dist.barrier()
        before = bytes_sent()
        started = time.perf_counter()
        exchange()
        seconds.append(time.perf_counter() - started)
        sent += bytes_sent() - before
    everyone: List[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (sent, seconds))
    mean = sum(each for each, _ in everyone) / len(everyone) / rounds
    return mean, [max(times) for times in zip(*(times for _, times in everyone))]


def _model(args: argparse.Namespace, group: int) -> Tuple[Any, LegacyDistributedDataParallel]:
    """A model, of whose workers so many share the experts, and what sums its gradients."""
    settings = {"expert_parallel_size": group, "dropout": 0.0}
    cfg = models.configuration(args, "switch", data="", **settings)
    model = models.build(cfg.model, models.RandomWords(args.vocabulary))
    return model, LegacyDistributedDataParallel(model, dist.group.WORLD)


def _gradients(args: argparse.Namespace) -> Tuple[int, Callable[[], Any]]:
    """Parameters of the model, and the sum of their gradients."""
    model, wrapped = _model(args, group=1)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    return sum(p.numel() for p in model.parameters()), wrapped.all_reduce_grads


def _update(args: argparse.Namespace, group: int) -> Tuple[float, Callable[[], Any]]:
    """Bytes that a worker sends in an update by the formulas, and forward, backward and sums.

    Args:
        args: the flags.
        group: workers that share the experts; 1 where each holds all.
    """
    model, wrapped = _model(args, group)
    torch.manual_seed(dist.get_rank())
    words = torch.randint(4, args.vocabulary, (args.tokens // LENGTH, LENGTH))
    lengths = torch.full((len(words),), LENGTH)

    def update() -> None:
        model.zero_grad()
        model(words, lengths, words)[0].sum().backward()
        wrapped.all_reduce_grads()
        average_gradients(model)

    workers, layers = dist.get_world_size(), len(list(moe_layers(model)))
    shared = sum(p.numel() for p in model.parameters() if not is_spread(p))
    tokens = 4 * words.numel() * args.embed_dim
    foretold = scaling.all_reduce_bytes(4 * shared, workers)
    if group > 1:  # there and back, and so do the gradients; and the counts, 8 bytes each
        foretold += 4 * layers * scaling.all_to_all_bytes(tokens, group)
        foretold += layers * scaling.all_to_all_bytes(8 * args.num_experts, group)
    return foretold, update


def _tokens(args: argparse.Namespace, shares: List[float]) -> Callable[[], Any]:
    """An exchange of tokens with the workers of their experts.

    Args:
        args: the flags.
        shares: of the workers' experts, in the tokens of each worker.
    """
    splits = [int(args.tokens * share) for share in shares]
    splits[0] += args.tokens - sum(splits)
    rank = dist.get_rank()
    inputs = torch.ones(args.tokens, args.embed_dim)
    received = [splits[rank]] * dist.get_world_size()
    outputs = torch.empty(sum(received), args.embed_dim)
    return lambda: dist.all_to_all_single(outputs, inputs, received, splits)


def _work(rank: int, workers: int, args: argparse.Namespace, place: str) -> None:
    """What one of the processes does; the first writes what all have measured."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{place}/rendezvous", rank=rank, world_size=workers
    )
    rows: List[Record] = []

    def add(name: str, size: int, foretold: float, exchange: Callable[[], Any]) -> None:
        sent, seconds = _measured(exchange, args.repetitions)
        row = {"exchange": name, "workers": workers, "bytes": size, "foretold_bytes": foretold}
        rows.append({**row, "sent_bytes": sent, "seconds": seconds})

    for size in SIZES:
        tensor = torch.ones(size // 4)
        foretold = scaling.all_reduce_bytes(size, workers)
        add("sum", size, foretold, lambda tensor=tensor: dist.all_reduce(tensor))
    parameters, reduce = _gradients(args)
    add("gradients", 4 * parameters, scaling.all_reduce_bytes(4 * parameters, workers), reduce)
    even = [1 / workers] * workers
    cases = {"tokens, evenly": even}
    if args.shares:
        cases["tokens, as routed"] = scaling.of_workers(args.shares, workers)
    for name, shares in cases.items():
        size = 4 * args.tokens * args.embed_dim
        # Each sends all but its own experts' tokens: in the mean, whatever the shares.
        add(name, size, scaling.all_to_all_bytes(size, workers), _tokens(args, shares))
    for name, group in ((REPLICATED, 1), (SPREAD, workers)):
        foretold, update = _update(args, group)
        add(name, int(foretold), foretold, update)
    if rank == 0:
        Path(place, "rows.json").write_text(json.dumps(rows))
    dist.destroy_process_group()


def measure(args: argparse.Namespace) -> Iterator[Record]:
    """Bytes and seconds of each exchange, for each number of workers."""
    rows: List[Record] = []
    for workers in args.workers:
        with tempfile.TemporaryDirectory() as place:
            torch.multiprocessing.spawn(_work, (workers, args, place), workers)
            own = json.loads(Path(place, "rows.json").read_text())
        foretell(own)
        rows += own
        yield {"rows": rows}


def foretell(rows: List[Record]) -> None:
    """Write into the rows of a number of workers how long each would take by two numbers.

    A sum of gloo goes around a ring: 2 (W - 1) messages for each worker. An exchange of tokens is
    W - 1 messages.
    """
    sums = [row for row in rows if row["exchange"] == "sum"]
    workers = sums[0]["workers"]
    first, last = (min(row["seconds"]) for row in (sums[0], sums[-1]))
    a_second = (sums[-1]["foretold_bytes"] - sums[0]["foretold_bytes"]) / max(last - first, 1e-9)
    a_message = max(0.0, first - sums[0]["foretold_bytes"] / a_second) / (2 * (workers - 1))
    for row in rows:
        messages = (workers - 1) * (1 if row["exchange"].startswith("tokens") else 2)
        row["foretold_seconds"] = messages * a_message + row["foretold_bytes"] / a_second
    updates = {row["exchange"]: row for row in rows}
    whole, spread = updates[REPLICATED], updates[SPREAD]
    more = spread["foretold_seconds"] - whole["foretold_seconds"]
    spread["foretold_seconds"] = min(whole["seconds"]) + more
    whole["foretold_seconds"] = None


def table(rows: List[Record]) -> str:
    """Counted and measured, over what is foretold."""
    cells = [
        ["exchange", "workers", "tensor (MB)", "sent (MB)", "sent / formula", "ms", "foretold"]
    ]
    for row in rows:
        cells.append(
            [
                *(row["exchange"], str(row["workers"])),
                *(f"{row[key] / 1e6:.3f}" for key in ("bytes", "sent_bytes")),
                f"{row['sent_bytes'] / row['foretold_bytes']:.4f}",
                f"{1e3 * min(row['seconds']):.2f}",
                "" if row["foretold_seconds"] is None else f"{1e3 * row['foretold_seconds']:.2f}",
            ]
        )
    return markdown(cells)


def build_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    models.add_arguments(parser)
    sizes: Dict[str, Any] = {"embed_dim": 256, "ffn_dim": 512, "heads": 4, "layers": 2}
    parser.set_defaults(**sizes, vocabulary=4000)
    parser.add_argument(
        "--workers", type=int, nargs="+", default=[2, 4], help="default: %(default)s"
    )
    parser.add_argument(
        "--tokens", type=int, default=4096, help="of each worker (default: %(default)s)"
    )
    parser.add_argument(
        "--shares", type=float, nargs="+", help="of a layer's experts in its tokens, such as load "
        "in a run's points.jsonl",
    )  # fmt: skip
    measuring.add_arguments(parser)
    parser.set_defaults(device="cpu")
    return parser


def main() -> None:
    """Measure, print, write."""
    torch.set_num_threads(1)  # each worker has one
    measuring.run(build_parser(), measure, table)


if __name__ == "__main__":
    main()
