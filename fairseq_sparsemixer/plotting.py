"""What all figures share: matplotlib without a display, colours for the colour-blind, both files.

Needs matplotlib (``pip install 'fairseq-sparsemixer[report]'``).
"""

from pathlib import Path
from typing import Any, Dict, List

from fairseq_sparsemixer.files import atomic_path

COLOURS: Dict[str, str] = {
    "black": "#000000",
    "blue": "#0072B2",
    "vermilion": "#D55E00",
    "green": "#009E73",
    "purple": "#CC79A7",
    "orange": "#E69F00",
    "sky": "#56B4E9",
    "grey": "#999999",
}
"""Those of Okabe and Ito, but for yellow, which white paper swallows, and with a grey."""


def pyplot() -> Any:
    """``matplotlib.pyplot``, drawing to files.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def save(figure: Any, output: Path, name: str) -> List[Path]:
    """Write a figure of matplotlib to NAME.svg and NAME.png in ``output``, and close it."""
    paths = [output / f"{name}.svg", output / f"{name}.png"]
    for path in paths:
        with atomic_path(path) as partial:
            figure.savefig(partial, dpi=150, format=path.suffix[1:])
    pyplot().close(figure)
    return paths
