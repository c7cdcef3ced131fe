"""What a page says and is made of, by parser."""

import collections
import json
import re
import shutil

import pytest
from support.page_text import Outline, words_of
from support.report_study import make_report

from fairseq_sparsemixer import cli
from fairseq_sparsemixer.comparison import speed_up
from fairseq_sparsemixer.files import read_lines, write_lines
from fairseq_sparsemixer.report import page
from fairseq_sparsemixer.report.drawing import FILES
from fairseq_sparsemixer.runs.folder import ROUTING
from fairseq_sparsemixer.runs.metrics import MAIN


@pytest.fixture(scope="module")
def outline(report):
    return Outline(report.read_text(encoding="utf-8"))


def test_the_page_parses_and_stands_alone(report, outline):
    text = report.read_text(encoding="utf-8")
    assert len(text) < 3e6
    duplicates = [key for key, count in collections.Counter(outline.ids).items() if count > 1]
    assert not duplicates
    assert not re.search(r"https?:|@import|\burl\((?!#)", text)
    files = [a for a in outline.addresses if not a.startswith(("#", "data:"))]
    folder = report.with_name("study.v1_figures")
    assert files
    assert [path.name for path in folder.iterdir() if not FILES.fullmatch(path.name)] == []
    assert {path.relative_to(report.parent).as_posix() for path in folder.iterdir()} == set(files)
    for address in outline.addresses:
        if address.startswith("#"):
            assert address[1:] in outline.ids
    for reference in re.findall(r"url\(#([^)]*)\)", text):
        assert reference in outline.ids


def test_the_page_is_built_for_all_readers(outline):
    assert outline.tags["h1"] == 1
    assert all(after - before <= 1 for before, after in zip(outline.headings, outline.headings[1:]))
    assert outline.scopeless == 0
    assert outline.tags["svg"] == outline.tags["title"] - 1
    assert outline.tags["figcaption"] >= 10


def test_what_the_page_says(report, outline):
    text = " ".join(" ".join(outline.text).split())
    for part in ("Learning curves", "Results on the test set", "Load of the experts"):
        assert part in text
    assert "5 arms, 6 runs, of which 4 are finished and scored" in text
    assert "travel & <food>" in text
    assert "travel &amp;amp;" not in report.read_text()
    assert "Training warned of switch-4: see" in text
    assert "switch-4 2 40 encoder.0, since update 20: expert 1 starves <&>" in text
    assert "never reached it" in text
    assert "its validation nll is nan" in text
    assert "not scored; fairseq-sparsemixer evaluate" in text
    assert "switch-4: not known, because there is no" in text
    assert "nrefs:1|case:mixed|eff:no|tok:13a" in text
    assert "copy of the nearest training sentence" in text
    assert "common.seed" not in text  # which is no setting
    assert "p < 0.05 on every seed that both have" in text
    assert "Domains of fewer than 50 sentences are not tested" in text
    assert "domains tested" not in text
    # The dense arm has no load that could be of the test set.
    assert "On the validation set." in text
    assert '<summary lang="en">' in report.read_text()
    assert '<span lang="de">' in report.read_text()
    source = json.loads(
        (report.parents[1] / "report_study" / "sparsemixer-4-seed1" / ROUTING).read_text()
    )["samples"][0]["source"]
    assert source in text


def test_without_data_and_checkpoints_the_report_says_so(study, report, tmp_path, capsys):
    moved = shutil.copytree(study, tmp_path / "moved", ignore=shutil.ignore_patterns("*.pt"))
    shutil.rmtree(moved / "data")
    make_report(moved, "--output", tmp_path / "page.html", "--baseline", "dense")
    text = " ".join(" ".join(Outline((tmp_path / "page.html").read_text()).text).split())
    assert "No significance: data/raw/test.en" in text
    # What was found before is still there.
    assert "sparsemixer-4, encoder.0" in text
    assert (tmp_path / "page_figures" / "specialisation-words.svg").is_file()
    assert cli.main(["report", str(moved), "--output", str(tmp_path / "p.html"), "--baseline", "x"])
    assert "--baseline: there is no x; choose one of dense, hash-4" in capsys.readouterr().err
    assert not (tmp_path / "page_figures" / "domains.svg").exists()


def test_a_test_set_without_domains(study, tmp_path):
    """Also where a page has samples with and without one, and labels that differ by case."""
    moved = shutil.copytree(study, tmp_path / "moved")
    labels = moved / "data" / "raw" / "test.domain"
    kept = read_lines(labels)
    labels.unlink()
    make_report(moved, "--output", tmp_path / "page.html")
    text = words_of(tmp_path / "page.html")
    assert "The test set has one domain" in text
    assert "<h3>ding</h3>" not in (tmp_path / "page.html").read_text()
    assert "encoder.0" in text
    samples = [
        {"line": n, "domain": domain, "source": str(n), "reference": "", "translation": ""}
        for n, domain in enumerate(["news", None, "News", "news"])
    ]
    groups = page.collect_samples({"a": {"samples": samples}, "b": {"samples": samples[:1]}})
    assert {domain: [each["source"] for each in own] for domain, own in groups.items()} == {
        "": ["1"],
        "News": ["2"],
        "news": ["0", "3"],
    }
    assert list(groups["news"][0]["arms"]) == ["a", "b"]
    # One domain that is large enough, and no other arm.
    write_lines(labels, ["a" for _ in kept])
    make_report(moved / "dense-seed1", "--output", tmp_path / "alone.html")
    assert "tested, without correction" not in words_of(tmp_path / "alone.html")


def test_a_report_without_any_scored_run(study, tmp_path):
    make_report(study / "hash-4-seed1", study / "topk-4-seed1", "--output", tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert "2 arms, 2 runs, of which 0 are finished and scored" in text
    assert "so there is no baseline" in text


def test_who_is_the_soonest():
    table = {
        "baseline": "a",
        "rows": [
            {"model": name, "note": None, "bleu": 1.0, "bleu_deviation": None, "p_value": None}
            for name in "ab"
        ],
    }

    def line(**found):
        one = speed_up.ToBestLoss(1, 1, 5.0, **found)
        summary = {"b": speed_up.summarise([one])}
        return page.at_a_glance(2, 2, 2, table, MAIN[0], summary, 0.05)[-1]

    assert line(updates=9, by_updates=0.33, by_time=1.2) == (
        "No other arm reached the baseline's best validation loss in fewer updates; closest: b, "
        "0.33 times as fast in updates and 1.20 times in time."
    )
    assert line(updates=9, by_updates=1.5).startswith("Soonest at")
    assert "on every seed" in line()


def test_numbers_as_text():
    assert page.number(-1234.567, 1, "+") == "−1,234.6"
    assert page.number(None) == "–"
    assert page.with_deviation(1.234, None) == "1.23"
    assert page.with_deviation(1.234, 0.5) == "1.23 ± 0.50"
    assert [page.duration(s) for s in (None, 59.6, 150, 9000)] == ["–", "60 s", "2.5 min", "2.5 h"]
    assert page.percent(0.126) == "13\N{NO-BREAK SPACE}%"
    assert str(page.as_code("<a> `b c`")) == "&lt;a&gt; <code>b c</code>"
    assert page.tint(0.2, 0.25).endswith("0.00)")


def test_mistakes_are_told_in_one_sentence(study, capsys, tmp_path, monkeypatch):
    def error(*arguments):
        capsys.readouterr()
        assert cli.main(["report", *map(str, arguments)]) == 2
        message = capsys.readouterr().err
        assert message.count("\n") == 1
        return message

    run = study / "dense-seed1"
    assert "give it a name ending in .html" in error(run, "--output", tmp_path / "x")
    assert "there is no folder" in error(tmp_path / "none", "--output", tmp_path / "x.html")
    named = error(run, "--output", tmp_path / "x.html", "--baseline", "switch")
    assert "--baseline: there is no switch; choose one of dense" in named
    (tmp_path / "x_figures").mkdir()
    for name in ("thesis.tex", "drawn-by-hand.svg"):
        own = tmp_path / "x_figures" / name
        own.touch()
        message = error(run, "--output", tmp_path / "x.html")
        assert f"holds other files than a report's figures ({name})" in message
        own.unlink()
    (tmp_path / "link_figures").symlink_to(tmp_path / "x_figures")
    assert "is no folder" in error(run, "--output", tmp_path / "link.html")
    assert not (tmp_path / "x.html").exists()
    monkeypatch.setitem(__import__("sys").modules, "jinja2", None)
    needed = error(run, "--output", tmp_path / "y.html")
    assert "this needs jinja2: run `pip install 'fairseq-sparsemixer[report]'`" in needed
