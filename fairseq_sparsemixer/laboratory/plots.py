"""Figures for print: vector and bitmap, told apart by marker and line as well as by colour.

Needs matplotlib (``pip install 'fairseq-sparsemixer[report]'``).
"""

from pathlib import Path
from typing import Any, Dict, List, Tuple

from fairseq_sparsemixer.laboratory.tables import Record, mean_of_measured
from fairseq_sparsemixer.plotting import COLOURS, pyplot, save

STYLES: Dict[str, Tuple[str, str, str]] = {
    "switch (arg-max)": (COLOURS["black"], "s", "-"),
    "backprop, sampled": (COLOURS["grey"], "v", "--"),
    "sparsemixer-1st": (COLOURS["sky"], "o", "--"),
    "sparsemixer, no override": (COLOURS["blue"], "D", ":"),
    "sparsemixer": (COLOURS["blue"], "o", "-"),
    "sparsemixer, full gate": (COLOURS["vermilion"], "s", "--"),
    "sparsemixer-v2-star, no override": (COLOURS["green"], "^", ":"),
    "sparsemixer-v2-star": (COLOURS["green"], "^", "--"),
    "sparsemixer-cv": (COLOURS["vermilion"], "P", "-"),
    "sparsemixer-cv, linear": (COLOURS["orange"], "X", "-"),
    "default-moe": (COLOURS["purple"], "<", "-."),
    "reinmax (dense)": (COLOURS["purple"], ">", ":"),
}
"""What the figures show of all estimators: colour, marker, line."""


def toy_figures(records: List[Record], output: Path) -> List[Path]:
    """Order of accuracy; bias and noise over temperature and number of experts."""
    plt = pyplot()
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(10, 3.4), layout="constrained")
    for record in records:
        if record["kind"] == "order":
            colour, marker, line = STYLES[record["estimator"]]
            label = f"{record['estimator']} (slope {record['slope']:.1f})"
            left.loglog(
                record["scales"],
                record["bias"],
                color=colour,
                marker=marker,
                ls=line,
                label=label,
                base=2,
            )
    left.set(xlabel="scale of the experts' outputs", ylabel="bias / exact gradient")
    left.set_title("Order of accuracy", fontsize="medium")
    left.set_ylim(bottom=left.get_ylim()[0] / 100)  # room for the legend
    left.legend(loc="lower right", fontsize="x-small")
    network = [r for r in records if r["kind"] == "network" and r["mean_to_spread"]]
    _lines(middle, [r for r in network if r["num_experts"] == 4], "temperature", "bias")
    middle.set(xlabel="temperature (4 experts)", ylabel="bias / exact gradient")
    middle.set_title("Bias", fontsize="medium")
    _lines(right, [r for r in network if r["temperature"] == 1], "num_experts", "noise")
    right.set(xlabel="experts (temperature 1)", ylabel="noise of a draw / exact gradient")
    right.set_title("Noise", fontsize="medium")
    for axis, key in ((middle, "temperature"), (right, "num_experts")):
        ticks = sorted({r[key] for r in network})
        axis.set_xscale("log", base=2)
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    _legend(figure, middle)
    return save(figure, output, "exact")


def model_figures(records: List[Record], output: Path) -> List[Path]:
    """By layer for the last checkpoint, and over checkpoints if there are several."""
    written = []
    for mask in dict.fromkeys(r["mask"] for r in records):
        chosen = [r for r in records if r["mask"] == mask]
        name = "all-experts" if mask is None else "masked"
        written += _layer_figure(chosen, output, f"layers-{name}")
        if len({r["checkpoint"] for r in chosen}) > 1:
            written += _progress_figure(chosen, output, f"progress-{name}")
    return written


MODEL_PANELS = (
    ("cosine", "cosine of the mean estimate\nwith the exact gradient"),
    ("rmse", "error of one draw\n/ exact gradient"),
    ("batch_cosine", "cosine of one batch's gradient\nof the router's weights"),
)


def _layer_figure(records: List[Record], output: Path, name: str) -> List[Path]:
    last = max(records, key=lambda r: r["updates"])["checkpoint"]
    records = [r for r in records if r["checkpoint"] == last]
    layers = list(dict.fromkeys(r["layer"] for r in records))
    figure, axes = pyplot().subplots(1, 3, figsize=(10, 3.8), layout="constrained")
    for axis, (key, label) in zip(axes, MODEL_PANELS):
        places = [{**r, "place": layers.index(r["layer"])} for r in records]
        _lines(axis, places, "place", key)
        axis.set_xticks(range(len(layers)), layers, rotation=20)
        axis.set_ylabel(label)
    _legend(figure, axes[0])
    return save(figure, output, name)


def _progress_figure(records: List[Record], output: Path, name: str) -> List[Path]:
    figure, axes = pyplot().subplots(1, 3, figsize=(10, 3.8), layout="constrained")
    for axis, (key, label) in zip(axes, MODEL_PANELS):
        means = []
        for estimator in STYLES:
            for updates in sorted({r["updates"] for r in records}):
                mean = mean_of_measured(
                    r[key]
                    for r in records
                    if (r["estimator"], r["updates"]) == (estimator, updates)
                )
                means.append({"estimator": estimator, "updates": updates, key: mean})
        _lines(axis, means, "updates", key)
        axis.set(xlabel="updates (means over layers)", ylabel=label)
    _legend(figure, axes[0])
    return save(figure, output, name)


def _lines(axis: Any, records: List[Record], x: str, y: str) -> None:
    """One line for each estimator of :data:`STYLES` that occurs."""
    for estimator, (colour, marker, line) in STYLES.items():
        own = [r for r in records if r["estimator"] == estimator]
        points = sorted((r[x], r[y]) for r in own if r[y] is not None)
        if points:
            axis.plot(
                *zip(*points), color=colour, marker=marker, ls=line, ms=4, lw=1, label=estimator
            )
    axis.grid(alpha=0.3)


def _legend(figure: Any, axis: Any) -> None:
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize="x-small")
