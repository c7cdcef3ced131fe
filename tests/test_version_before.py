"""What the version before the restructuring wrote is read, gone on with and scored as it was then.

``data/before`` holds a corpus and folders of runs that it made, as text: checkpoints are the
structure of real ones around made-up weights, without which they would be too large.
``expected.json`` holds what it made of them.
"""

import argparse
import contextlib
import csv
import dataclasses
import importlib.metadata
import io
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
import yaml
from fairseq import criterions, tasks
from fairseq import models as fairseq_models
from support.version_before import CLOCKS, COMMANDS, DATA, PACKAGE, TRAINED, build

from fairseq_sparsemixer import models, moe
from fairseq_sparsemixer.cli import main


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    root = tmp_path_factory.mktemp("before") / "root"
    build(root)
    return root


@pytest.fixture
def root(built, tmp_path, monkeypatch):
    """The folders, for a test to write into, moved to where its commands are started."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PIP_NO_INDEX", "1")  # a corpus that is not taken as made fails at once
    folder = shutil.copytree(built, tmp_path / "root")
    monkeypatch.chdir(folder)
    yield folder
    torch.set_num_threads(threads)


# Reading what comes out


def command(*arguments, status=0):
    """Run ``fairseq-sparsemixer``; what it printed, and where it failed its errors."""
    out, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        returned = main([str(argument) for argument in arguments])
    assert returned == status, errors.getvalue()[-3000:]
    return out.getvalue() if status == 0 else errors.getvalue()


def read_json(path):
    return json.loads(Path(path).read_text(encoding="utf-8"))


def read_lines(path):
    return Path(path).read_text(encoding="utf-8").splitlines()


def without(values, *keys):
    """A value without these keys, at any depth."""
    if isinstance(values, dict):
        return {key: without(each, *keys) for key, each in values.items() if key not in keys}
    return [without(each, *keys) for each in values] if isinstance(values, list) else values


def logged(text):
    """What fairseq logged as JSON, by logger, without what depends on the machine."""
    found = {}
    for line in text.splitlines():
        match = re.search(r"(?:\]\[|\| )(train_inner|valid)(?:\]\[| \| )?.*?(\{.*\})$", line)
        if match:
            numbers = json.loads(match[2])
            entry = {k: v for k, v in numbers.items() if k.removeprefix("valid_") not in CLOCKS}
            entry = {k: None if v is None else float(v) for k, v in entry.items()}
            found.setdefault(match[1], []).append(entry)
    return found


def points(folder):
    lines = read_lines(folder / "points.jsonl")
    return [without(json.loads(line), *CLOCKS) for line in lines]


def evaluation(path):
    """An evaluation without paths, times and what depends on how PyTorch packs a file."""
    found = read_json(path)
    translations = Path(path).with_name(f"{Path(path).stem}.de")
    kept = without(found, "seconds", "versions", "path", "sha256", "source", "reference")
    return {**kept, "hypotheses": None, "translations": read_lines(translations)}


def updates_of(checkpoint):
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)
    return state["optimizer_history"][-1]["num_updates"]


def checkpoints_of(folder):
    return {path.name: updates_of(path) for path in sorted(folder.glob("checkpoint*.pt"))}


class _Rows(HTMLParser):
    """The text of each row of all tables."""

    def __init__(self):
        super().__init__()
        self.rows = []
        self.inside = False

    def handle_starttag(self, tag, attrs):
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th") and self.rows:
            self.rows[-1].append("")
            self.inside = True

    def handle_endtag(self, tag):
        self.inside = self.inside and tag not in ("td", "th", "tr")

    def handle_data(self, data):
        if self.inside:
            self.rows[-1][-1] = " ".join(f"{self.rows[-1][-1]} {data}".split())


def rows_of_page(path):
    parser = _Rows()
    parser.feed(path.read_text(encoding="utf-8"))
    return parser.rows


# What is measured: the functions made expected.json, too


def evaluate_run(root):
    command("evaluate", TRAINED, *COMMANDS["evaluate"], "--output", "out/e.json")
    return evaluation("out/e.json")


def translate_text(root):
    last = ("--checkpoint", "checkpoint_last.pt")
    command("translate", TRAINED, *last, "--input", "data/raw/valid.en", "--output", "out/t.de")
    return read_lines("out/t.de")


def average_run(root):
    command("average", "--inputs", TRAINED, "--last", 3, "--output", "out/average.pt")
    state = torch.load("out/average.pt", map_location="cpu", weights_only=True)
    sums = {key: float(value.double().abs().sum()) for key, value in state["model"].items()}
    kept = {key: state[key] for key in ("averaged_from", "optimizer_history")}
    return {"keys": sorted(state), "sums": sums, **kept}


def tabulate(root):
    return {
        "csv": table_of("out/table", "dense"),
        "md": read_lines("out/table.md"),
        "json": without(read_json("out/table.json"), "sha256", "path"),
    }


def table_of(stem, baseline, *left_out):
    """The rows of the study's table, from the file of which spreadsheets read them."""
    command("table", "study", "--baseline", baseline, "--output", stem)
    with open(f"{stem}.csv", encoding="utf-8", newline="") as file:
        return [
            {key: _number(text) for key, text in row.items() if key not in left_out}
            for row in csv.DictReader(file)
        ]


def _number(text):
    try:
        return float(text)
    except ValueError:
        return text


def report_runs(root):
    for path in root.rglob("routing.json"):
        path.unlink()
    pages = {}
    for folder, *more in (("study", "--baseline", "dense"), ("runs/demo",)):
        page = Path("out", f"{Path(folder).name}.html")
        command("report", folder, *more, "--output", page)
        figures = sorted(path.name for path in page.with_name(f"{page.stem}_figures").iterdir())
        pages[folder] = {"rows": rows_of_page(page), "figures": figures}
    routing = {
        str(path.relative_to(root)): without(read_json(path), "checkpoints")
        for path in sorted(root.rglob("routing.json"))
    }
    return {"pages": pages, "routing": routing}


def resume_plain(root):
    done = subprocess.run(
        [sys.executable, "-m", "fairseq_cli.train", *COMMANDS["plain"], "--user-dir", PACKAGE],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return {"log": logged(done.stdout + done.stderr), "files": checkpoints_of(Path("runs/plain"))}


def resume_train(root):
    before = (root / TRAINED / "hydra_train.log").read_text()
    refused = command("train", *COMMANDS["train"], "model.dropout=0.3", status=2)
    assert "was trained with model.dropout=0.1, not 0.3" in refused
    printed = command("train", *COMMANDS["train"])
    log = (root / TRAINED / "hydra_train.log").read_text()
    assert log.startswith(before)
    assert "finished before" in command("train", *COMMANDS["train"])
    record = read_json(TRAINED / "run.json")
    return {
        "goes_on": "goes on from checkpoint_last.pt" in printed,
        "log": logged(log[len(before) :]),
        "files": checkpoints_of(TRAINED),
        "starts": len(record["starts"]),
        "record": without(record, "git", "versions", "starts", "settings", "overrides"),
    }


def grow_study(root):
    run = root / "study" / "switch-2-seed1"
    before = (run / "hydra_train.log").read_text()
    assert "2 runs, 2 of them finished before" in command("study", "study")
    plan = yaml.safe_load(Path("study/plan.yaml").read_text())
    del plan["arms"]["dense"]
    Path("changed.yaml").write_text(yaml.safe_dump({**plan, "beam": 3}))
    refused = command("study", "changed.yaml", "--output", "study", status=2)
    assert "was trained with other beam" in refused
    Path("grown.yaml").write_text(yaml.safe_dump({**plan, "updates": 200}))
    printed = command("study", "grown.yaml", "--output", "study")
    assert "1 runs, 0 of them finished before" in printed
    log = (run / "hydra_train.log").read_text()
    assert log.startswith(before)
    return {
        "log": logged(log[len(before) :]),
        "points": points(run),
        "evaluation": evaluation(run / "evaluation" / "test.json"),
        "state": read_json(run / "study.json"),
        "record": without(read_json(run / "run.json"), "git", "versions"),
        "files": checkpoints_of(run),
        "table": table_of("out/grown", "switch-2", "minutes_to_target", "words_per_second"),
    }


def read_finished_demo(root):
    log = Path("runs/demo/sparsemixer-2/train.log").read_text()
    refused = command("demo", *COMMANDS["demo_finished"], "model.dropout=0.3", status=2)
    assert "was trained with other settings" in refused
    printed = command("demo", *COMMANDS["demo_finished"])
    assert Path("runs/demo/sparsemixer-2/train.log").read_text() == log
    assert "finished before" in printed
    lines = [line.strip() for line in printed.splitlines()]
    return {
        "samples": [line for line in lines if line.startswith(("source", "translation"))],
        # The minutes are those of the log now.
        "table": [
            line.rpartition("  ")[0].rstrip()
            for line in lines
            if line.startswith(("model ", "sparsemixer"))
        ],
        "results": without(read_json("runs/demo/results.json"), "minutes"),
    }


def resume_demo(root):
    run = root / "runs" / "demo" / "switch-2"
    before = (run / "train.log").read_text()
    command("demo", *COMMANDS["demo_stopped"])
    log = (run / "train.log").read_text()
    assert log.startswith(before)
    state = read_json(run / "demo.json")
    return {
        "log": logged(log[len(before) :]),
        "points": points(run),
        "results": without(read_json("runs/demo/results.json"), "minutes"),
        "evaluation": evaluation(run / "test.json"),
        "finished": state["finished"],
        "files": checkpoints_of(run),
    }


MEASURED = {
    each.__name__: each
    for each in (
        *(evaluate_run, translate_text, average_run, tabulate, report_runs),
        *(resume_plain, resume_train, grow_study, read_finished_demo, resume_demo),
    )
}


def flags():
    """The flags of each sub-command with their defaults, from the parsers that parse."""
    found = {}
    original = argparse.ArgumentParser.parse_known_args

    def note(parser, *arguments, **more):
        actions = [each for each in parser._actions if each.dest not in ("help", "version")]
        found[parser.prog] = {
            (each.option_strings or [each.dest])[0]: {
                "default": _plain(each.default),
                "choices": each.choices and dict.fromkeys(map(str, each.choices)),
                "nargs": each.nargs,
                "required": each.required,
            }
            for each in actions
            if not isinstance(each, argparse._SubParsersAction)
        }
        return original(parser, *arguments, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_known_args", note)
        for name in COMMANDS["commands"]:
            with contextlib.redirect_stdout(io.StringIO()), pytest.raises(SystemExit):
                main([name, "--help"])
    return found


def _plain(value):
    """A default as JSON has it."""
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def settings(owner):
    """The fields that a dataclass of ours adds to fairseq's, with their defaults."""
    ours = {
        name
        for kind in owner.__mro__
        if kind.__module__.startswith(PACKAGE.name) and not kind.__name__.startswith("_")
        for name in kind.__annotations__
    }
    return {
        field.name: None if field.default is dataclasses.MISSING else _plain(field.default)
        for field in dataclasses.fields(owner)
        if field.name in ours
    }


def of_this_package(registry):
    ours = (name for name, kind in registry.items() if kind.__module__.startswith(PACKAGE.name))
    return sorted(ours)


def names():
    """All by which others call this package."""
    layers = {}
    for router, kind in moe.ROUTERS.items():
        layer = moe.MoEFeedForward(4, 6, 3, router=router, top_k=max(1, kind.min_top_k))
        layers[router] = {key: list(value.shape) for key, value in layer.state_dict().items()}
    criterion_names = of_this_package(criterions.CRITERION_REGISTRY)
    task_names = of_this_package(tasks.TASK_REGISTRY)
    scripts = importlib.metadata.distribution("fairseq-sparsemixer").entry_points
    configs = PACKAGE.parent / "configs"
    return {
        "moe": sorted(moe.__all__),
        "models": sorted(models.__all__),
        "routers": list(moe.ROUTERS),
        "architectures": of_this_package(fairseq_models.ARCH_MODEL_REGISTRY),
        "criterions": criterion_names,
        "tasks": task_names,
        "settings": {
            "model": settings(models.SwitchTransformerConfig),
            **{n: settings(criterions.CRITERION_DATACLASS_REGISTRY[n]) for n in criterion_names},
            **{n: settings(tasks.TASK_DATACLASS_REGISTRY[n]) for n in task_names},
        },
        "layers": layers,
        "configs": {
            str(path.relative_to(configs)): None for path in sorted(configs.rglob("*.yaml"))
        },
        "scripts": {each.name: each.value for each in scripts if each.group == "console_scripts"},
    }


# The tests


@pytest.fixture(scope="module")
def expected():
    return read_json(DATA / "expected.json")


def check(found, wanted, place=""):
    """Equal, but for rounding; there may be further keys, as of new settings and figures."""
    if isinstance(wanted, dict):
        assert isinstance(found, dict), place
        assert wanted.keys() - found.keys() == set(), place
        for key, value in wanted.items():
            check(found[key], value, f"{place}.{key}")
    elif isinstance(wanted, list):
        assert isinstance(found, list) and len(found) == len(wanted), f"{place}: {found}"
        for number, (one, other) in enumerate(zip(found, wanted)):
            check(one, other, f"{place}[{number}]")
    elif isinstance(wanted, float):
        assert found == pytest.approx(wanted, rel=1e-3, abs=1e-4), place
    else:
        assert type(found) is type(wanted) and found == wanted, place


def test_a_run_scores_as_before(root, expected):
    found = evaluate_run(root)
    check(found, expected["evaluate_run"])
    for metric in ("bleu", "chrf"):
        score = expected["evaluate_run"]["scores"][metric]["score"]
        assert score > 1  # else it would say nothing
        assert found["scores"][metric]["score"] == pytest.approx(score, abs=0.01)


def test_a_run_translates_as_before(root, expected):
    assert translate_text(root) == expected["translate_text"]


def test_an_average_is_that_of_before(root, expected):
    check(average_run(root), expected["average_run"])


def test_a_table_is_that_of_before(root, expected):
    check(tabulate(root), expected["tabulate"])


def test_a_report_shows_what_it_showed_before(root, expected):
    found, wanted = report_runs(root), expected["report_runs"]
    for folder, page in wanted["pages"].items():
        now = found["pages"][folder]
        assert not [row for row in page["rows"] if row not in now["rows"]]
        assert set(page["figures"]) <= set(now["figures"])
    check(found["routing"], wanted["routing"])


def test_fairseq_train_goes_on_as_before(root, expected):
    check(resume_plain(root), expected["resume_plain"])


def test_train_goes_on_as_before(root, expected):
    check(resume_train(root), expected["resume_train"])


def test_a_study_goes_on_as_before(root, expected):
    check(grow_study(root), expected["grow_study"])


def test_a_finished_demo_is_read_as_before(root, expected):
    check(read_finished_demo(root), expected["read_finished_demo"])


@pytest.mark.slow  # a study is run by the same engine
def test_a_demo_goes_on_as_before(root, expected):
    check(resume_demo(root), expected["resume_demo"])


def test_a_corpus_is_not_made_again(root):
    before = {path: path.read_bytes() for path in (root / "data").rglob("*") if path.is_file()}
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors):
        assert main(["prepare", "homeassistant", "--output", "data"]) == 0
    assert errors.getvalue().count("already done") == len(list(root.glob("data/.steps/*")))
    after = {path: path.read_bytes() for path in (root / "data").rglob("*") if path.is_file()}
    assert after == before


def test_flags_are_those_of_before(expected):
    check(flags(), expected["flags"])


def test_names_are_those_of_before(expected):
    found, wanted = names(), expected["names"]
    lists = ("moe", "models", "routers", "architectures", "criterions", "tasks")
    for key in lists:
        assert set(wanted[key]) <= set(found[key]), key
    for key in ("settings", "layers", "configs", "scripts"):
        check(found[key], wanted[key], key)
