"""Where the time of a layer goes: microseconds of every kernel in one forward and backward pass.

  python -m benchmarks.gpu.kernels --layer 512,2048,8 1024,4096,64 --output kernels.json
  python -m benchmarks.gpu.kernels --layer 512,2048,8 --compile-only     # fills Triton's cache

The kernels are those of the layer alone, from the profiler, of calls in a row. ``between`` is what
the replay of the same step's CUDA graph takes beyond their sum: gaps between kernels.
"""

import argparse
import itertools
from typing import Any, Dict, Iterator, List, Tuple

import torch

from benchmarks import layer, measuring
from benchmarks.gpu.checks import WITHOUT_WAITING, backends
from benchmarks.measuring import Record
from fairseq_sparsemixer.moe import ROUTERS
from fairseq_sparsemixer.tables import markdown

CALLS = {"cpu": 1, "cuda": 10}
"""That are profiled."""
SHOWN = 12
"""Kernels in a table, those that take longest."""
LONGEST = 70
"""Name of a kernel, of which templates make hundreds of letters."""
Kernels = Dict[str, Tuple[float, float]]
"""Name -> microseconds and launches in one step."""


def profile(step: Any, device: str) -> Kernels:
    """The kernels of one step; on a CPU its operators."""
    activity = {
        "cpu": torch.profiler.ProfilerActivity.CPU,
        "cuda": torch.profiler.ProfilerActivity.CUDA,
    }[device]
    with torch.profiler.profile(activities=[activity]) as profiler:
        for _ in range(CALLS[device]):
            step()
        if device == "cuda":
            torch.cuda.synchronize()
    found: Kernels = {}
    for event in profiler.key_averages():
        total = event.self_cpu_time_total if device == "cpu" else event.self_device_time_total
        if event.device_type.name.lower() == device and total > 0:
            name = event.key if len(event.key) <= LONGEST else f"{event.key[: LONGEST - 3]}..."
            microseconds, launches = found.get(name, (0.0, 0.0))
            microseconds += total / CALLS[device]
            found[name] = (round(microseconds, 2), launches + event.count / CALLS[device])
    return dict(sorted(found.items(), key=lambda item: -item[1][0]))


def _arms(case: layer.Case, args: argparse.Namespace) -> Iterator[Tuple[Record, layer.Arm]]:
    """The dense layer, and every backend with every router; each is gone before the next."""
    if not args.compile_only:
        yield {"arm": layer.DENSE}, layer.Arm(layer.Dense(case.embed_dim, case.ffn_dim))
    for backend, router in itertools.product(
        backends(args.backend, args.device, getattr(torch, case.dtype)), args.router
    ):
        about = {"arm": f"{router}, {backend}", "router": router, "backend": backend}
        yield about, layer.Arm(layer.build(case, router, backend))


def _row(case: layer.Case, about: Record, arm: layer.Arm, args: argparse.Namespace) -> Record:
    device, dtype = args.device, getattr(torch, case.dtype)
    x, upstream = (
        torch.randn(case.tokens, case.embed_dim, device=device, dtype=dtype) for _ in range(2)
    )
    arm.module.to(device, dtype)
    if args.compile_only:
        with torch.no_grad():
            arm.prepare(case._replace(mode=layer.FORWARD), x, upstream)
            arm.step()
    arm.prepare(case, x.requires_grad_(), upstream)
    # A step that only compiles is its own warming up, and so is one on a CPU.
    for _ in range(1 if args.compile_only or device == "cpu" else layer.WARM_UP_STEPS):
        arm.step()
    row = {**case._asdict(), **about}
    if args.compile_only:
        return row
    row["kernels"] = profile(arm.step, device)
    row["seconds"] = measuring.seconds_per_call(arm.step, CALLS[device], device)
    if device == "cuda":
        arm.capture()
        arm.step()
        row["graph_seconds"] = measuring.seconds_per_call(arm.step, CALLS[device], device)
    return row


def measure(args: argparse.Namespace) -> Iterator[Record]:
    """The kernels of every arm of every layer."""
    rows: List[Record] = []
    for (embed_dim, ffn_dim, num_experts), dtype in itertools.product(args.layer, args.dtype):
        case = layer.Case(layer.BACKWARD, args.tokens, num_experts, embed_dim, ffn_dim, dtype)
        arms = _arms(case, args)
        while True:
            with torch.device(args.device):
                about, arm = next(arms, ({}, None))
            if arm is None:
                break
            rows.append(_row(case, about, arm, args))
            yield {"rows": rows}


def table(rows: List[Record]) -> str:
    """For each arm its longest kernels."""
    parts: List[str] = []
    for row in (row for row in rows if "kernels" in row):
        kernels = row["kernels"]
        total = sum(microseconds for microseconds, _ in kernels.values())
        case = layer.Case(*(row[field] for field in layer.Case._fields))
        title = f"{case}; {row['arm']}: {total:.0f} us in kernels"
        title += f", {1e6 * row['seconds']:.0f} us eager"
        if "graph_seconds" in row:
            graph = 1e6 * row["graph_seconds"]
            title += f", {graph:.0f} us as a graph (between {graph - total:.0f})"
        cells = [["kernel", "us", "launches"]]
        for name, (microseconds, launches) in list(kernels.items())[:SHOWN]:
            cells.append([name, f"{microseconds:.1f}", f"{launches:g}"])
        parts.append(f"{title}\n\n{markdown(cells)}")
    return "\n\n".join(parts)


def sizes_of(text: str) -> List[int]:
    """The numbers of ``D,F,N``."""
    embed_dim, ffn_dim, num_experts = map(int, text.split(","))
    return [embed_dim, ffn_dim, num_experts]


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--layer", nargs="+", type=sizes_of, metavar="D,F,N", default=[[512, 2048, 8]]
    )
    parser.add_argument("--tokens", type=int, default=8192, help="default: %(default)s")
    parser.add_argument("--dtype", nargs="+", metavar="DTYPE", default=["bfloat16"])
    parser.add_argument(
        "--router", nargs="+", choices=list(ROUTERS), default=["switch", "sparsemixer"]
    )
    parser.add_argument(
        "--backend", nargs="+", choices=WITHOUT_WAITING, default=list(WITHOUT_WAITING)
    )
    parser.add_argument(
        "--compile-only",
        action="store_true",
        help="run every pass once, which compiles its kernels; measure nothing",
    )
    measuring.add_arguments(parser)
    measuring.run(parser, measure, table)


if __name__ == "__main__":
    main()
