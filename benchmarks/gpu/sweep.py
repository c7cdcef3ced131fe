"""What each operator of a layer takes, and whether other tiles, warps or stages would take less.

  python -m benchmarks.gpu.sweep --layer 512,2048,8 1024,4096,64 --output operators.json
  python -m benchmarks.gpu.sweep --layer 512,2048,8 --settings --output sweep.json

Operators are called as the layer calls them. With --settings, the products' kernels are launched
in other ways, too, compiled beforehand on all cores of the host; what a launch computes is held
against the operator. On a GPU, times are those of ten calls in a CUDA graph, the median of five.
"""

import argparse
import functools
import itertools
import multiprocessing
import os
import statistics
from concurrent.futures import ProcessPoolExecutor
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor

from benchmarks import measuring
from benchmarks.gpu import exact
from benchmarks.gpu.kernels import sizes_of
from benchmarks.measuring import Record
from fairseq_sparsemixer.moe.kernels import products, projection, sorting
from fairseq_sparsemixer.moe.kernels.operators import cdiv
from fairseq_sparsemixer.moe.losses import RoutingStatistics
from fairseq_sparsemixer.moe.routing import Context, build_router
from fairseq_sparsemixer.tables import markdown

CALLS, REPLAYS = 10, 5
"""Calls in a graph, and replays of it."""
KEPT_SHARE = 0.9
SMALLER = 4
"""So many times narrower are the layers that kernels are compiled on: only types and multiples of
16 count."""
SHOWN = 4
"""Settings of a kernel in a table."""


class Setting(NamedTuple):
    """How a kernel is launched: rows of a tile (terms of its sums, for gradients of weights), its
    columns, and the terms of a product's sums (the weights' inner width)."""

    block_s: int
    block_o: int
    block_i: int
    warps: int
    stages: int
    described: bool

    def __str__(self) -> str:
        tile = "x".join(map(str, self[:3]))
        kind = "described" if self.described else "pointers"
        return f"{tile}, {self.warps} warps, {self.stages} stages, {kind}"


PRODUCTS = tuple(
    Setting(*sizes, described)
    for described in (True, False)
    for sizes in (
        *((128, 128, 64, 8, stages) for stages in (2, 3, 4)),
        *((128, 256, 64, 8, 3), (128, 256, 64, 8, 4), (128, 128, 64, 4, 3)),
        *((64, 128, 64, 4, 3), (64, 128, 64, 4, 4), (64, 256, 64, 4, 3), (128, 128, 128, 8, 2)),
    )
)
WEIGHTS = tuple(
    Setting(*sizes, described)
    for described in (True, False)
    for sizes in (
        *((32, 128, 128, 8, stages) for stages in (3, 4, 5)),
        *((64, 128, 128, 8, 3), (64, 128, 128, 8, 4), (64, 128, 256, 8, 3), (64, 256, 128, 8, 3)),
    )
)


class Layer(NamedTuple):
    """Tensors like those of a layer, with the slots of one expert each."""

    tile: int
    sort: Tuple[Tensor, Tensor, Tensor, Tensor]
    """What :func:`sorting.sort_slots` returns."""
    expert: Tensor
    x: Tensor
    inner: Tensor
    grad_x: Tensor
    grad_inner: Tensor
    w1: Tensor
    w2: Tensor
    b1: Tensor
    b2: Tensor
    gate: Tensor
    scale: Tensor
    seed: Tensor
    router: Tensor
    grad_logits: Tensor


def build(sizes: Sequence[int], tokens: int, dtype: torch.dtype, device: str) -> Layer:
    """One of random numbers.

    Args:
        sizes: embed_dim, ffn_dim, num_experts.
        tokens: T, of which each has one slot.
        dtype: of all but the router.
        device: "cpu" or "cuda".
    """
    width, depth, number = sizes
    torch.manual_seed(0)
    with torch.device(device):
        expert = torch.randint(number, (tokens,))
        tile = products.tile_rows(tokens, number)
        x, grad_x = (torch.randn(tokens, width).to(dtype) for _ in range(2))
        inner, grad_inner = (torch.randn(tokens, depth).relu().to(dtype) for _ in range(2))
        w1, w2 = (
            (torch.randn(number, *s) / 30).to(dtype) for s in ((depth, width), (width, depth))
        )
        b1, b2 = (torch.randn(number, size).to(dtype) for size in (depth, width))
        return Layer(
            tile,
            sorting.sort_slots(expert, number, tile),
            *(expert, x, inner, grad_x, grad_inner, w1, w2, b1, b2),
            gate=torch.rand(tokens, 1),
            scale=torch.randn(width).to(dtype),
            seed=torch.ones(1, dtype=torch.int64),
            router=torch.randn(number, width) / 30,
            grad_logits=torch.randn(tokens, number),
        )


def operators(v: Layer) -> Dict[str, Callable[[], Any]]:
    """Each operator as forward and backward of a layer with gate, omega and one slot a token."""
    slot, end, tile_end, tiles = v.sort
    cut = (tiles, v.tile)
    up = functools.partial(products.sorted_product, v.x, v.w1, False, v.b1)
    back = functools.partial(products.sorted_product, v.grad_x, v.w2, True, None, None, v.inner)
    placed = products.placed_product
    dtype, sums = v.x.dtype, back(*cut, 1.0, False, True)[1]
    return {
        "sort_slots": lambda: sorting.sort_slots(v.expert, len(v.w1), v.tile),
        "gather": lambda: v.x.index_select(0, slot),
        "up": lambda: up(None, None, *cut, 1.0, True, False),
        "up with dropout": lambda: up(v.seed, None, *cut, KEPT_SHARE, True, False),
        "down": lambda: placed(
            v.inner, v.w2, False, v.b2, slot, v.gate, v.scale, *cut, False, True
        ),
        "back": lambda: back(*cut, 1.0, False, False),
        "back with sums": lambda: back(*cut, 1.0, False, True),
        "dx": lambda: placed(v.grad_inner, v.w1, True, None, slot, None, None, *cut, False, False),
        "w1": lambda: products.weight_gradient(v.grad_inner, v.x, end),
        "w2": lambda: products.weight_gradient(v.grad_x, v.inner, end),
        "sum_groups of tiles": lambda: products.sum_groups(sums, tile_end, dtype),
        "sum_groups of slots": lambda: products.sum_groups(v.grad_x, end, dtype),
        "weigh_backward": lambda: products.weigh_backward(
            v.grad_x, v.x, slot, v.gate, v.scale, end
        ),
        "logits_of": lambda: projection.logits_of(v.x, v.router, None),
        "token_gradient": lambda: projection.token_gradient(v.grad_logits, v.router, dtype),
        "logits_weight_gradient": lambda: projection.logits_weight_gradient(v.grad_logits, v.x),
        **routings(v),
    }


def routings(v: Layer) -> Dict[str, Callable[[], Any]]:
    """From logits to gates and routing statistics, and back: by kernels, or without them."""
    number, width = v.router.shape
    router = build_router("sparsemixer", embed_dim=width, num_experts=number).to(v.x.device)
    logits = v.grad_logits.clone().requires_grad_()

    def forward(logits: Tensor) -> List[Tensor]:
        routing = router.select(logits, Context())
        routing.backend = router.backend
        return [routing.gate, RoutingStatistics.packed(routing)]

    def there_and_back(backend: str, forward: Callable[[Tensor], List[Tensor]]) -> List[Tensor]:
        router.backend = backend
        results = forward(logits)
        return torch.autograd.grad(results, logits, [torch.ones_like(each) for each in results])

    calls = {
        "routed by kernels": functools.partial(there_and_back, "triton", forward),
        "routed by PyTorch": functools.partial(there_and_back, "loop", forward),
    }
    if v.x.is_cuda:  # compiling takes long
        compiled = torch.compile(forward)
        calls["routed by PyTorch, compiled"] = functools.partial(there_and_back, "loop", compiled)
    return calls


KERNELS = {
    **dict.fromkeys(("up", "down", "back with sums", "dx"), PRODUCTS),
    **dict.fromkeys(("w1", "w2"), WEIGHTS),
}
"""Operators whose kernel may be launched in other ways."""


def _described(described: bool, *blocks: Tuple[Tensor, List[int]]) -> Optional[List[Any]]:
    if not described:
        return None
    return [
        products.TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), block)
        for matrix, block in blocks
    ]


def _product(v: Layer, name: str, s: Setting) -> Callable[[], Tensor]:
    slot, _, _, tiles = sorting.sort_slots(v.expert, len(v.w1), s.block_s)
    a, w, transposed = {
        "up": (v.x, v.w1, False),
        "down": (v.inner, v.w2, False),
        "back with sums": (v.grad_x, v.w2, True),
        "dx": (v.grad_inner, v.w1, True),
    }[name]
    width, depth = (w.shape[2], w.shape[1]) if transposed else w.shape[1:]
    out, placed = (a.new_empty(len(a), width) for _ in range(2))
    sums = a.new_empty(len(tiles), width, dtype=torch.float32)
    # From bias_ptr to scale_ptr.
    tensors = {
        "up": (v.b1, None, None, out, None, None, None, None, None),
        "down": (v.b2, None, None, out, None, placed, slot, v.gate, v.scale),
        "back with sums": (None, None, v.inner, out, sums, None, None, None, None),
        "dx": (None, None, None, None, None, placed, slot, None, None),
    }[name]
    tile_of_w = [1, s.block_i, s.block_o] if transposed else [1, s.block_o, s.block_i]
    matrices = _described(s.described, (a, [s.block_s, s.block_i]), (w, tile_of_w)) or (a, w)

    def launch() -> Tensor:
        products.kernels.product_kernel[(cdiv(width, s.block_o), len(tiles))](
            *(*matrices, *tensors, tiles, len(w), width, depth, 1.0, 1.0),
            RELU=name == "up",
            DESCRIBED=s.described,
            TRANSPOSED=transposed,
            PRECISION="ieee",
            BLOCK_S=s.block_s,
            BLOCK_O=s.block_o,
            BLOCK_I=s.block_i,
            num_warps=s.warps,
            num_stages=s.stages,
        )
        return placed if name in ("down", "dx") else out

    return launch


def _weight(v: Layer, name: str, s: Setting) -> Callable[[], Tensor]:
    grad, a = {"w1": (v.grad_inner, v.x), "w2": (v.grad_x, v.inner)}[name]
    d_w = a.new_empty(len(v.w1), grad.shape[1], a.shape[1])
    blocks = ((grad, [s.block_s, s.block_o]), (a, [s.block_s, s.block_i]))
    matrices = _described(s.described, *blocks) or (None, None)
    _, width, depth = d_w.shape
    programs = cdiv(width, s.block_o) * cdiv(depth, s.block_i)

    def launch() -> Tensor:
        products.kernels.weight_gradient_kernel[(programs, len(d_w))](
            *(grad, a, *matrices, d_w, v.sort[1], width, depth),
            DESCRIBED=s.described,
            PRECISION="ieee",
            BLOCK_S=s.block_s,
            BLOCK_O=s.block_o,
            BLOCK_I=s.block_i,
            num_warps=s.warps,
            num_stages=s.stages,
        )
        return d_w

    return launch


def launched(v: Layer, name: str, setting: Setting) -> Callable[[], Tensor]:
    """A launch of an operator's kernel in another way, which returns its first result."""
    return (_weight if name in ("w1", "w2") else _product)(v, name, setting)


def settings(device: str) -> List[Tuple[str, Setting]]:
    """Every kernel with every way to launch it on this machine."""
    describable = products.describable(torch.device(device))
    return [
        (name, setting)
        for name, choices in KERNELS.items()
        for setting in choices
        if describable or not setting.described
    ]


def _compile(args: argparse.Namespace, chosen: List[Tuple[str, Setting]]) -> None:
    """Fill Triton's cache; what does not fit the GPU fails again when it is measured."""
    for width, depth, number in args.layer:
        sizes = (width // SMALLER, depth // SMALLER, number)
        v = build(sizes, args.tokens // SMALLER, getattr(torch, args.dtype), args.device)
        for name, setting in chosen:
            try:
                launched(v, name, setting)()
            except Exception:  # Triton's errors have no common class
                continue
    if args.device == "cuda":
        torch.cuda.synchronize()


def _compile_all(args: argparse.Namespace) -> None:
    chosen, workers = settings(args.device), max(1, (os.cpu_count() or 2) - 1)
    shares = [chosen[i::workers] for i in range(min(workers, len(chosen)))]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(len(shares), mp_context=context) as pool:
        list(pool.map(_compile, itertools.repeat(args), shares))


def microseconds(call: Callable[[], Any], device: str) -> float:
    """Of one call."""
    call()
    if device == "cpu":
        return 1e6 * measuring.seconds_per_call(call, 1, device)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            call()
    graph.replay()
    times = [measuring.seconds_per_call(graph.replay, 1, device) for _ in range(REPLAYS)]
    return 1e6 * statistics.median(times) / CALLS


def _sweep(
    v: Layer, calls: Dict[str, Callable[[], Any]], device: str
) -> Iterator[Tuple[str, Record]]:
    for name, setting in settings(device):
        found = calls[name]()
        wanted = found if isinstance(found, Tensor) else found[0]
        row: Record = {"setting": str(setting)}
        try:
            launch = launched(v, name, setting)
            row["error"] = exact.error(launch(), wanted.double())
            row["microseconds"] = microseconds(launch, device)
        except Exception as error:  # such as too much shared memory: Triton's have no common class
            row["failed"] = f"{type(error).__name__}: {error}"[:200]
        yield name, row


def measure(args: argparse.Namespace) -> Iterator[Record]:
    """A row for each operator of each layer, and one for each other launch of its kernel."""
    dtype, rows = getattr(torch, args.dtype), []
    obstacle = products.obstacle(torch.device(args.device), dtype)
    if obstacle is not None:
        raise SystemExit(f"the backend 'triton' {obstacle}")
    if args.settings:
        _compile_all(args)
    for sizes in args.layer:
        v = build(sizes, args.tokens, dtype, args.device)
        about = dict(zip(("embed_dim", "ffn_dim", "num_experts"), sizes))
        about.update(tokens=args.tokens, dtype=args.dtype)
        calls = operators(v)
        for name, call in calls.items():
            rows.append(
                {**about, "operator": name, "microseconds": microseconds(call, args.device)}
            )
        yield {"rows": rows}
        for name, row in _sweep(v, calls, args.device) if args.settings else ():
            rows.append({**about, "operator": name, **row})
            yield {"rows": rows}


def table(rows: List[Record]) -> str:
    """The operators, a column for each layer; and of each kernel the launches that take least."""
    of_layer: Dict[str, List[Record]] = {}
    for row in rows:
        title = f"d = {row['embed_dim']}, N = {row['num_experts']}"
        of_layer.setdefault(title, []).append(row)
    usual = {
        title: {row["operator"]: row["microseconds"] for row in own if "setting" not in row}
        for title, own in of_layer.items()
    }
    names = list(next(iter(usual.values())))
    cells = [["operator (us)", *usual]]
    cells += [[name, *(f"{times[name]:.1f}" for times in usual.values())] for name in names]
    parts = [markdown(cells)]
    for title, own in of_layer.items():
        cells = [["kernel", "launch", "us", "of the operator's", "error"]]
        for name in KERNELS:
            tried = [r for r in own if r["operator"] == name and "error" in r]
            for row in sorted(tried, key=lambda row: row["microseconds"])[:SHOWN]:
                share = row["microseconds"] / usual[title][name]
                figures = [f"{row['microseconds']:.1f}", f"{share:.2f}", f"{row['error']:.1e}"]
                cells.append([name, row["setting"], *figures])
        parts += [f"{title}\n\n{markdown(cells)}"] if len(cells) > 1 else []
    return "\n\n".join(parts)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--layer", nargs="+", type=sizes_of, metavar="D,F,N", default=[[512, 2048, 8]]
    )
    parser.add_argument("--tokens", type=int, default=8192, help="default: %(default)s")
    parser.add_argument("--dtype", default="bfloat16", help="default: %(default)s")
    parser.add_argument(
        "--settings", action="store_true", help="launch the products' kernels in other ways, too"
    )
    measuring.add_arguments(parser)
    measuring.run(parser, measure, table)


if __name__ == "__main__":
    main()
