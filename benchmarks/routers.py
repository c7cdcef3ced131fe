"""What a router costs: one training step of a whole model with each of them, beside ``switch``.

  python -m benchmarks.routers --output routers.json

A step is forward, loss, backward and Adam on random tokens, dropout on. The steps of all routers
are interleaved, so that a busy machine slows them alike; the table gives medians and ratios. Memory
is what the forward pass keeps for the backward pass, and on a GPU also the allocator's peak.
"""

import argparse
import functools
import statistics
from typing import Any, Dict, List

import torch
from fairseq.models import build_model
from omegaconf import OmegaConf

from benchmarks import measuring
from benchmarks.models import RandomWords
from fairseq_sparsemixer.criterions import LabelSmoothedCrossEntropyWithRouting
from fairseq_sparsemixer.files import write_json
from fairseq_sparsemixer.moe import ROUTERS
from fairseq_sparsemixer.moe.feed_forward import moe_layers
from fairseq_sparsemixer.tables import markdown

VOCABULARY = 4000
EXTRA = {
    "sparsemixer-cv, linear": ("sparsemixer-cv", {"router_options": '{"prediction": "linear"}'})
}
"""Further rows: name, router, settings."""


def _sample(tokens: int, length: int, device: str) -> Dict[str, Any]:
    """A batch of sentences of random words, source and target of equal length."""
    words = torch.randint(4, VOCABULARY, (2, max(tokens // length, 1), length), device=device)
    source, target = words
    lengths = torch.full((len(source),), length, device=device)
    return {
        "net_input": {
            "src_tokens": source,
            "src_lengths": lengths,
            "prev_output_tokens": target.roll(1, dims=1),
        },
        "target": target,
        "ntokens": target.numel(),
    }


class _Arm:
    """One model and its optimiser."""

    def __init__(self, args: argparse.Namespace, router: str, settings: Dict[str, Any]) -> None:
        kind, task = ROUTERS[router], RandomWords(VOCABULARY)
        torch.manual_seed(0)
        model_settings = {
            "_name": args.arch,
            "router": router,
            "num_experts": args.num_experts,
            "top_k": max(kind.min_top_k, args.top_k if kind.max_top_k is None else 1),
            "dropout": 0.1,
            "share_all_embeddings": True,
            **settings,
        }
        if not kind.causal:
            model_settings["decoder_moe_layers"] = "none"
        self.top_k = model_settings["top_k"]
        self.model = build_model(OmegaConf.create(model_settings), task).to(args.device)
        self.model.train()
        self.criterion = LabelSmoothedCrossEntropyWithRouting(task, False, 0.1)
        self.optimiser = torch.optim.Adam(self.model.parameters(), lr=1e-4)

    def step(self, sample: Dict[str, Any]) -> None:
        """One update."""
        loss, size, _ = self.criterion(self.model, sample)
        self.optimiser.zero_grad()
        (loss / size).backward()
        self.optimiser.step()
        for layer in moe_layers(self.model):
            layer.end_update()

    def kept_bytes(self, sample: Dict[str, Any]) -> int:
        """Storage that the forward pass keeps for the backward pass, the model's own left out."""
        of_model = [*self.model.parameters(), *self.model.buffers()]
        own = {value.untyped_storage().data_ptr() for value in of_model}
        kept: Dict[int, int] = {}

        def pack(value: torch.Tensor) -> torch.Tensor:
            storage = value.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage.nbytes()
            return value

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
            loss, _, _ = self.criterion(self.model, sample)
        del loss
        return sum(kept.values())


def measure(args: argparse.Namespace) -> Dict[str, Any]:
    """Times (s) and bytes of every router, and what they were measured on."""
    of_any_text = [name for name, router in ROUTERS.items() if not router.needs_languages]
    names = of_any_text if args.routers == "all" else args.routers.split(",")
    chosen = {name: (name, {}) for name in ["switch", *names]}
    if args.routers == "all":
        chosen.update(EXTRA)
    arms = {name: _Arm(args, router, settings) for name, (router, settings) in chosen.items()}
    sample = _sample(args.tokens, args.length, args.device)
    rows: Dict[str, Dict[str, Any]] = {}
    for name, arm in arms.items():
        arm.step(sample)  # the first one allocates
        rows[name] = {
            "top_k": arm.top_k,
            "computes_all_experts": ROUTERS[chosen[name][0]].computes_all_experts,
            "kept_bytes": arm.kept_bytes(sample),
        }
        if args.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            arm.step(sample)
            rows[name]["peak_bytes"] = torch.cuda.max_memory_allocated() - before
    steps = {
        name: functools.partial(
            measuring.wall_seconds, functools.partial(arm.step, sample), args.device
        )
        for name, arm in arms.items()
    }
    for name, seconds in measuring.take_turns(steps, args.repetitions).items():
        rows[name]["seconds"] = seconds
    return {
        "settings": {key: value for key, value in vars(args).items() if key != "output"},
        **measuring.machine(args.device),
        "routers": rows,
    }


def table(results: Dict[str, Any]) -> str:
    """Medians, ratios to ``switch`` (the median of the rounds' ratios), and memory."""
    rows = results["routers"]
    base = rows["switch"]
    head = ["router", "top-k", "step (ms)", "time / switch", "kept (MB)", "kept / switch"]
    with_peak = "peak_bytes" in base
    cells: List[List[str]] = [head + ["peak / switch"] * with_peak]
    for name, row in rows.items():
        ratios = [own / other for own, other in zip(row["seconds"], base["seconds"])]
        cells.append(
            [
                f"`{name}`{' (all experts)' if row['computes_all_experts'] else ''}",
                str(row["top_k"]),
                f"{1000 * statistics.median(row['seconds']):.0f}",
                f"{statistics.median(ratios):.2f}",
                f"{row['kept_bytes'] / 1e6:.0f}",
                f"{row['kept_bytes'] / base['kept_bytes']:.2f}",
            ]
        )
        if with_peak:
            cells[-1].append(f"{row['peak_bytes'] / base['peak_bytes']:.2f}")
    return markdown(cells)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--routers", default="all", help="names with commas (default: all)")
    parser.add_argument("--arch", default="switch_transformer_demo", help="default: %(default)s")
    parser.add_argument("--num-experts", type=int, default=4, help="default: %(default)s")
    parser.add_argument(
        "--top-k", type=int, default=1, help="of routers that take any (default: %(default)s)"
    )
    parser.add_argument(
        "--tokens", type=int, default=2000, help="target tokens in a batch (default: %(default)s)"
    )
    parser.add_argument(
        "--length", type=int, default=20, help="of each sentence (default: %(default)s)"
    )
    measuring.add_arguments(parser)
    args = parser.parse_args()
    for name in [] if args.routers == "all" else args.routers.split(","):
        if name not in ROUTERS:
            parser.error(f"--routers: there is no {name!r}; choose from {', '.join(ROUTERS)}")
    results = measure(args)
    print(table(results))
    if args.output is not None:
        write_json(args.output, results)


if __name__ == "__main__":
    main()
