"""What a layer of experts costs beside a dense one: time and memory, forward and backward.

  python -m benchmarks.layer --output layer.json      # the default cases of the device
  python -m benchmarks.layer --mode forward --tokens 64 512 --num-experts 8 16
  python -m benchmarks.layer --table layer.json       # the tables again

``dense`` is fairseq's feed-forward network of the same width and inner width, on the same tokens.
``dense, oneDNN`` is the dense layer that one could have: that library is called for the products
that the layer with experts gives to it, where torch lets it be called (on a CPU, float32). ``loop
over modules`` is a Switch layer as it is first written: a list of dense networks, each run on the
tokens that chose it.

Forward is evaluation, without gradient. Forward + backward is training, from an upstream gradient
fixed beforehand; every gradient is dropped before a step, which has to find memory for it (experts
on a CPU use that of the step before). A sample is the mean of as many steps in a row as take 20 ms,
100 at most. They see the same tokens: weights that fit into the processor's caches stay there.

Peak memory is that of a forward and backward pass, the weights and their gradients not counted.
``weights (ms)`` is the time that it takes to read, from memory, the weights of all experts that
some token chose.

A small layer on a GPU takes the time that Python needs to launch its kernels. ``--graph`` measures
every arm that can be captured in a CUDA graph as its replay too, which is held against the dense
layer's replay.
"""

import argparse
import functools
import itertools
import math
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Tuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import measuring
from benchmarks.measuring import Record
from fairseq_sparsemixer.moe import ROUTERS, MoEFeedForward
from fairseq_sparsemixer.moe.dispatch import BACKENDS, OBSTACLES, backend_for
from fairseq_sparsemixer.tables import markdown

FORWARD, BACKWARD = "forward", "forward+backward"
DENSE, ONEDNN, LOOP = "dense", "dense, oneDNN", "loop over modules"
GRAPH = ", graph"
"""Ends the name of an arm that replays a CUDA graph."""
SAMPLE_SECONDS = 0.02
MOST_CALLS = 100
WARM_UP_STEPS = 3
SETTINGS = ("router", "backend", "recompute", "inference_dtype", "graph")
"""Of a layer with experts, in its row."""


class Case(NamedTuple):
    """What all arms compute."""

    mode: str
    tokens: int
    num_experts: int
    embed_dim: int
    ffn_dim: int
    dtype: str

    def __str__(self) -> str:
        return (
            f"{self.mode}: {self.tokens} tokens, {self.num_experts} experts, d = {self.embed_dim}, "
            f"f = {self.ffn_dim}, {self.dtype}"
        )


DEFAULT_CASES: Dict[str, List[Case]] = {
    "cpu": [
        Case(BACKWARD, 4096, 8, 512, 2048, "float32"),
        Case(BACKWARD, 4096, 32, 512, 2048, "float32"),
        Case(FORWARD, 512, 8, 512, 2048, "float32"),
        Case(FORWARD, 1, 8, 512, 2048, "float32"),
    ],
    "cuda": [
        Case(BACKWARD, 8192, num_experts, embed_dim, 4 * embed_dim, dtype)
        for dtype in ("bfloat16", "float16")
        for num_experts, embed_dim in ((8, 512), (8, 1024), (32, 1024), (64, 1024))
    ],
}


class Dense(nn.Module):
    """fairseq's feed-forward network."""

    def __init__(self, embed_dim: int, ffn_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(embed_dim, ffn_dim)
        self.dropout = nn.Dropout(0.0)
        self.fc2 = nn.Linear(ffn_dim, embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        """(T, D) to (T, D)."""
        return self.fc2(self.dropout(F.relu(self.fc1(x))))


class OneDNNDense(nn.Module):
    """A dense network through oneDNN, the activation fused."""

    def __init__(self, dense: Dense) -> None:
        super().__init__()
        self.dense = dense

    def forward(self, x: Tensor) -> Tensor:
        """(T, D) to (T, D)."""
        fc1, fc2 = self.dense.fc1, self.dense.fc2
        arguments = (x, fc1.weight, fc1.bias, fc2.weight, fc2.bias)
        if torch.is_grad_enabled():
            return _OneDNNDense.apply(*arguments)
        return _onednn_dense(*arguments)[0]


def _onednn(x: Tensor, w: Tensor, b: Optional[Tensor] = None, activation: str = "none") -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, w, b, activation, [], "")


def _onednn_dense(
    x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor
) -> Tuple[Tensor, Tensor]:
    """(T, D) and the inner layer (T, F)."""
    hidden = _onednn(x, w1, b1, "relu")
    return _onednn(hidden, w2, b2), hidden


class _OneDNNDense(torch.autograd.Function):
    """The products of forward and backward pass that the layer with experts gives to oneDNN."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        y, hidden = _onednn_dense(x, w1, b1, w2, b2)
        ctx.save_for_backward(x, w1, w2, hidden)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        x, w1, w2, hidden = ctx.saved_tensors
        d_hidden = _onednn(grad, w2.t()).masked_fill_(hidden <= 0, 0.0)
        d_x = _onednn(d_hidden, w1.t())
        return d_x, d_hidden.t() @ x, d_hidden.sum(0), grad.t() @ hidden, grad.sum(0)


class LoopOverModules(nn.Module):
    """A Switch layer without jitter, with the weights of ``layer``."""

    def __init__(self, layer: MoEFeedForward) -> None:
        super().__init__()
        num_experts, ffn_dim, embed_dim = layer.experts.w1.shape
        self.router = nn.Linear(embed_dim, num_experts)
        experts = [Dense(embed_dim, ffn_dim) for _ in range(num_experts)]
        stacked = layer.experts
        with torch.no_grad():
            self.router.weight.copy_(layer.router.weight)
            self.router.bias.copy_(layer.router.bias)
            for i, expert in enumerate(experts):
                expert.fc1.weight.copy_(stacked.w1[i])
                expert.fc1.bias.copy_(stacked.b1[i])
                expert.fc2.weight.copy_(stacked.w2[i])
                expert.fc2.bias.copy_(stacked.b2[i])
        self.experts = nn.ModuleList(experts)

    def forward(self, x: Tensor) -> Tensor:
        """(T, D) to (T, D)."""
        gate, index = self.router(x).softmax(dim=-1).max(dim=-1)
        y = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            rows = (index == i).nonzero(as_tuple=True)[0]
            y[rows] = expert(x[rows])
        return y * gate.unsqueeze(-1)


class Arm:
    """A module and what the table says of it."""

    def __init__(self, module: nn.Module, **about: object) -> None:
        self.module = module
        self.weights = list(module.parameters())
        self.about = about

    def prepare(self, case: Case, x: Tensor, upstream: Tensor) -> None:
        """Make ``step`` what the case is about."""
        self.module.train(case.mode == BACKWARD)
        self.step: Callable[[], Any] = (
            functools.partial(self._train, x, upstream)
            if case.mode == BACKWARD
            else functools.partial(self.module, x)
        )

    def capture(self) -> None:
        """Make ``step`` the replay of its CUDA graph."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.step()
        self.step = graph.replay

    def _train(self, x: Tensor, upstream: Tensor) -> None:
        for tensor in (x, *self.weights):
            tensor.grad = None
        self._output(x).backward(upstream)

    def _output(self, x: Tensor) -> Tensor:
        y = self.module(x)
        return y[0] if isinstance(y, tuple) else y

    def expert_tokens(self, x: Tensor) -> Optional[Tensor]:
        """(N,) how many tokens each expert gets; None for yardsticks."""
        if not isinstance(self.module, MoEFeedForward):
            return None
        with torch.no_grad():
            chosen = self.module(x)[1].chosen
        return torch.bincount(chosen[chosen >= 0], minlength=self.module.experts.num_experts)


def build(
    case: Case,
    router: str,
    backend: str = "auto",
    recompute: bool = False,
    inference_dtype: Optional[str] = None,
) -> MoEFeedForward:
    """A layer with experts; those of different backends have the same weights."""
    torch.manual_seed(0)  # routers with the same weights choose the same experts
    layer = MoEFeedForward(
        *(case.embed_dim, case.ffn_dim, case.num_experts),
        router=router,
        top_k=ROUTERS[router].min_top_k,
        backend=backend,
        recompute=recompute,
    )
    if inference_dtype is not None:
        layer.prepare_for_inference(getattr(torch, inference_dtype))
    return layer


def _serves(backend: str, case: Case, device: str) -> bool:
    """Whether a backend can compute the case."""
    obstacle = OBSTACLES.get(backend)
    return obstacle is None or not obstacle(torch.device(device), getattr(torch, case.dtype))


def _waits(arm: Arm, case: Case, device: str) -> bool:
    """Whether an arm reads back from the device how many tokens an expert has."""
    backend = arm.about.get("backend")
    if backend == "auto":
        backend = backend_for(torch.device(device), getattr(torch, case.dtype))
    return isinstance(arm.module, LoopOverModules) or backend in ("loop", "sorted")


def _arms(case: Case, args: argparse.Namespace) -> Dict[str, Arm]:
    dense = Dense(case.embed_dim, case.ffn_dim)
    arms = {DENSE: Arm(dense)}
    if (args.device, case.dtype) == ("cpu", "float32") and has_onednn():
        arms[ONEDNN] = Arm(OneDNNDense(dense))
    arms[LOOP] = Arm(LoopOverModules(build(case, "switch")))
    laid_out = args.laid_out and (args.device, case.dtype, case.mode) == ("cpu", "float32", FORWARD)
    for router, backend, recompute, inference_dtype in itertools.product(
        args.router,
        [backend for backend in args.backend if _serves(backend, case, args.device)],
        (False, True) if args.recompute and case.mode == BACKWARD else (False,),
        (None, "float32", "bfloat16") if laid_out else (None,),
    ):
        name = router
        name += f", {backend}" if len(args.backend) > 1 else ""
        name += ", recompute" if recompute else ""
        name += f", laid out, {inference_dtype}" if inference_dtype else ""
        settings: Dict[str, Any] = {
            "router": router,
            "backend": backend,
            "recompute": recompute,
            "inference_dtype": inference_dtype,
        }
        arms[name] = Arm(build(case, **settings), **settings)
    if args.graph:
        for name, arm in list(arms.items()):
            if not _waits(arm, case, args.device):
                arms[f"{name}{GRAPH}"] = Arm(arm.module, **arm.about, graph=True)
    return arms


def has_onednn() -> bool:
    """Whether torch lets oneDNN's products be called."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _measure_case(case: Case, args: argparse.Namespace, bandwidth: float) -> List[Record]:
    """The rows of one table.

    Args:
        case: what is computed.
        args: the flags.
        bandwidth: bytes per second that memory can be read at.
    """
    device, dtype = args.device, getattr(torch, case.dtype)
    with torch.device(device):
        arms = _arms(case, args)
        shape = (case.tokens, case.embed_dim)
        x = torch.randn(shape, dtype=dtype, requires_grad=case.mode == BACKWARD)
        upstream = torch.randn(shape, dtype=dtype)
    of_one_expert = sum(weight.numel() for weight in arms[DENSE].weights)
    rows: Dict[str, Record] = {}
    for name, arm in arms.items():
        arm.module.to(dtype)
        arm.prepare(case, x, upstream)
        for _ in range(WARM_UP_STEPS):
            arm.step()
        if arm.about.get("graph"):
            arm.capture()
        calls = math.ceil(SAMPLE_SECONDS / measuring.wall_seconds(arm.step, device))
        row: Record = {**case._asdict(), "arm": name, **arm.about, "calls": min(calls, MOST_CALLS)}
        expert_tokens = arm.expert_tokens(x)
        experts_read = 1
        if expert_tokens is not None:
            experts_read = int(expert_tokens.count_nonzero())
            shares = expert_tokens / expert_tokens.sum()
            row["smallest_share"], row["largest_share"] = shares.min().item(), shares.max().item()
        if case.mode == BACKWARD and not arm.about.get("graph"):
            row["peak_bytes"] = measuring.peak_bytes(arm.step, arm.weights, device)
        elif case.mode == FORWARD and name != LOOP:
            kept = getattr(torch, arm.about.get("inference_dtype") or case.dtype)
            row["weight_bytes"] = experts_read * of_one_expert * kept.itemsize
            row["weight_seconds"] = row["weight_bytes"] / bandwidth
        rows[name] = row
    samples = {
        name: functools.partial(measuring.seconds_per_call, arm.step, rows[name]["calls"], device)
        for name, arm in arms.items()
    }
    for name, seconds in measuring.take_turns(samples, args.repetitions, str(case)).items():
        rows[name]["seconds"] = seconds
    return list(rows.values())


def cases(args: argparse.Namespace) -> List[Case]:
    """What the flags ask for, or the default cases where they ask for nothing."""
    asked = (args.mode, args.tokens, args.num_experts, args.size, args.dtype)
    if not any(asked):
        return DEFAULT_CASES[args.device]
    first = DEFAULT_CASES[args.device][0]
    return [
        Case(mode, tokens, num_experts, embed_dim, ffn_dim, dtype)
        for mode, tokens, num_experts, (embed_dim, ffn_dim), dtype in itertools.product(
            args.mode or [FORWARD, BACKWARD],
            args.tokens or [first.tokens],
            args.num_experts or [first.num_experts],
            args.size or [(first.embed_dim, first.ffn_dim)],
            args.dtype or [first.dtype],
        )
    ]


def measure(args: argparse.Namespace) -> Iterator[Record]:
    """Seconds, bytes and shares of every arm of every case."""
    bandwidth = measuring.read_bandwidth(args.device)
    rows: List[Record] = []
    for case in cases(args):
        with torch.set_grad_enabled(case.mode == BACKWARD):
            rows += _measure_case(case, args, bandwidth)
        yield {"read_bytes_per_second": bandwidth, "rows": rows}


def table(rows: List[Record]) -> str:
    """One table for each case; ratios are medians of the rounds' ratios, with quartiles."""
    cases: Dict[Case, List[Record]] = {}
    for row in rows:
        cases.setdefault(Case(*(row[field] for field in Case._fields)), []).append(row)
    return "\n\n".join(f"{case}\n\n{_table_of(case, of_case)}" for case, of_case in cases.items())


def _table_of(case: Case, rows: List[Record]) -> str:
    arms = {row["arm"]: row for row in rows}
    yardsticks = [name for name in (DENSE, ONEDNN, LOOP) if name in arms]
    head = ["layer", "time (ms)", *(f"time / {name}" for name in yardsticks), "time / switch"]
    if case.mode == BACKWARD:
        head += ["peak (MB)", "peak / dense"]
    else:
        head += ["weights (ms)", "time / weights"]
    cells = [head]
    for row in rows:
        ending = GRAPH if row.get("graph") else ""
        bases = [*(arms.get(f"{name}{ending}") for name in yardsticks), _switch_beside(row, rows)]
        cells.append([row["arm"], measuring.milliseconds(row["seconds"])])
        cells[-1] += [measuring.ratio(row["seconds"], b["seconds"]) if b else "" for b in bases]
        if "peak_bytes" in row:
            peak = row["peak_bytes"]
            cells[-1] += [f"{peak / 1e6:.1f}", f"{peak / arms[DENSE]['peak_bytes']:.2f}"]
        elif "weight_seconds" in row:
            times = row["seconds"], [row["weight_seconds"]] * len(row["seconds"])
            cells[-1] += [measuring.milliseconds(times[1]), measuring.ratio(*times)]
        else:
            cells[-1] += ["", ""]
    return markdown(cells)


def _switch_beside(row: Record, rows: List[Record]) -> Optional[Record]:
    """The row of ``switch`` that differs from a layer's in the router alone."""
    same = {**row, "router": "switch"}
    for other in rows:
        if all(other.get(key) == same.get(key) for key in SETTINGS):
            return other
    return None


def _size(text: str) -> List[int]:
    embed_dim, ffn_dim = text.split(",")
    return [int(embed_dim), int(ffn_dim)]


def build_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    group = parser.add_argument_group("cases", "every combination; without any the default cases")
    group.add_argument("--mode", nargs="+", choices=(FORWARD, BACKWARD), metavar="MODE")
    group.add_argument("--tokens", nargs="+", type=int, metavar="T")
    group.add_argument("--num-experts", nargs="+", type=int, metavar="N")
    group.add_argument(
        "--size", nargs="+", type=_size, metavar="D,F", help="embed_dim and ffn_dim: 512,2048"
    )
    group.add_argument(
        "--dtype", nargs="+", choices=("float32", "bfloat16", "float16"), metavar="DTYPE"
    )
    parser.add_argument(
        "--router",
        nargs="+",
        choices=[name for name, kind in ROUTERS.items() if not kind.needs_token_ids],
        default=["switch", "sparsemixer"],
        metavar="NAME",
        help="default: switch sparsemixer",
    )
    parser.add_argument(
        "--backend",
        nargs="+",
        choices=("auto", *BACKENDS),
        default=["auto"],
        metavar="NAME",
        help=f"auto, {', '.join(BACKENDS)}; left out where the dtype is not served (default: auto)",
    )
    parser.add_argument(
        "--recompute",
        action="store_true",
        help="also with the experts' inner layer computed again in the backward pass",
    )
    parser.add_argument(
        "--laid-out",
        action="store_true",
        help="also with weights laid out for inference (CPU, float32, forward)",
    )
    parser.add_argument(
        "--graph", action="store_true", help="also as the replay of a CUDA graph (GPU)"
    )
    measuring.add_arguments(parser)
    return parser


def main() -> None:
    """Measure, print, write."""
    measuring.run(build_parser(), measure, table)


if __name__ == "__main__":
    main()
