"""What the benchmarks share: the machine, the clock, the memory meter, and their command lines.

Arms that are compared run in one process and take turns, so that a busy machine slows them alike.
A table's ratios are medians of the rounds' ratios, with the lower and the upper quartile.
"""

import argparse
import importlib
import os
import platform
import re
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, Iterator, List, Mapping, Optional, Tuple

import torch
from torch import Tensor
from tqdm import tqdm

from fairseq_sparsemixer.errors import UserError
from fairseq_sparsemixer.files import check_writable, read_json, write_json

Record = Dict[str, Any]
Allocation = Tuple[int, int]
"""An address, and so many bytes taken there; negative where they are given back."""

BANDWIDTH_BYTES = {"cpu": 1 << 29, "cuda": 1 << 32}
"""What :func:`read_bandwidth` reads: many times the caches, of which the largest on CPUs (L3 of a
server) and on GPUs (L2) have some dozens of MB."""


def machine(device: str) -> Record:
    """What the figures were measured on.

    Args:
        device: "cpu" or "cuda".
    """
    gpu = torch.cuda.get_device_properties(0) if device == "cuda" else None
    cpu = _cpu_name()
    config = torch.__config__.show()
    return {
        "device": cpu if gpu is None else gpu.name,
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpu_memory_bytes": None if gpu is None else gpu.total_memory,
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "blas": _found(r"BLAS_INFO=(\w+)", config),
        "onednn": _found(r"MKL-DNN v([\d.]+)", config),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": _version("triton"),
        "fairseq": _version("fairseq"),
        "python": platform.python_version(),
    }


def _cpu_name() -> str:
    information = Path("/proc/cpuinfo")
    text = information.read_text() if information.exists() else ""
    return _found(r"model name\s*: (.+)", text) or f"CPU, {platform.machine()}"


def _found(pattern: str, text: str) -> Optional[str]:
    match = re.search(pattern, text)
    return match.group(1) if match else None


def _version(module: str) -> Optional[str]:
    """The version of a module; None where it is not installed."""
    return importlib.import_module(module).__version__ if find_spec(module) else None


def in_words(machine: Record) -> str:
    """One line about a :func:`machine`."""
    if machine["gpu_memory_bytes"] is None:
        plural = "" if machine["threads"] == 1 else "s"
        where = f"{machine['device']} ({machine['vectors']}), {machine['threads']} thread{plural}"
    else:
        where = machine["device"]
    names = ("torch", "triton", "fairseq", "python")
    return ", ".join([where, *(f"{name} {machine[name]}" for name in names if machine[name])])


def wall_seconds(call: Callable[[], Any], device: str) -> float:
    """Seconds until the work of one call is done, on the host and on the device."""
    _synchronize(device)
    started = time.perf_counter()
    call()
    _synchronize(device)
    return time.perf_counter() - started


def seconds_per_call(call: Callable[[], Any], calls: int, device: str) -> float:
    """Mean seconds of so many calls on end; on a GPU between CUDA events around them all.

    One call may take less time than the clock and the synchronisation around it can tell.
    """
    if device == "cpu":
        started = time.perf_counter()
        for _ in range(calls):
            call()
        return (time.perf_counter() - started) / calls
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    _synchronize(device)
    start.record()
    for _ in range(calls):
        call()
    end.record()
    _synchronize(device)
    return start.elapsed_time(end) / 1000 / calls


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def take_turns(
    arms: Mapping[str, Callable[[], float]], rounds: int, description: str = ""
) -> Dict[str, List[float]]:
    """What each arm measures, round by round; the arms have been warmed up before.

    Args:
        arms: functions that measure once, by name.
        rounds: how often each of them is called.
        description: of the progress bar.
    """
    samples: Dict[str, List[float]] = {name: [] for name in arms}
    for _ in tqdm(range(rounds), unit=" rounds", desc=description or None):
        for name, arm in arms.items():
            samples[name].append(arm())
    return samples


def quartiles(values: Iterable[float]) -> Tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    points = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    low, middle, high = torch.tensor(list(values), dtype=torch.float64).quantile(points).tolist()
    return low, middle, high


def ratio(samples: List[float], base: List[float]) -> str:
    """The median of the rounds' ratios, with quartiles, as a table shows it."""
    low, middle, high = quartiles(own / other for own, other in zip(samples, base))
    return f"{middle:.2f} ({low:.2f}-{high:.2f})"


def milliseconds(samples: List[float]) -> str:
    """The median of samples in seconds."""
    middle = 1000 * quartiles(samples)[1]
    return f"{middle:.3f}" if middle < 10 else f"{middle:.1f}"


def read_bandwidth(device: str) -> float:
    """Bytes per second at which memory is read, the best of ten sums over a large buffer."""
    buffer = torch.ones(BANDWIDTH_BYTES[device] // 4, device=device)
    times = [seconds_per_call(buffer.sum, 1, device) for _ in range(11)]
    return 4 * buffer.numel() / min(times[1:])


def peak_bytes(step: Callable[[], Any], weights: Iterable[Tensor], device: str) -> int:
    """The most bytes that a step holds at a time, gradients of the weights not counted.

    Counted is what torch's allocator hands out during the step, temporary buffers inside of
    operators included: neither what was there before, nor what libraries take for themselves
    (workspaces of a BLAS).

    Args:
        step: leaves the gradients of ``weights``, if it computes them, where nothing else was.
        weights: the parameters whose gradients are left out.
        device: "cpu" or "cuda".
    """
    allocations = (_cuda_allocations if device == "cuda" else _cpu_allocations)(step)
    gradients = {w.grad.untyped_storage().data_ptr() for w in weights if w.grad is not None}
    # An address may have held other things before: what came there last is the gradient. One that
    # was not allocated in this step lies in memory that an earlier one had for the same purpose.
    last = {address: i for i, (address, size) in enumerate(allocations) if size > 0}
    left_out = {last[address] for address in gradients if address in last}
    held: Dict[int, int] = {}
    now = peak = 0
    for i, (address, size) in enumerate(allocations):
        if size < 0:
            # What was there before the step has no entry.
            now -= held.pop(address, 0)
        elif i not in left_out:
            held[address] = size
            now += size
            peak = max(peak, now)
    return peak


def _cpu_allocations(step: Callable[[], Any]) -> List[Allocation]:
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        step()

    def walk(events: List[Any]) -> Iterator[Tuple[int, int, int]]:
        for event in events:
            if event.tag == torch._C._profiler._EventType.Allocation:
                fields = event.extra_fields
                yield event.start_time_ns, fields.ptr, fields.alloc_size
            yield from walk(event.children)

    # The profiler's table of events has no addresses; its tree has them.
    events = walk(profile.profiler.kineto_results.experimental_event_tree())
    return [(address, size) for _, address, size in sorted(events, key=lambda event: event[0])]


def _cuda_allocations(step: Callable[[], Any]) -> List[Allocation]:
    torch.cuda.memory._record_memory_history(context=None)
    device = torch.cuda.current_device()
    before = len(torch.cuda.memory._snapshot()["device_traces"][device])
    step()
    events = torch.cuda.memory._snapshot()["device_traces"][device][before:]
    torch.cuda.memory._record_memory_history(enabled=None)
    signs = {"alloc": 1, "free_requested": -1}
    return [(e["addr"], signs[e["action"]] * e["size"]) for e in events if e["action"] in signs]


def add_arguments(parser: argparse.ArgumentParser, rounds: int = 20) -> None:
    """The flags of every benchmark.

    Args:
        parser: of the command.
        rounds: the default of ``--repetitions``.
    """
    parser.add_argument(
        "--repetitions",
        type=int,
        default=rounds,
        help="rounds in which every arm is measured once (default: %(default)s)",
    )
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="default: a GPU if there is one",
    )
    parser.add_argument("--output", type=output_file, metavar="FILE.json", help="where results go")


def output_file(text: str) -> Path:
    """A flag's value: a file that can be written.

    Raises:
        ArgumentTypeError: it cannot, which nobody wants to find out after measuring.
    """
    try:
        check_writable(Path(text))
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return Path(text)


def run(
    parser: argparse.ArgumentParser,
    measure: Callable[[argparse.Namespace], Iterator[Record]],
    table: Callable[[List[Record]], str],
) -> List[Record]:
    """Measure, print and write; or print what was written before.

    What was measured until then is written each time that there is more of it.

    Args:
        parser: with the command's own flags and those of :func:`add_arguments`.
        measure: yields the results so far, "rows" among them; all of them at last.
        table: makes Markdown of rows.

    Returns:
        The rows.
    """
    parser.add_argument(
        "--table",
        type=Path,
        nargs="+",
        metavar="FILE.json",
        help="measure nothing: print the table of results that --output wrote",
    )
    args = parser.parse_args()
    if args.table:
        shape = {"rows": [dict], "machine": dict}
        try:
            results = [read_json(path, shape, "give another") for path in args.table]
        except UserError as error:
            parser.error(f"--table: {error}")
    else:
        left_out = ("output", "table")
        settings = {key: value for key, value in vars(args).items() if key not in left_out}
        about = {"settings": settings, "machine": machine(args.device)}
        results = []  # where nothing can be measured
        for measured in measure(args):
            results = [{**about, **measured}]
            if args.output is not None:
                write_json(args.output, results[0])
    where = ""
    for result in results:
        if in_words(result["machine"]) != where:
            where = in_words(result["machine"])
            print(f"{where}\n")
        print(f"{table(result['rows'])}\n")
    return [row for result in results for row in result["rows"]]
