"""How figures are drawn (which there are: ``drawing``), to SVG and PNG, and for the page."""

import itertools
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

import numpy as np

from fairseq_sparsemixer.comparison.results import SIGNIFICANT, DomainScore
from fairseq_sparsemixer.plotting import COLOURS
from fairseq_sparsemixer.report.canvas import (
    FULL,
    HALF,
    Figure,
    Style,
    add_legend,
    canvas,
    keep,
    lowest,
    some,
)
from fairseq_sparsemixer.report.gather import Curves, Line, Loads, mean_line, timed

HEAT = "cividis"
MOST_NUMBERED = 16
"""Experts up to which a heat map has numbers in it."""
LEAST_TOP = 2.0
"""Where the scale of a heat map ends at least, in even loads: differences of nothing stay pale."""
MARKERS_OF_A_LINE = 8


class Painter:
    """Draws figures into a folder. What shows data has an id that starts with data-ARM, by number.

    Args:
        folder: where NAME.svg and NAME.png go.
        arm_styles: of all arms.
    """

    def __init__(self, folder: Path, arm_styles: Dict[str, Style]) -> None:
        self.folder = folder
        self.styles = arm_styles
        self._numbers = itertools.count()

    def _id(self, arm: str) -> str:
        return f"data-{list(self.styles).index(arm)}-{next(self._numbers)}"

    def curves(
        self, name: str, curves: Curves, label: str, over: str, zoom: bool
    ) -> Optional[Figure]:
        """A line for each arm, single seeds faint; None where nothing is known ``over`` it.

        Args:
            name: of the files.
            curves: of each arm.
            label: of the values.
            over: "updates" or "minutes".
            zoom: leave out what is above the values from a fifth of the longest training on.
        """
        if over == "minutes":
            curves = timed(curves)
        if not curves:
            return None
        with canvas(HALF, 2.9, list(curves)) as (figure, (axis,)):
            for arm, lines in curves.items():
                self._lines(axis, arm, lines, over)
            if zoom:
                _zoom(axis)
            axis.set(xlabel="minutes of training" if over == "minutes" else over, ylabel=label)
            axis.set_xlim(left=0)
            add_legend(figure, self._styles_of(curves))
            alt = f"{label} against {over}; a line for each of {', '.join(curves)}"
            return keep(figure, self.folder, name, alt)

    def layers(self, name: str, by_layer: Dict[str, Curves], label: str) -> Figure:
        """A panel for each layer, a line for each arm, over updates."""
        shown = self._styles_of([arm for curves in by_layer.values() for arm in curves])
        rows = -(-len(by_layer) // 2)
        with canvas(FULL, 2.3 * rows, list(shown), rows, 2, share=True) as (figure, axes):
            for axis, (layer, curves) in zip(axes, by_layer.items()):
                for arm, lines in curves.items():
                    self._lines(axis, arm, lines, "updates")
                axis.set_title(layer, loc="left")
            for axis in lowest(axes, len(by_layer), 2):
                axis.set_xlabel("updates")  # figure.supxlabel would stand in the legend
            figure.supylabel(label, fontsize="medium")
            add_legend(figure, shown)
            alt = f"{label} over updates, a panel for each of the layers {', '.join(by_layer)}"
            return keep(figure, self.folder, name, alt)

    def loads_at_end(self, name: str, loads: Dict[str, Dict[str, List[float]]]) -> Figure:
        """Layers x experts for each arm; ``loads`` as shares by arm and layer."""
        tables = {arm: np.array(list(by_layer.values())) for arm, by_layer in loads.items()}
        most = max(table.max() * table.shape[1] for table in tables.values())
        columns = 2 if max(table.shape[1] for table in tables.values()) <= 8 else 1
        rows = -(-len(loads) // columns)
        height = max(1.7, rows * (0.6 + 0.25 * max(map(len, tables.values()))) + 0.3)
        with canvas(FULL, height, (), rows, columns) as (figure, axes):
            for axis, (arm, table) in zip(axes, tables.items()):
                top = max(LEAST_TOP, most)
                image = self._heat_map(axis, arm, table, top, list(loads[arm]))
                axis.set_title(arm, loc="left")
            lowest(axes, len(loads), columns)
            figure.supxlabel("expert", fontsize="medium")
            _colour_bar(figure, axes, image, shrink=min(1, 2.2 / height))
            alt = (
                "share of the choices that each expert gets, layers x experts, for "
                f"{', '.join(loads)}; the largest is {most:.2f} times an even share"
            )
            return keep(figure, self.folder, name, alt)

    def loads_by_domain(self, name: str, arm: str, loads: Loads) -> Figure:
        """Domains x experts, a panel for each layer of one arm."""
        columns = min(2, len(loads.by_domain))
        rows = -(-len(loads.by_domain) // columns)
        domains = list(next(iter(loads.by_domain.values())))
        height = rows * (0.6 + 0.25 * len(domains)) + 0.3
        each = (s for shares in loads.by_domain.values() for s in shares.values())
        top = max(LEAST_TOP, *(max(s) * len(s) for s in each))
        with canvas(FULL, height, (), rows, columns) as (figure, axes):
            for axis, (layer, shares) in zip(axes, loads.by_domain.items()):
                table = np.array(list(shares.values()))
                image = self._heat_map(axis, arm, table, top, list(shares))
                axis.set_title(layer, loc="left")
            lowest(axes, len(loads.by_domain), columns)
            figure.supxlabel("expert", fontsize="medium")
            _colour_bar(figure, axes, image, shrink=min(1, 2.2 / height))
            alt = (
                f"share of the choices that each expert of {arm} gets in {', '.join(domains)}, a "
                "panel for each layer"
            )
            return keep(figure, self.folder, name, alt)

    def _heat_map(self, axis: Any, arm: str, table: Any, top: float, rows: List[str]) -> Any:
        """Shares by row and expert, as multiples of an even share; numbers are percent."""
        image = axis.imshow(
            table * table.shape[1], cmap=HEAT, vmin=0, vmax=top, aspect="auto", gid=self._id(arm)
        )
        if table.shape[1] <= MOST_NUMBERED:
            _number(axis, 100 * table, image)
        axis.set_xticks(some(table.shape[1], MOST_NUMBERED))
        axis.set_yticks(range(len(table)), rows)
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
        return image

    def loads_over_time(self, name: str, arm: str, loads: Loads, top: float) -> Figure:
        """Updates x experts, a panel for each layer of one arm; colours end at ``top``."""
        columns = min(4, len(loads.layers))
        rows = -(-len(loads.layers) // columns)
        with canvas(FULL, 1.55 * rows + 0.3, (), rows, columns, share=True) as (figure, axes):
            for axis, (layer, shares) in zip(axes, loads.layers.items()):
                table = np.array(shares).T
                # An image: lines show between cells that are drawn one by one.
                image = axis.pcolorfast(
                    _edges(loads.updates), np.arange(len(table) + 1) - 0.5, table * len(table),
                    cmap=HEAT, vmin=0, vmax=top, gid=self._id(arm),
                )  # fmt: skip
                axis.set_title(layer, loc="left")
                axis.set_yticks(some(len(table), 8))
            lowest(axes, len(loads.layers), columns)
            figure.supxlabel("updates", fontsize="medium")
            figure.supylabel("expert", fontsize="medium")
            _colour_bar(figure, axes, image)
            alt = f"share of the choices that each expert of {arm} gets over training, by layer"
            return keep(figure, self.folder, name, alt)

    def domains(
        self, name: str, by_domain: Dict[str, Dict[str, DomainScore]], sizes: Dict[str, int]
    ) -> Figure:
        """Bars of BLEU for each arm, a panel for each domain."""
        rows = -(-len(sizes) // 2)
        arms = list(by_domain)
        height = rows * (0.5 + 0.23 * len(arms)) + 0.2
        with canvas(FULL, height, (), rows, 2, share=True) as (figure, axes):
            for axis, (domain, size) in zip(axes, sizes.items()):
                for place, arm in enumerate(arms):
                    _bar(axis, place, by_domain[arm][domain], self._id(arm))
                axis.set_yticks(range(len(arms)), arms)
                axis.set_title(f"{domain} ({size} sentences)", loc="left")
            axes[0].invert_yaxis()  # of all
            axes[0].set_xlim(right=axes[0].get_xlim()[1] * 1.08)  # room for the numbers
            lowest(axes, len(sizes), 2)
            figure.supxlabel("BLEU", fontsize="medium")
            alt = f"BLEU of {', '.join(arms)} on each of the domains {', '.join(sizes)}"
            return keep(figure, self.folder, name, alt)

    def specialisation(
        self, name: str, found: Dict[str, Dict[str, Any]], key: str, label: str
    ) -> Figure:
        """``key`` ("words", "domains") of each arm's layers; dashes: the most by chance."""
        layers = list(dict.fromkeys(layer for values in found.values() for layer in values))
        with canvas(HALF, 2.8, list(found)) as (figure, (axis,)):
            for i, (arm, by_layer) in enumerate(found.items()):
                style = self.styles[arm]
                # Side by side, within the layer's stretch of the axis.
                shift = 0.7 * ((i + 0.5) / len(found) - 0.5)
                for layer, values in by_layer.items():
                    if values[key] is not None:
                        place = layers.index(layer) + shift
                        axis.plot(
                            place, values[key]["share"], ls="", ms=5, marker=style.marker,
                            color=style.colour, gid=self._id(arm),
                        )  # fmt: skip
                        axis.plot(place, values[key]["chance"], marker="_", color="#333333", ms=6)
            for edge in range(1, len(layers)):
                axis.axvline(edge - 0.5, color="#dddddd", lw=0.7)
            axis.set_xticks(range(len(layers)), layers, rotation=30 if len(layers) > 6 else 0)
            axis.tick_params(axis="x", length=0)
            axis.set_xlim(-0.5, len(layers) - 0.5)
            axis.set_ylim(bottom=0)
            axis.set_ylabel(label)
            add_legend(figure, self._styles_of(found), lines=False)
            alt = f"normalised mutual information of experts and {key} by layer and arm"
            return keep(figure, self.folder, name, alt)

    def _styles_of(self, arms: Any) -> Dict[str, Style]:
        return {arm: style for arm, style in self.styles.items() if arm in arms}

    def _lines(self, axis: Any, arm: str, lines: Sequence[Line], over: str) -> None:
        """The lines of an arm ``over`` "updates" or "minutes", and their mean."""
        style = self.styles[arm]
        for line in lines if len(lines) > 1 else []:
            axis.plot(*_over(line, over), color=style.colour, ls=style.line, lw=0.6, alpha=0.35)
        places, values = _over(mean_line(lines), over)
        every = max(1, len(places) // MARKERS_OF_A_LINE)
        # Lines that lie on each other have their markers in different places.
        first = list(self.styles).index(arm) % every
        axis.plot(
            places, values, color=style.colour, marker=style.marker, ls=style.line, lw=1.3, ms=4,
            markevery=(first, every), gid=self._id(arm),
        )  # fmt: skip
        axis.grid(alpha=0.25)


def top_of_loads(loads: Sequence[Loads]) -> float:
    """Where the colours of all heat maps over time end, in even loads."""
    return max(
        [
            LEAST_TOP,
            *(max(s) * len(s) for each in loads for p in each.layers.values() for s in p),
        ]
    )


def _over(line: Line, over: str) -> Tuple[List[float], List[float]]:
    """A curve's points over "updates" or "minutes", of which the time has to be known."""
    if over == "updates":
        return line.updates, line.values
    return [seconds / 60 for seconds in line.seconds if seconds is not None], line.values


def _zoom(axis: Any) -> None:
    """End the axis at the worst that any line has from a fifth of the longest one on."""
    points = [point for line in axis.get_lines() for point in zip(*line.get_data())]
    longest = max(place for place, _ in points)
    top = max(value for place, value in points if place >= longest / 5)
    bottom = min(value for _, value in points)
    if top > bottom:
        margin = 0.06 * (top - bottom)
        axis.set_ylim(bottom - margin, top + margin)


def _bar(axis: Any, place: int, score: DomainScore, gid: str) -> None:
    """One arm's bar with its number; the baseline's is hatched, and a line goes on from it."""
    base = score.difference is None
    axis.barh(
        place, score.mean, height=0.72, xerr=score.deviation, error_kw={"lw": 1, "capsize": 2},
        color=COLOURS["grey"] if base else COLOURS["sky"], hatch="///" if base else None,
        edgecolor="#333333", linewidth=0.5, gid=gid,
    )  # fmt: skip
    if base:
        axis.axvline(score.mean, color="#333333", lw=0.7, ls=":")
    star = " *" if score.p_value is not None and score.p_value < SIGNIFICANT else ""
    axis.annotate(
        f"{score.mean:.1f}{star}", (score.mean + (score.deviation or 0), place), (4, 0),
        textcoords="offset points", va="center", fontsize="small",
    )  # fmt: skip


def _number(axis: Any, table: Any, image: Any) -> None:
    """Write ``table`` into the cells of ``image``, black or white, whichever stands out more."""
    for (row, column), value in np.ndenumerate(table):
        colour = np.array(image.cmap(image.norm(image.get_array()[row, column]))[:3])
        linear = np.where(colour <= 0.04045, colour / 12.92, ((colour + 0.055) / 1.055) ** 2.4)
        luminance = linear @ [0.2126, 0.7152, 0.0722]  # of WCAG 2
        axis.text(
            column, row, f"{value:.0f}", ha="center", va="center", fontsize="small",
            color="black" if luminance > 0.179 else "white",
        )  # fmt: skip


def _colour_bar(figure: Any, axes: List[Any], image: Any, shrink: float = 1.0) -> None:
    bar = figure.colorbar(image, ax=axes, aspect=15, shrink=shrink)
    bar.set_label("× even load")


def _edges(updates: Sequence[int]) -> Any:
    """Half-way between the points, and as far beyond the first and the last."""
    if len(updates) == 1:
        return np.array([0.0, updates[0]])
    places = np.array(updates, dtype=float)
    middle = (places[1:] + places[:-1]) / 2
    return np.concatenate([[2 * places[0] - middle[0]], middle, [2 * places[-1] - middle[-1]]])
