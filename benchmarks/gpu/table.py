"""The summary of a folder of results, of whatever is there."""

from typing import Dict, List, Tuple

from benchmarks import layer, measuring
from benchmarks.gpu import ceilings, checks, kernels, sweep
from benchmarks.gpu.results import DONE, Results
from benchmarks.gpu.steps import (
    CHECKS,
    GENERATE,
    KERNELS,
    LAYER,
    MACHINE,
    OPERATORS,
    STUDY,
    SWEEP,
    TESTS,
    TRAIN,
)
from benchmarks.measuring import Record
from fairseq_sparsemixer.runs.arms import DENSE
from fairseq_sparsemixer.tables import markdown


def headline(step: str, result: Record) -> str:
    """The few words about a step that its line on the terminal has."""
    kind, rows = step.split()[0], result.get("rows", [])
    if kind == MACHINE and result:
        best = max((row["flops_per_second"] for row in rows), default=0.0)
        copied = result["copy_bytes_per_second"]
        return f"copies {copied / 1e9:.0f} GB/s, multiplies {best / 1e12:.3g} TFLOP/s"
    if kind == CHECKS:
        return f"{sum(row['passed'] for row in rows)} of {len(rows)} passed"
    if kind == LAYER:
        cases = _cases(rows)
        return "; ".join(f"{c.mode}, N={c.num_experts} {_best(own)}" for c, own in cases.items())
    if kind == KERNELS:
        return ", ".join(f"{row['arm']} {_kernel_time(row):.0f} us" for row in rows)
    if kind == TRAIN:
        return ", ".join(f"{row['arm']} {_speed(row):.0f} words/s" for row in rows)
    if kind == GENERATE:
        return ", ".join(
            f"{row['arm']} {row['tokens'] / measuring.quartiles(row['seconds'])[1]:.0f} tokens/s"
            for row in rows
        )
    if kind in (OPERATORS, SWEEP):
        tried = [row for row in rows if "setting" in row]
        failed = f", {sum('failed' in row for row in tried)} of them failed" if tried else ""
        return f"{len(rows) - len(tried)} operators, {len(tried)} other launches{failed}"
    if kind == TESTS and result:
        return _counts(result)
    if kind == STUDY and result:
        return ", ".join(f"{name} {_last(run)}" for name, run in result["runs"].items())
    return ""


def _counts(tests: Record) -> str:
    counts = f"{tests['passed']} passed, {tests['skipped']} skipped, {len(tests['failed'])} failed"
    return ": ".join([counts, *([" ".join(tests["failed"])] if tests["failed"] else [])])


def _last(points: List[Record]) -> str:
    if not points:
        return "without a point"
    return f"{points[-1]['updates']} updates, validation nll {points[-1]['nll_loss']:.3f}"


def _speed(row: Record) -> float:
    return measuring.quartiles(w / s for w, s in zip(row["words"], row["seconds"]))[1]


def _kernel_time(row: Record) -> float:
    return sum(microseconds for microseconds, _ in row["kernels"].values())


def _cases(rows: List[Record]) -> Dict[layer.Case, List[Record]]:
    cases: Dict[layer.Case, List[Record]] = {}
    for row in rows:
        cases.setdefault(layer.Case(*(row[field] for field in layer.Case._fields)), []).append(row)
    return cases


Ratios = Dict[str, Dict[str, float]]
"""Arm -> "eager" and, where it can be captured, "graph" -> its time over that of dense."""


def _to_dense(rows: List[Record]) -> Ratios:
    """Eager beside eager, a replay beside a replay; of the rows of one case."""
    seconds = {row["arm"]: row["seconds"] for row in rows}
    found: Ratios = {}
    for arm in (name for name in seconds if not name.endswith(layer.GRAPH)):
        for kind, ending in (("eager", ""), ("graph", layer.GRAPH)):
            own, base = seconds.get(f"{arm}{ending}"), seconds.get(f"{layer.DENSE}{ending}")
            if own and base and arm != layer.DENSE:
                ratio = measuring.quartiles(a / b for a, b in zip(own, base))[1]
                found.setdefault(arm, {})[kind] = ratio
    return found


def _best(rows: List[Record]) -> str:
    """The layer with experts that takes least time beside dense, as a replay if there is one."""
    ratios = {
        row["arm"]: values.get("graph", values["eager"])
        for row in rows
        if "router" in row and (values := _to_dense(rows).get(row["arm"]))
    }
    arm = min(ratios, key=lambda name: ratios[name])
    return f"{ratios[arm]:.2f} times dense ({arm})"


def _layers(rows: List[Record]) -> str:
    """A line for each case: dense in milliseconds, the others in times dense."""
    cases = {case: (own, _to_dense(own)) for case, own in _cases(rows).items()}
    arms = list(dict.fromkeys(arm for _, ratios in cases.values() for arm in ratios))
    cells = [["layer", f"{layer.DENSE} (ms)", *(f"{arm} / dense" for arm in arms)]]
    for case, (own, ratios) in cases.items():
        seconds = {row["arm"]: row["seconds"] for row in own}
        sizes = f"{case.mode}, {case.dtype}, d = {case.embed_dim}, N = {case.num_experts}"
        dense = (seconds.get(f"{layer.DENSE}{ending}") for ending in ("", layer.GRAPH))
        cells.append([sizes, ", ".join(measuring.milliseconds(each) for each in dense if each)])
        for arm in arms:
            cells[-1].append(", ".join(f"{value:.2f}" for value in ratios.get(arm, {}).values()))
    return markdown(cells)


def _trainings(steps: List[Tuple[str, Record]]) -> str:
    names = list(dict.fromkeys(row["arm"] for _, result in steps for row in result["rows"]))
    others = [name for name in names if name != DENSE]
    cells = [["training", f"{DENSE} (words/s)", *(f"{name} / {DENSE}" for name in others)]]
    for step, result in steps:
        rows = {row["arm"]: row for row in result["rows"]}
        dense = rows[DENSE]["seconds"]
        ratios = [measuring.ratio(dense, rows[n]["seconds"]) if n in rows else "" for n in others]
        title = step[len(TRAIN) + 1 :] + " tokens a batch"
        cells.append([title, f"{_speed(rows[DENSE]):.0f}", *ratios])
    return markdown(cells)


def _decodings(rows: List[Record]) -> str:
    from benchmarks.generate import table  # and fairseq: the first step need not wait for it

    return table(rows)


def _steps(results: Results) -> str:
    cells = [["step", "how it ended", "seconds"]]
    for name, step in results.steps.items():
        cells.append([name, step["status"], f"{step['seconds']:.0f}" if "seconds" in step else ""])
    return markdown(cells)


def _of_kind(results: Results, kind: str) -> List[Tuple[str, Record]]:
    """The steps of a kind that have found something, with that."""
    found = ((name, results.result(name)) for name in results.steps if name.split()[0] == kind)
    return [(name, result) for name, result in found if result]


def summary(results: Results) -> str:
    """Markdown of all that is there."""
    about = results.about
    where = f"{about['gpu'] or 'without a GPU'}, driver {about['driver']}"
    parts = [f"# {where}{', dry run' if about['dry_run'] else ''}"]

    def rows_of(kind: str) -> List[Record]:
        return [row for _, result in _of_kind(results, kind) for row in result.get("rows", [])]

    for _, result in _of_kind(results, MACHINE):
        read, copied = result["read_bytes_per_second"], result["copy_bytes_per_second"]
        parts.append(measuring.in_words(result["machine"]))
        parts.append(f"Memory is read at {read / 1e9:.0f} GB/s and copied at {copied / 1e9:.0f}.")
        parts += [ceilings.table(result["rows"])] if result["rows"] else []
    tables = (
        ("Checks", CHECKS, checks.table),
        ("Layers (eager, graph replay)", LAYER, _layers),
        ("Kernels of forward + backward", KERNELS, kernels.table),
        ("Decoding", GENERATE, _decodings),
        ("Operators", OPERATORS, sweep.table),
        ("Kernels launched in other ways", SWEEP, sweep.table),
    )
    for title, kind, table in tables:
        rows = rows_of(kind)
        parts += [f"## {title}", table(rows)] if rows else []
    trainings = _of_kind(results, TRAIN)
    parts += ["## Training", _trainings(trainings)] if trainings else []
    for kind, title in ((TESTS, "Tests"), (STUDY, "Study")):
        parts += [f"{title}: {headline(kind, result)}" for _, result in _of_kind(results, kind)]
    failed = [
        f"{name}: {step['error'].strip().splitlines()[-1]}"
        for name, step in results.steps.items()
        if step["status"] != DONE and step.get("error", "").strip()
    ]
    parts += ["## Steps", _steps(results), *failed]
    return "\n\n".join(parts)
