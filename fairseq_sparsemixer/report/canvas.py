"""What the report's figures share: styles of arms, a canvas, legends, SVG for a page."""

import contextlib
import math
import re
import warnings
from html import escape
from pathlib import Path
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

from fairseq_sparsemixer.plotting import COLOURS, pyplot, save

MARKERS = "sov^DPX<>p*h"
LINES = ("-", "--", "-.", ":")
FULL, HALF = 9.4, 4.7
"""Widths of figures in inches: of the page's, and of those of which two stand side by side."""
LEGEND_ROW = 0.2
SETTINGS: Any = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#555555",
    "axes.linewidth": 0.7,
    "legend.frameon": False,
    "svg.fonttype": "path",  # the page is read where these fonts are not
    "svg.hashsalt": "report",
    "text.parse_math": False,  # names may hold a $
}


class Figure(NamedTuple):
    """A drawn figure.

    Attributes:
        name: of its files, without ending.
        alt: what it shows, in a sentence.
        svg: for a page: no declaration, no address, ids of its own.
        width: natural, in pixels.
    """

    name: str
    alt: str
    svg: str
    width: int


class Style(NamedTuple):
    """What an arm looks like in every figure: colour, marker and line of matplotlib."""

    colour: str
    marker: str
    line: str


def styles(arms: Sequence[str], baseline: Optional[str]) -> Dict[str, Style]:
    """A style for each arm, in their order, no two alike; the baseline is black."""
    colours = [colour for name, colour in COLOURS.items() if name != "black"]
    others = [name for name in arms if name != baseline]
    found = {
        name: Style(
            colours[i % len(colours)],
            MARKERS[1 + i % (len(MARKERS) - 1)],
            LINES[(i + 2 * (i // len(colours))) % len(LINES)],
        )
        for i, name in enumerate(others)
    }
    return {name: found.get(name, Style(COLOURS["black"], MARKERS[0], LINES[0])) for name in arms}


@contextlib.contextmanager
def canvas(
    width: float,
    height: float,
    legend: Sequence[str] = (),
    rows: int = 1,
    columns: int = 1,
    share: bool = False,
) -> Iterator[Tuple[Any, List[Any]]]:
    """A figure and its axes in the report's style, which holds for as long as the block lasts.

    Args:
        width, height: in inches, without the legend.
        legend: names that :func:`add_legend` will be given.
        rows, columns: of axes.
        share: whether all have the same scales.
    """
    if legend:
        height += LEGEND_ROW * -(-len(legend) // _legend_columns(legend, width)) + 0.1
    with pyplot().rc_context(SETTINGS), warnings.catch_warnings():
        # Names may be in a script that the font lacks.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure, axes = pyplot().subplots(
            rows, columns, figsize=(width, height), layout="constrained", squeeze=False,
            sharex=share, sharey=share,
        )  # fmt: skip
        yield figure, list(axes.flat)


def add_legend(figure: Any, arm_styles: Dict[str, Style], lines: bool = True) -> None:
    """Name the arms below the axes; without ``lines`` their markers alone."""
    from matplotlib.lines import Line2D

    handles = [
        Line2D(
            [], [], color=style.colour, marker=style.marker, ms=4, lw=1.3,
            ls=style.line if lines else "",
        )
        for style in arm_styles.values()
    ]  # fmt: skip
    figure.legend(
        handles, list(arm_styles), loc="outside lower center", fontsize="small", handlelength=3.2,
        ncols=_legend_columns(list(arm_styles), figure.get_figwidth()), columnspacing=1.4,
    )  # fmt: skip


def _legend_columns(names: Sequence[str], width: float) -> int:
    """As many as fit: a letter takes about 0.062 inches, a line with its space 0.6."""
    longest = 0.6 + 0.062 * max(map(len, names))
    return max(1, min(len(names), int(width / longest)))


def lowest(axes: Sequence[Any], shown: int, columns: int) -> Sequence[Any]:
    """Leave out the axes from number ``shown`` on.

    Returns:
        The lowest that is left in each column, with the scale that those below would have had.
    """
    for axis in axes[shown:]:
        axis.set_visible(False)
    found = axes[max(0, shown - columns) : shown]
    for axis in found:
        axis.tick_params(labelbottom=True)
    return found


def some(count: int, most: int) -> List[int]:
    """At most ``most`` of the numbers below ``count``, evenly spaced."""
    return list(range(0, count, math.ceil(count / most)))


def keep(figure: Any, folder: Path, name: str, alt: str) -> Figure:
    """Write the figure to NAME.svg and NAME.png in ``folder``."""
    width = round(96 * figure.get_figwidth())
    svg, _ = save(figure, folder, name)
    return Figure(name, alt, inline(svg.read_text(encoding="utf-8"), name, alt), width)


def inline(svg: str, name: str, alt: str) -> str:
    """A file of matplotlib as part of a page: what it needs, and ids that start with ``name``.

    Args:
        svg: the content of the file.
        name: different for each figure of the page.
        alt: its title, for those who cannot see it.
    """
    view = re.search(r'viewBox="[^"]*"', svg)
    assert view is not None
    body = svg[svg.index(">", svg.index("<svg")) + 1 :]
    # Comments hold the figure's text; the style is that of the page.
    body = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>|<style.*?</style>", "", body, flags=re.S)
    body = re.sub(r"(\bid=\"|href=\"#|url\(#)", rf"\g<1>{name}-", body)
    body = re.sub(r"\s*\n\s*", "\n", body).strip()
    return (
        f'<svg {view[0]} role="img" aria-labelledby="{name}-title">'
        f'<title id="{name}-title">{escape(alt)}</title>{body}'
    )
