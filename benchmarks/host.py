"""What the host takes to launch a layer with experts, beside a dense one: no GPU is needed.

  python -m benchmarks.host --output host.json
  python -m benchmarks.host --table host.json

A small layer on a GPU takes the time that Python, PyTorch and Triton need to launch its kernels.
Here the layer with its Triton kernels runs on a few tokens on the CPU, and the kernels are not
launched: what is left is the host's part, but for Triton's own of some five microseconds a launch;
launches are counted. The dense layer computes its few numbers. A time is the least of many samples.
``with losses`` is a layer as a model is trained: the sums that the routing losses are made from are
formed too, and have a gradient.
"""

import argparse
import contextlib
import functools
import gc
from typing import Any, Callable, Dict, Iterator, List, Tuple

import torch
from torch import Tensor

from benchmarks import measuring
from benchmarks.layer import DENSE, Arm, Case, Dense, build
from benchmarks.measuring import Record
from fairseq_sparsemixer.moe import RoutingStatistics
from fairseq_sparsemixer.moe.dispatch import OBSTACLES
from fairseq_sparsemixer.moe.kernels import router as fused_router
from fairseq_sparsemixer.tables import markdown

TOKENS, EMBED_DIM, NUM_EXPERTS = 8, 16, 8
WITH_LOSSES = ", with losses"
"""Ends the name of an arm whose routing losses are trained too."""
CALLS = 4
"""Few, so that some samples come between what else the machine has to do."""


@contextlib.contextmanager
def no_launches() -> Iterator[List[Tuple[str, Dict[str, Any]]]]:
    """Kernels serve the CPU and are not launched; their names and constants are listed instead.

    Of what kernels write, the slots alone are looked at: all are 0.
    """
    from triton.runtime.jit import JITFunction

    launched: List[Tuple[str, Dict[str, Any]]] = []

    def launch(kernel: Any, grid: Any) -> Callable[..., Any]:
        return functools.partial(place if kernel.__name__ == "place_kernel" else note, kernel)

    def place(
        kernel: Any, expert: Tensor, count: Tensor, slot: Tensor, *_: Any, **own: Any
    ) -> None:
        slot.zero_()
        note(kernel, **own)

    def note(kernel: Any, *_: Any, **constants: Any) -> None:
        launched.append((kernel.__name__, constants))

    before = JITFunction.__getitem__, fused_router.DEVICES, fused_router.obstacle
    of_experts = OBSTACLES["triton"]
    JITFunction.__getitem__, fused_router.DEVICES = launch, ("cpu",)
    fused_router.obstacle = OBSTACLES["triton"] = lambda *_: None
    try:
        yield launched
    finally:
        JITFunction.__getitem__, fused_router.DEVICES, fused_router.obstacle = before
        OBSTACLES["triton"] = of_experts


class WithLosses(Arm):
    """A layer that hands out the sums of its routing, as in a model."""

    upstream_of_sums = torch.ones(3 + 4 * NUM_EXPERTS)

    def _train(self, x: Tensor, upstream: Tensor) -> None:
        for tensor in (x, *self.weights):
            tensor.grad = None
        y, routing = self.module(x)
        sums = RoutingStatistics.packed(routing)
        torch.autograd.backward((y, sums), (upstream, self.upstream_of_sums))


def measure(args: argparse.Namespace) -> Iterator[Record]:
    """Seconds and launches of each arm."""
    rows: List[Record] = []
    gc.disable()  # it would be counted where it happens to come
    with no_launches() as launched:
        for name in (DENSE, *(r + ending for r in args.router for ending in ("", WITH_LOSSES))):
            row: Record = {"arm": name}
            for mode in ("forward+backward", "forward"):
                case = Case(mode, TOKENS, NUM_EXPERTS, EMBED_DIM, 2 * EMBED_DIM, "float32")
                module = Dense(EMBED_DIM, 2 * EMBED_DIM)
                if name != DENSE:
                    module = build(case, name.removesuffix(WITH_LOSSES), "triton")
                arm = (WithLosses if name.endswith(WITH_LOSSES) else Arm)(module)
                x = torch.randn(TOKENS, EMBED_DIM)
                arm.prepare(case, x.requires_grad_(mode != "forward"), torch.randn_like(x))
                with torch.set_grad_enabled(mode != "forward"):
                    arm.step()
                    launched.clear()
                    arm.step()
                    row[f"{mode} launches"] = len(launched)
                    samples = range(args.repetitions)
                    seconds = [measuring.seconds_per_call(arm.step, CALLS, "cpu") for _ in samples]
                    row[f"{mode} seconds"] = min(seconds)
            rows.append(row)
            yield {"rows": rows}
    gc.enable()


def table(rows: List[Record]) -> str:
    """Microseconds over those of the dense layer."""
    modes = ("forward+backward", "forward")
    dense = rows[0]
    cells = [
        ["layer", *(f"{mode} {what}" for mode in modes for what in ("(us)", "/ dense", "launches"))]
    ]
    for row in rows:
        cells.append([row["arm"]])
        for mode in modes:
            seconds, base = row[f"{mode} seconds"], dense[f"{mode} seconds"]
            cells[-1] += [f"{1e6 * seconds:.0f}", f"{seconds / base:.1f}"]
            cells[-1] += [str(row[f"{mode} launches"])]
    return markdown(cells)


def build_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--router", nargs="+", default=["switch", "sparsemixer"], metavar="NAME",
        help="default: switch sparsemixer",
    )  # fmt: skip
    measuring.add_arguments(parser, rounds=1000)
    return parser


def main() -> None:
    """Measure, print, write."""
    torch.set_num_threads(1)
    measuring.run(build_parser(), measure, table)


if __name__ == "__main__":
    main()
