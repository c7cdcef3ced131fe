"""What ``--dry-run`` prints: the command, the parameters, and estimates of memory and time."""

import shlex
from typing import Dict, List

from fairseq_sparsemixer.tables import format_table
from fairseq_sparsemixer.training import resources
from fairseq_sparsemixer.training.plan import Launch

_GB = 1e9
_ELSEWHERE = (1, 8)
"""Numbers of GPUs that the table of other GPUs is for."""


def format_launch(launch: Launch) -> str:
    """A launch as text."""
    batch, machine = launch.batch, launch.machine
    parameters = resources.count_parameters(launch.model)
    entries = launch.assumed_entries
    assumed = f" (a dictionary of {entries:,} entries is assumed)" if entries else ""
    gpus = ", ".join(f"{machine.gpus.count(g)} x {g}" for g in dict.fromkeys(machine.gpus))
    nodes = f" on each of {machine.nodes} nodes" if machine.nodes > 1 else ""
    updates = launch.settings["optimization"]["max_update"]
    lines = [
        f"run         {launch.folder}",
        f"command     {shlex.join(launch.command)}",
        f"workers     {batch.workers}: {gpus or 'the CPU'}{nodes}, {launch.precision}",
        f"update      {batch.tokens_per_update:,} tokens a side at most: workers {batch.workers} x "
        f"update_freq {batch.update_freq} x max_tokens {batch.max_tokens:,}",
        f"updates     {updates:,}",
        f"parameters  {parameters.total:,}; a token uses {parameters.active:,}{assumed}",
        "",
        *_memory(launch),
        "",
        *_time(launch, updates),
    ]
    return "\n".join(lines)


def _memory(launch: Launch) -> List[str]:
    memory = _memory_parts(launch, launch.precision != "fp32", launch.batch.workers)
    where = "each GPU, without CUDA's own," if launch.machine.gpus else "each worker"
    lines = [
        f"memory of {where} about {_sum(memory)} (an estimate):",
        *(f"    {size / _GB:6.2f} GB  {part}" for part, size in memory.items()),
    ]
    if not launch.machine.gpus:
        lines.append(f"    {_sum(_memory_parts(launch, True, 1))} on one GPU in half precision")
    return lines


def _memory_parts(launch: Launch, half: bool, workers: int) -> Dict[str, int]:
    held, own = resources.count_parameters(launch.model).total, 0
    group = launch.settings["model"].get("expert_parallel_size") or 1
    if workers > 1 and group > 1:
        own = resources.expert_parameters(launch.model, group)
        held += own - resources.expert_parameters(launch.model)
    return {
        **resources.state_bytes(held, half, workers, spread=own),
        **resources.activation_bytes(launch.model, launch.batch.max_tokens, half),
    }


def _sum(memory: Dict[str, int]) -> str:
    return f"{sum(memory.values()) / _GB:.1f} GB"


def _time(launch: Launch, updates: int) -> List[str]:
    batch = launch.batch
    computed = resources.count_parameters(launch.model).computed
    flops = resources.update_flops(computed, batch.tokens_per_update)
    lines = [
        f"time: an estimate from {flops / 1e12:.1f} TFLOP an update (6 x {computed:,} parameters x "
        f"tokens) at {100 * resources.UTILISATION:.0f} % of a GPU's peak, which is assumed, not "
        "measured"
    ]
    peaks = [resources.peak_tflops(gpu) for gpu in launch.machine.gpus]
    known = [peak for peak in peaks if peak is not None]
    if known and len(known) == len(peaks) and launch.precision != "fp32":
        slowest = min(known)  # the others wait for it
        hours = resources.training_hours(flops, updates, batch.workers, slowest)
        lines.append(f"    {_hours(hours)} here, at {slowest} TFLOP/s for each GPU")
        return lines
    lines.append(
        "    not known for this machine; in half precision on others, by their data sheets:"
    )
    rows = [["", "TFLOP/s", *(f"{number} GPU{'s' * (number > 1)}" for number in _ELSEWHERE)]]
    for name, peak in resources.PEAK_TFLOPS.items():
        times = [resources.training_hours(flops, updates, n, peak) for n in _ELSEWHERE]
        rows.append([name, str(peak), *map(_hours, times)])
    return lines + [f"    {line}" for line in format_table(rows).splitlines()]


def _hours(hours: float) -> str:
    return f"{hours / 24:.1f} days" if hours >= 48 else f"{hours:.1f} hours"
