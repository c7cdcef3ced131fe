"""What figures show, and how they become part of a page."""

import warnings

import pytest

from fairseq_sparsemixer.report import canvas, gather
from fairseq_sparsemixer.report import painter as painter_module
from fairseq_sparsemixer.report.painter import Painter


def test_the_zoom_shows_all_seeds_from_a_fifth_of_the_longest_run_on(tmp_path, monkeypatch):
    def line(seed, updates, values):
        return gather.Line(seed, True, updates, [None] * len(updates), values)

    curves = {
        "a": [line(1, [10, 20, 100], [9.0, 8.0, 2.0]), line(2, [10, 20, 100], [9.0, 8.0, 5.0])],
        "b": [line(1, [4, 10], [30.0, 20.0])],
    }
    seen = []
    monkeypatch.setattr(painter_module, "keep", lambda figure, *_: seen.append(figure))
    painter = Painter(tmp_path, canvas.styles(list(curves), "b"))
    painter.curves("x", curves, "nll", "updates", zoom=True)
    (axis,) = seen[0].axes
    assert axis.get_ylim() == pytest.approx((2 - 0.06 * 6, 8 + 0.06 * 6))
    single, _, mean, _ = axis.get_lines()
    assert single.get_linestyle() == mean.get_linestyle() == canvas.styles("ab", "b")["a"].line


def test_an_odd_number_of_panels_and_strange_script(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(painter_module, "keep", lambda figure, *_: seen.append(figure))
    painter = Painter(tmp_path, canvas.styles(["新聞"], None))
    curve = gather.Line(1, True, [1, 2], [None, None], [1.0, 2.0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        painter.layers("x", {name: {"新聞": [curve]} for name in ("a", "新聞", "c")}, "y")
        shown = [axis for axis in seen[0].axes if axis.get_visible()]
    assert len(shown) == 3
    labelled = [axis.xaxis.get_tick_params()["labelbottom"] for axis in shown]
    assert labelled == [False, True, True]
    assert [axis.get_xlabel() for axis in shown] == ["", "updates", "updates"]
    monkeypatch.undo()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        painter.layers("x", {"新聞": {"新聞": [curve]}}, "y")


def test_each_row_of_a_heat_map_is_a_domain(tmp_path, monkeypatch):
    """In even loads; an expert that takes a domain for itself is not cut off."""
    seen = []
    monkeypatch.setattr(painter_module, "keep", lambda figure, *_: seen.append(figure))
    painter = Painter(tmp_path, canvas.styles(["a"], None))
    shares = {"en-de": [0.5, 0.25, 0.25, 0.0], "en-fr": [0.0, 0.0, 0.0, 1.0]}
    painter.loads_by_domain("x", "a", gather.Loads(1, [9], {}, {"encoder.0": shares}))
    (image,) = seen[0].axes[0].get_images()
    assert image.get_array().tolist() == [[2, 1, 1, 0], [0, 0, 0, 4]]
    assert image.get_clim() == (0, 4)
    assert [label.get_text() for label in seen[0].axes[0].get_yticklabels()] == list(shares)


def test_ids_and_text_of_figures_cannot_leave_them():
    svg = '<?xml?>\n<svg a="b" viewBox="0 0 1 1">\n<!-- <script> -->\n<metadata>x</metadata>'
    svg += '<g id="a"><use xlink:href="#a" clip-path="url(#a)"/></g>\n</svg>'
    found = canvas.inline(svg, "n", 'a "<&')
    assert found == (
        '<svg viewBox="0 0 1 1" role="img" aria-labelledby="n-title"><title id="n-title">a &quot;'
        '&lt;&amp;</title><g id="n-a"><use xlink:href="#n-a" clip-path="url(#n-a)"/></g>\n</svg>'
    )


def test_styles_differ_and_the_baseline_is_black():
    names = [f"arm{n}" for n in range(20)]
    found = canvas.styles(names, "arm3")
    assert list(found) == names
    assert len(set(found.values())) == 20
    assert found["arm3"] == ("#000000", "s", "-")
