"""Whether a GPU computes the right numbers, without waiting, in CUDA graphs and compiled.

  python -m benchmarks.gpu.checks --dtype bfloat16 --output checks.json
  python -m benchmarks.gpu.checks --dtype bfloat16 --compiled --output compiled.json

Numbers: output and gradients of a Switch layer against its formula in float64 on the same device,
with and without dropout; an error is relative to the exact tensor's norm, and may be 1.5 times
that of the backend ``loop`` in the same dtype (see ``benchmarks/gpu/exact.py``). The same seed
gives the same bits again, as ``--deterministic`` says.
"""

import argparse
import math
import sys
import traceback
from typing import Any, Callable, Dict, Iterator, List, Tuple

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import measuring
from benchmarks.gpu import exact
from benchmarks.measuring import Record
from fairseq_sparsemixer import determinism
from fairseq_sparsemixer.moe import (
    ROUTERS,
    MoEFeedForward,
    RoutingStatistics,
    load_balance_loss,
    z_loss,
)
from fairseq_sparsemixer.moe.dispatch import BACKENDS, OBSTACLES
from fairseq_sparsemixer.tables import markdown

NUMBERS = "numbers"
AGAIN = "the same bits again"
NOT_WAITING = "does not wait for the device"
GRAPH = "replay of a CUDA graph"
COMPILED = "torch.compile"
SAME = 1e-3
"""The error of a replay beside the step that it replays, which runs the same kernels."""
COMPILED_ERROR = 3e-2
"""That of compiled code, which rounds elsewhere: the gradients differ by the units near zero."""
WARM_UP_STEPS = 3
SUMS_BY_TOKEN = {"sparsemixer": 1, "topk": 2, "default-moe": 2}
"""Routers, with as many experts for a token: all that adds up rows where indices say."""
WITHOUT_WAITING = ("triton",)
"""The backends that can be captured."""

Results = Dict[str, Tensor]


def backends(names: Any, device: str, dtype: torch.dtype) -> List[str]:
    """Those that can serve the dtype."""
    obstacles = {name: OBSTACLES[name] for name in names if name in OBSTACLES}
    return [
        name
        for name in names
        if name not in obstacles or obstacles[name](torch.device(device), dtype) is None
    ]


def _layer(args: argparse.Namespace, backend: str, **options: Any) -> MoEFeedForward:
    torch.manual_seed(0)
    sizes = (args.embed_dim, options.pop("ffn_dim", args.ffn_dim), args.num_experts)
    layer = MoEFeedForward(*sizes, backend=backend, **options)
    return layer.to(args.device, getattr(torch, args.dtype))


def _batch(args: argparse.Namespace) -> Tuple[Tensor, Tensor]:
    """Tokens, and the gradient that comes down."""
    torch.manual_seed(1)
    shape = (args.tokens, args.embed_dim)
    dtype = getattr(torch, args.dtype)
    x, upstream = (torch.randn(shape, device=args.device, dtype=dtype) for _ in range(2))
    return x, upstream


def _kept(layer: MoEFeedForward, x: Tensor, seed: int) -> Tensor:
    """(T, F) float64: what dropout multiplies the inner units by, of a layer with F = D.

    Its experts pass every unit on while this looks, for the same seed.
    """
    experts = layer.experts
    before = {name: getattr(experts, name).detach().clone() for name in exact.WEIGHTS}
    with torch.no_grad():
        for name, value in (("w1", 0.0), ("b1", 1.0), ("b2", 0.0)):
            getattr(experts, name).fill_(value)
        experts.w2.copy_(torch.eye(layer.embed_dim))
        torch.manual_seed(seed)
        kept = layer(x)[0] != 0
        for name, value in before.items():
            getattr(experts, name).copy_(value)
    return kept.double() / experts.kept_share


def _switch(x: Tensor, weights: Results, bias: Tensor, index_TK: Tensor) -> Tensor:
    """(T, D): the layer's formula in the dtype of x, for chosen experts."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    logits = x.to(dtype) @ weights["router"].to(dtype).t() + bias.to(dtype)
    gate_TK = logits.softmax(-1).gather(1, index_TK)
    return exact.mixture(x, index_TK, gate_TK, weights, F.relu, weights.get("kept"))


def _errors(args: argparse.Namespace, backend: str, dropout: float) -> Dict[str, float]:
    """Those of the output and of every gradient."""
    options: Dict[str, Any] = {"router": "switch", "jitter_eps": 0.0}
    if dropout:
        options.update(activation_dropout=dropout, ffn_dim=args.embed_dim)
    layer = _layer(args, backend, **options)
    x, upstream = _batch(args)
    kept = {"kept": _kept(layer, x, seed=2)} if dropout else {}
    leaf = x.clone().requires_grad_()
    torch.manual_seed(2)
    y, routing = layer(leaf)
    y.backward(upstream)
    # Not the router's bias: a few sums over all tokens that nearly cancel, and err by chance.
    parameters = {"router": layer.router.weight}
    parameters.update((name, getattr(layer.experts, name)) for name in exact.WEIGHTS)
    found = {"y": y, "x": leaf.grad, **{name: p.grad for name, p in parameters.items()}}
    leaf = exact.leaf(x)
    weights = {name: exact.leaf(p) for name, p in parameters.items()}
    y = _switch(leaf, {**weights, **kept}, layer.router.bias.detach(), routing.expert_index)
    y.backward(upstream.double())
    wanted = {"y": y, "x": leaf.grad, **{name: w.grad for name, w in weights.items()}}
    return {name: exact.error(value, wanted[name]) for name, value in found.items()}


def _numbers(args: argparse.Namespace, backend: str, dropout: float) -> Record:
    errors = _errors(args, backend, dropout)
    yardsticks = errors if backend == exact.YARDSTICK else _errors(args, exact.YARDSTICK, dropout)
    passed = all(errors[name] <= exact.allowed(yardsticks[name]) for name in errors)
    return {"passed": passed, "errors": errors, "yardsticks": yardsticks}


def _forward(layer: MoEFeedForward, x: Tensor) -> Tuple[Tensor, Tensor, Tensor]:
    """All that training reads: output, statistics, and the losses of the routing."""
    y, routing = layer(x)
    packed = RoutingStatistics.from_routing(routing).pack()
    return y, packed, load_balance_loss(routing) + z_loss(routing)


def _step(layer: MoEFeedForward, x: Tensor, forward: Any = _forward) -> Tensor:
    """Forward and backward; gradients are left where they belong."""
    y, packed, losses = forward(layer, x)
    (y.float().square().sum() + losses).backward()
    return torch.cat([y.detach().flatten().float(), packed.detach().flatten().float()])


def _results(layer: MoEFeedForward, x: Tensor, forward: Any = _forward) -> Results:
    layer.zero_grad()
    leaf = x.clone().requires_grad_()
    y = _step(layer, leaf, forward)
    gradients = {name: p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None}
    return {"y": y, "x": leaf.grad, **gradients}


def _differences(actual: Results, wanted: Results, most: float) -> Record:
    both = actual.keys() & wanted.keys()
    errors = {name: exact.error(actual[name], wanted[name].double()) for name in both}
    errors.update(dict.fromkeys(actual.keys() ^ wanted.keys(), math.inf))
    return {"passed": all(value <= most for value in errors.values()), "errors": errors}


def _again(args: argparse.Namespace, backend: str, dropout: float) -> Record:
    """What training reads and what it learns without a gradient, twice with one seed."""
    found: List[Results] = []
    determinism.switch(True)
    try:
        for _ in range(2):
            results: Results = {}
            for router, top_k in SUMS_BY_TOKEN.items():
                options = {"router": router, "top_k": max(top_k, ROUTERS[router].min_top_k)}
                layer = _layer(args, backend, activation_dropout=dropout, **options)
                own = {**_results(layer, _batch(args)[0]), **dict(layer.named_buffers())}
                results.update((f"{router}: {name}", value) for name, value in own.items())
            found.append(results)
    finally:
        determinism.switch(False)
    return _differences(*found, most=0.0)


def _not_waiting(args: argparse.Namespace, backend: str, dropout: float) -> Record:
    layer = _layer(args, backend, activation_dropout=dropout)
    x = _batch(args)[0].requires_grad_()
    _step(layer, x)  # compiles the kernels
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        _step(layer, x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return {"passed": True}


def _graph(args: argparse.Namespace, backend: str, dropout: float) -> Record:
    """A step captured with one batch is replayed with another; dropout is off."""
    layer = _layer(args, backend, activation_dropout=dropout).eval()
    x = _batch(args)[0]
    static_x = x.clone().requires_grad_()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP_STEPS):
            _step(layer, static_x)
            layer.zero_grad(set_to_none=True)
            static_x.grad = None
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = _step(layer, static_x)
    other = x.flip(0) * 2
    with torch.no_grad():
        static_x.copy_(other)
    graph.replay()
    gradients = {name: p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None}
    replayed = {"y": y.clone(), "x": static_x.grad.clone(), **gradients}
    return _differences(replayed, _results(layer, other), SAME)


def _compiled(args: argparse.Namespace, backend: str, dropout: float) -> Record:
    layer = _layer(args, backend, activation_dropout=dropout).eval()
    x = _batch(args)[0]
    compiled = _results(layer, x, torch.compile(_forward, fullgraph=True))
    return _differences(compiled, _results(layer, x), COMPILED_ERROR)


Check = Callable[[argparse.Namespace, str, float], Record]


def _checks(args: argparse.Namespace) -> Iterator[Tuple[str, Check, str, float]]:
    dtype = getattr(torch, args.dtype)
    free = backends(WITHOUT_WAITING, args.device, dtype)
    if args.compiled:
        for backend in free:
            yield COMPILED, _compiled, backend, 0.0
        return
    for backend in sorted(backends(BACKENDS, args.device, dtype), key=lambda name: name != "loop"):
        for dropout in (0.0, args.dropout):
            yield NUMBERS, _numbers, backend, dropout
        yield AGAIN, _again, backend, args.dropout
    if args.device == "cuda":
        for backend in free:
            yield NOT_WAITING, _not_waiting, backend, args.dropout
            yield GRAPH, _graph, backend, 0.0


def measure(args: argparse.Namespace) -> Iterator[Record]:
    """Every check with what it found; one that fails does not end the others."""
    rows: List[Record] = []
    for name, check, backend, dropout in _checks(args):
        try:
            found = check(args, backend, dropout)
        except Exception as error:  # of any library between here and the device
            traceback.print_exc()
            found = {"passed": False, "error": f"{type(error).__name__}: {error}"[:2000]}
        about = {"check": name, "backend": backend, "dtype": args.dtype, "dropout": dropout}
        rows.append({**about, **found})
        yield {"rows": rows}


def table(rows: List[Record]) -> str:
    """A line for each check, with the tensor whose error is nearest to what is allowed."""
    head = ["check", "backend", "dtype", "dropout", "passed", "error", "of", "loop"]
    cells = [head]
    for row in rows:
        cells.append([row["check"], row["backend"], row["dtype"], f"{row['dropout']:g}"])
        cells[-1] += ["yes" if row["passed"] else "NO"]
        errors, yardsticks = row.get("errors", {}), row.get("yardsticks", {})
        if not errors:
            cells[-1] += [row.get("error", "").split("\n")[0][:60], "", ""]
            continue
        worst = max(errors, key=lambda name: errors[name] / exact.allowed(yardsticks.get(name, 0)))
        cells[-1] += [f"{errors[worst]:.1e}", worst]
        cells[-1] += [f"{yardsticks[worst]:.1e}" if yardsticks else ""]
    return markdown(cells)


def main() -> None:
    """Check, print, write; 1 where a check failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for flag, default in (
        ("--tokens", 2048),
        ("--embed-dim", 512),
        ("--ffn-dim", 2048),
        ("--num-experts", 8),
    ):
        parser.add_argument(flag, type=int, default=default, help="default: %(default)s")
    parser.add_argument("--dropout", type=float, default=0.1, help="default: %(default)s")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--compiled", action="store_true", help="torch.compile, nothing else")
    measuring.add_arguments(parser)
    if not all(row["passed"] for row in measuring.run(parser, measure, table)):
        sys.exit(1)


if __name__ == "__main__":
    main()
