"""The page in a browser: nothing is fetched, all of it can be seen, on a screen and on paper."""

import re
import shutil

import pytest
from support import browser
from support.page_text import words_of
from support.report_study import LAYERS, make_report, point, write_run

from fairseq_sparsemixer.comparison import results as scores
from fairseq_sparsemixer.files import read_lines, write_json, write_lines
from fairseq_sparsemixer.report import routing
from fairseq_sparsemixer.runs.folder import ROUTING, read_run


@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_in_a_browser(driver, report, width):
    """Nothing is fetched or goes wrong, everything has a sensible size, nothing sticks out."""
    browser.requests(driver)
    driver.get_log("browser")
    browser.show(driver, report, width)
    assert driver.get_log("browser") == []
    asked, failed = browser.requests(driver)
    assert report.resolve().as_uri() in asked
    assert failed == []
    assert {address.partition(":")[0] for address in asked} <= {"file", "data"}
    assert sum(address.startswith("file:") for address in asked) == 1
    sizes = driver.execute_script(
        "const page = document.documentElement; return [page.scrollWidth, page.clientWidth]"
    )
    assert sizes[0] <= sizes[1]
    browser.open_all(driver, True)
    figures = driver.execute_script(browser.FIGURES)
    assert len(figures) > 10
    for figure in figures:
        assert figure["width"] >= 300
        assert figure["height"] >= 40
        assert figure["left"] >= 0
        assert figure["right"] <= sizes[1]
        assert figure["rows"] or figure["drawings"]
        for drawing in figure["drawings"]:
            assert drawing["width"] >= 300
            assert drawing["height"] >= 100
            # Small text has 7.5 of the units that the figure is drawn in.
            assert 7.5 * drawing["scale"] >= 9.9
            assert drawing["data"], drawing
            assert all(drawing["data"].values()), drawing
            arms = {
                "domains": 3,
                "load-at-end": 2,
                "load-by-domain-1": 1,
                "validation-updates": 5,
                "drift": 3,
            }
            assert len(drawing["data"]) == arms.get(drawing["name"], len(drawing["data"]))
    outside = driver.execute_script(
        """return [...document.querySelectorAll("h1, h2, h3, h4, p, li, summary, .piece, .scroll")]
          .filter((part) => part.getBoundingClientRect().right > innerWidth + 1)
          .map((part) => part.outerHTML.slice(0, 80))"""
    )
    assert outside == []


def test_text_stands_out_from_its_background(driver, report):
    """Contrast of WCAG 2 AA, 4.5, for all text of the page."""
    browser.show(driver, report, 1280)
    ratios = driver.execute_script(browser.CONTRASTS)
    assert len(ratios) > 15
    assert {name: ratio for name, ratio in ratios.items() if ratio < 4.5} == {}


def test_the_page_on_paper(driver, report, tmp_path):
    """Several pages, all text, the closed parts as well."""
    from pypdf import PdfReader

    browser.show(driver, report, 1280)
    browser.open_all(driver, False)
    path = tmp_path / "report.pdf"
    path.write_bytes(browser.print_pdf(driver))
    pages = PdfReader(path).pages
    assert len(pages) > 3
    text = re.sub(r"\s+", "", "".join(each.extract_text() for each in pages))
    for part in (
        *("At a glance", "Sample translations", "never reached it", "travel & <food>"),
        *("optimization.max_update", "sparsemixer-4, decoder.0", "nrefs:1|case:mixed|eff:no"),
    ):
        assert part.replace(" ", "") in text


def write_wide_study(study, corpus):
    """Many arms and domains, names that cannot be broken, two sides with experts."""
    shutil.copytree(corpus, study / "data")
    raw = study / "data" / "raw"
    names = [f"domain-number-{n}" for n in range(8)]
    write_lines(
        raw / "test.domain", (names[n % 8] for n in range(len(read_lines(raw / "test.en"))))
    )
    even = dict.fromkeys(names, 1 / 8)
    word = {"word": "▁Wort", "count": 9, "lift": 3.0}
    known = {"share": 0.2, "shuffled": 0.1, "chance": 0.11}
    layer = {
        **{"num_experts": 4, "tokens": 99, "unrouted": 0.0, "words": known, "domains": known},
        "domain_shares": even,
        "experts": [{"share": 0.25, "words": [word] * 12, "domain_shares": even}] * 4,
    }
    for arm in range(12):
        keys = ("jitter_eps", "attention_dropout", "activation_dropout", "relu_dropout")
        settings = {f"model.{key}": 0.123456 + arm for key in keys}
        points = [point(20, 9.0, 9.0), point(60, 6.0, 20.0)]
        folder = write_run(study, f"run{arm}", points, keep=0.3 + 0.05 * arm, **settings)
        run = read_run(folder)
        of = routing._identity(run, {}, scores.read_test_text([run]))
        found = {"of": of, "sentences": 9, "left_out": 0, "samples": [], "layers": {}}
        write_json(folder / ROUTING, {**found, "layers": dict.fromkeys(LAYERS, layer)})


def test_many_arms_and_domains_fit_on_paper(driver, corpus, tmp_path):
    write_wide_study(tmp_path, corpus)
    make_report(tmp_path, "--output", tmp_path / "page.html")
    assert "domain-number-7 (2 sentences)" in words_of(tmp_path / "page.html")
    browser.show(driver, tmp_path / "page.html", 1280)
    browser.on_paper(driver, 703)  # A4 less its margins, at 96 pixels an inch
    browser.open_all(driver, True)
    outside = driver.execute_script(
        """return [...document.querySelectorAll("table, svg")]
          .filter((each) => each.getBoundingClientRect().right > document.body.clientWidth + 1)
          .map((each) => each.textContent.slice(0, 80))"""
    )
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
    assert outside == []
    assert driver.execute_script("return document.querySelectorAll('table').length") > 15
