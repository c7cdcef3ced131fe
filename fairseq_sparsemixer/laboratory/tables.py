"""The results of the laboratory as Markdown."""

from typing import Any, Dict, Iterable, List, Optional

from fairseq_sparsemixer.laboratory.measures import Measure
from fairseq_sparsemixer.tables import escape, markdown

Record = Dict[str, Any]
_FIGURES = {"estimator": str, **dict.fromkeys(Measure._fields, (float, None))}
RECORD = (
    {"kind": str, "estimator": str, "scales": [float], "bias": [float], "slope": float},
    {"kind": str, "num_experts": int, "temperature": float, "mean_to_spread": float, **_FIGURES},
    {
        **{"checkpoint": str, "updates": int, "layer": str, "tokens": int},
        **{"explained": {str: float}, "mask": (float, None), "tokens_with_choice": float},
        **_FIGURES,
    },
)
"""What a record is in a file: of the order of accuracy, of another toy, of a model's layer."""

COLUMNS = ("bias", "noise", "rmse", "cosine", "length")


def toy_tables(records: List[Record]) -> str:
    """The order of accuracy, and bias and noise for four experts at temperature 1."""
    order = [r for r in records if r["kind"] == "order"]
    parts = ["Order of accuracy: slope of the relative bias against the scale of the outputs", ""]
    head = ["method", *(f"scale {s:g}" for s in order[0]["scales"]), "slope"]
    rows = [[r["estimator"], *(f"{b:.2g}" for b in r["bias"]), f"{r['slope']:.2f}"] for r in order]
    parts.append(markdown([head, *rows]))
    for kind in dict.fromkeys(r["kind"] for r in records if r["kind"] != "order"):
        for mean_to_spread in (1.5, 0.0):
            chosen = [
                r
                for r in records
                if r["kind"] == kind
                and (r["num_experts"], r["temperature"]) == (4, 1.0)
                and r["mean_to_spread"] == mean_to_spread
            ]
            means = "" if mean_to_spread else ", experts with the same mean output"
            parts += ["", f"{kind} f, 4 experts, temperature 1{means}", ""]
            rows = [[r["estimator"], *(_cell(r[c]) for c in COLUMNS)] for r in chosen]
            parts.append(markdown([["estimator", *COLUMNS], *rows]))
    return "\n".join(parts)


def model_tables(records: List[Record]) -> str:
    """For each checkpoint, without and with the mask: cosine by layer, the rest as means."""
    parts: List[str] = []
    for checkpoint in dict.fromkeys(r["checkpoint"] for r in records):
        of_checkpoint = [r for r in records if r["checkpoint"] == checkpoint]
        updates = of_checkpoint[0]["updates"]
        parts += [f"{escape(checkpoint)} ({updates} updates)", "", _about_layers(of_checkpoint)]
        for mask in dict.fromkeys(r["mask"] for r in of_checkpoint):
            chosen = [r for r in of_checkpoint if r["mask"] == mask]
            title = "every expert may be drawn" if mask is None else f"mask of jitter-eps {mask:g}"
            parts += ["", f"{title}: cosine by layer; means over layers", "", _by_layer(chosen)]
        parts.append("")
    return "\n".join(parts).rstrip()


def _about_layers(records: List[Record]) -> str:
    layers = {r["layer"]: r for r in records if r["mask"] is None}
    masked = {r["layer"]: r["tokens_with_choice"] for r in records if r["mask"] is not None}
    names = list(next(iter(layers.values()))["explained"])
    head = ["layer", "tokens", "with a choice", *(f"explained by {name}" for name in names)]
    rows = [
        [
            layer,
            str(r["tokens"]),
            f"{100 * masked[layer]:.0f} %" if layer in masked else "",
            *(f"{100 * r['explained'][name]:.0f} %" for name in names),
        ]
        for layer, r in layers.items()
    ]
    return markdown([head, *rows])


def _by_layer(records: List[Record]) -> str:
    layers = list(dict.fromkeys(r["layer"] for r in records))
    rows = [["estimator", *layers, "bias", "noise", "length", "batch cosine"]]
    for name in dict.fromkeys(r["estimator"] for r in records):
        own = {r["layer"]: r for r in records if r["estimator"] == name}
        means = [
            mean_of_measured(r[column] for r in own.values())
            for column in ("bias", "noise", "length", "batch_cosine")
        ]
        cosines = [own[layer]["cosine"] for layer in layers]
        rows.append([name, *map(_cell, [*cosines, *means])])
    return markdown(rows)


def _cell(value: Optional[float]) -> str:
    """Empty where it cannot be measured."""
    return "" if value is None else f"{value:.3f}"


def mean_of_measured(values: Iterable[Optional[float]]) -> Optional[float]:
    """The mean of those that are not None (layers in which some token has a choice), if any."""
    measured = [value for value in values if value is not None]
    return sum(measured) / len(measured) if measured else None
