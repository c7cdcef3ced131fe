"""The page: what :mod:`.content` gathered, as HTML by ``page.html.j2``."""

import re
from pathlib import Path
from typing import Any, Dict, List, Optional

from fairseq_sparsemixer.plotting import COLOURS
from fairseq_sparsemixer.runs.metrics import Metric

NO_FIGURE = "–"
PIECE_COLOURS = [colour for name, colour in COLOURS.items() if name != "black"]
PIECE_LINES = ["solid", "dashed", "dotted", "double"]
"""Below pieces, by expert: fewer than colours, so that 28 experts have looks of their own."""


def render(content: Dict[str, Any]) -> str:
    """The page.

    Args:
        content: the variables of the template.

    Raises:
        ImportError: jinja2 is not installed.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        as_code=as_code,
        number=number,
        percent=percent,
        with_deviation=with_deviation,
        duration=duration,
        bound=bound,
        millions=lambda count: NO_FIGURE if count is None else f"{count / 1e6:.1f} M",
    )
    environment.globals.update(
        piece_colours=PIECE_COLOURS, piece_lines=PIECE_LINES, tint=tint, count=count
    )
    return environment.get_template("page.html.j2").render(content)


def number(value: Optional[float], decimals: int = 2, sign: str = "") -> str:
    """A number with a true minus sign; a dash for None."""
    if value is None:
        return NO_FIGURE
    return f"{value:{sign},.{decimals}f}".replace("-", "−")


def percent(share: Optional[float], decimals: int = 0) -> str:
    """A share as ``12 %``, on one line."""
    return NO_FIGURE if share is None else f"{number(100 * share, decimals)}\N{NO-BREAK SPACE}%"


def as_code(text: str) -> Any:
    """Text with what stands between backticks as code."""
    from markupsafe import Markup, escape

    return Markup(re.sub(r"`([^`]*)`", r"<code>\1</code>", str(escape(text))))


def with_deviation(value: Optional[float], deviation: Optional[float], decimals: int = 2) -> str:
    """``12.34 ± 0.56``, without the latter where it is None."""
    tail = "" if deviation is None else f" ± {deviation:.{decimals}f}"
    return number(value, decimals) + tail


def duration(seconds: Optional[float]) -> str:
    """Seconds as they are read: ``48 s``, ``12.5 min``, ``3.2 h``."""
    if seconds is None:
        return NO_FIGURE
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def bound(text: str, is_one: bool, sign: str) -> str:
    """``≥ 1.25`` for a figure that is a bound; a dash stays."""
    return f"{sign}\N{NO-BREAK SPACE}{text}" if is_one and text != NO_FIGURE else text


def tint(share: float, even: float) -> str:
    """A background for a share: none up to the even one, deeper towards three times as much."""
    depth = min(1.0, max(0.0, (share / even - 1) / 2)) if even else 0.0
    return f"rgba(0, 114, 178, {0.45 * depth:.2f})"


def at_a_glance(
    arms: int,
    runs: int,
    counted: int,
    table: Optional[Dict[str, Any]],
    metric: Optional[Metric],
    speed_ups: Dict[str, Dict[str, Any]],
    significant: float,
) -> List[str]:
    """The findings in a few sentences."""
    lines = [
        f"{count(arms, 'arm')}, {count(runs, 'run')}, of which {counted} are finished and scored."
    ]
    if table is None or metric is None:
        return lines
    rows = {row["model"]: row for row in table["rows"] if row["note"] is None}
    base = rows[table["baseline"]]
    key, decimals = metric.key, metric.decimals
    choose, word = (min, "Lowest") if metric.lower_is_better else (max, "Highest")
    best = choose(rows.values(), key=lambda row: row[key])
    figure = with_deviation(best[key], best[f"{key}_deviation"], decimals)
    text = f"{word} {metric.title}: {best['model']}, {figure}"
    if best is not base:
        text += f"; the baseline {base['model']} has {number(base[key], decimals)}"
    lines.append(text + ".")
    tested = {name: row for name, row in rows.items() if row["p_value"] is not None}
    if tested:
        different = [
            f"{name} ({number(row['bleu_difference'], 2, '+')})"
            for name, row in tested.items()
            if row["p_value"] < significant
        ]
        lines.append(
            f"BLEU differs from the baseline's with p < {significant} on every seed that both "
            f"have: {', '.join(different) or 'in no arm'}."
        )
    others = {name: each for name, each in speed_ups.items() if name != base["model"]}
    known = {name: each for name, each in others.items() if each["known"]}
    there = {name: each for name, each in known.items() if each["by_updates"]}
    if there:
        name, first = max(there.items(), key=lambda item: item[1]["by_updates"])
        text = "Soonest at the baseline's best validation loss"
        if first["by_updates"] <= 1 and not first["or_sooner"]:
            text = (
                "No other arm reached the baseline's best validation loss in fewer updates; closest"
            )
        least = "at least " if first["or_sooner"] else ""
        text += f": {name}, {least}{number(first['by_updates'])} times as fast in updates"
        if first["by_time"] is not None:
            text += f" and {least}{number(first['by_time'])} times in time"
        lines.append(text + ".")
    elif known:
        lines.append("No other arm reached the baseline's best validation loss on every seed.")
    return lines


def count(number_of: int, what: str) -> str:
    """``1 arm``, ``2 arms``."""
    return f"{number_of} {what}{'' if number_of == 1 else 's'}"


def collect_samples(routing: Dict[str, Dict[str, Any]]) -> Dict[str, List[Dict[str, Any]]]:
    """The samples of all arms, by sentence within each domain ("" for none).

    Returns:
        For each domain ``source``, ``reference`` and ``arms`` of each sentence.
    """
    found: Dict[str, Dict[int, Dict[str, Any]]] = {}
    for arm, each in routing.items():
        for sample in each["samples"]:
            shared = {key: sample[key] for key in ("source", "reference")}
            own = found.setdefault(sample["domain"] or "", {})
            entry = own.setdefault(sample["line"], {**shared, "arms": {}})
            entry["arms"][arm] = {
                key: sample.get(key) for key in ("translation", "encoder", "decoder")
            }
    return {domain: [own[line] for line in sorted(own)] for domain, own in sorted(found.items())}
