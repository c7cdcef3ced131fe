"""What the machine is, and the most that it does: bytes copied and products a second.

python -m benchmarks.gpu.ceilings --output ceilings.json
"""

import argparse
import functools
import itertools
from typing import Any, Callable, Iterator, List

import torch

from benchmarks import measuring
from benchmarks.measuring import Record
from fairseq_sparsemixer.tables import markdown

COPY_BYTES = {"cpu": 1 << 24, "cuda": 1 << 31}
"""Read, and written, by the copy that is timed."""
PRODUCTS = {
    "cpu": [(256, 64, 128)],
    "cuda": [(8192, 512, 2048), (8192, 2048, 512), (8192, 1024, 4096), (8192, 4096, 4096)],
}
"""(tokens, inputs, outputs): those of feed-forward networks, and a larger one."""
DTYPES = ("bfloat16", "float16")
CALLS = {"cpu": 2, "cuda": 20}
"""Of which a mean is formed."""
BEST_OF = 5


def _best_seconds(call: Callable[[], Any], device: str) -> float:
    calls = CALLS[device]
    measuring.seconds_per_call(call, calls, device)
    return min(measuring.seconds_per_call(call, calls, device) for _ in range(BEST_OF))


def measure(args: argparse.Namespace) -> Iterator[Record]:
    """Bytes and floating-point operations per second, the best of five means."""
    device = args.device
    source = torch.ones(COPY_BYTES[device] // 4, device=device)
    target = torch.empty_like(source)
    seconds = _best_seconds(functools.partial(target.copy_, source), device)
    about = {
        "capability": torch.cuda.get_device_capability() if device == "cuda" else None,
        "read_bytes_per_second": measuring.read_bandwidth(device),
        "copy_bytes_per_second": 2 * COPY_BYTES[device] / seconds,
    }
    del source, target
    rows: List[Record] = []
    yield {**about, "rows": rows}
    for (tokens, inputs, outputs), dtype in itertools.product(PRODUCTS[device], DTYPES):
        a = torch.randn(tokens, inputs, device=device, dtype=getattr(torch, dtype))
        w = torch.randn(outputs, inputs, device=device, dtype=getattr(torch, dtype))
        seconds = _best_seconds(functools.partial(torch.matmul, a, w.t()), device)
        sizes = {"tokens": tokens, "inputs": inputs, "outputs": outputs, "dtype": dtype}
        flops = 2 * tokens * inputs * outputs / seconds
        rows.append({**sizes, "seconds": seconds, "flops_per_second": flops})
    yield {**about, "rows": rows}


def table(rows: List[Record]) -> str:
    """A line for each product."""
    cells = [["product", *(f"{dtype} (TFLOP/s)" for dtype in DTYPES)]]
    sizes = ("tokens", "inputs", "outputs")
    for size in dict.fromkeys(tuple(row[name] for name in sizes) for row in rows):
        own = {r["dtype"]: r for r in rows if tuple(r[name] for name in sizes) == size}
        speeds = [f"{own[dtype]['flops_per_second'] / 1e12:.3g}" for dtype in DTYPES]
        cells.append([" x ".join(map(str, size)), *speeds])
    return markdown(cells)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    measuring.add_arguments(parser)
    measuring.run(parser, measure, table)


if __name__ == "__main__":
    main()
