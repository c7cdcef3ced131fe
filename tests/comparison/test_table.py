"""The table of runs, on fabricated run folders and real ones."""

import csv
import io
import json
import os
import re
import statistics
import subprocess
import sys

import pytest
from support import commands
from support.run_folders import ROOT, cells, straight_log

from fairseq_sparsemixer.files import write_json


def test_means_deviations_and_speed_up(place):
    """Two seeds each, figures by hand; the three files say the same."""
    place.run("a1", router="switch", seed=1, curve={100: 8.0, 200: 6.0, 300: 5.0})
    place.run("a2", router="switch", seed=2, curve={100: 8.0, 200: 5.5, 300: 5.6})
    place.run("b1", router="hash", seed=1, curve={100: 6.0, 200: 5.2, 300: 4.9})
    place.run("b2", router="hash", seed=2, curve={100: 7.0, 200: 5.3, 300: 4.8})
    place.run("d1", router="dense", seed=1, curve={100: 9.0, 200: 8.0, 300: 7.0})
    report, rows, text = place.table()
    assert list(rows) == ["dense", "switch-4", "hash-4"]
    own = {(run["model"], run["seed"]): run for run in report["runs"]}
    for name in ("switch-4", "hash-4"):
        for metric in ("bleu", "chrf"):
            scores = [own[name, seed]["scores"][metric]["score"] for seed in (1, 2)]
            assert rows[name][metric] == pytest.approx(statistics.mean(scores))
            assert rows[name][f"{metric}_deviation"] == pytest.approx(statistics.stdev(scores))
    assert rows["hash-4"]["valid_nll"] == pytest.approx(4.85)
    assert rows["hash-4"]["valid_nll_deviation"] == pytest.approx(statistics.stdev([4.9, 4.8]))
    assert rows["dense"]["bleu_deviation"] is None
    assert rows["hash-4"]["bleu_difference"] == rows["hash-4"]["bleu"] - rows["switch-4"]["bleu"]
    # Each run of the baseline until its own end: 300, and 5.6 between 100 and 200.
    assert report["target_nll"] == pytest.approx(5.3)
    second = 100 + 100 * (8.0 - 5.6) / (8.0 - 5.5)
    assert rows["switch-4"]["updates_to_target"] == pytest.approx((300 + second) / 2)
    assert rows["switch-4"]["speed_up"] == 1.0
    # 5.3: between 6.0 and 5.2, and exactly at 200.
    first = 100 + 100 * (6.0 - 5.3) / (6.0 - 5.2)
    assert rows["hash-4"]["updates_to_target"] == pytest.approx((first + 200) / 2)
    assert rows["hash-4"]["minutes_to_target"] == pytest.approx((first + 200) / 2 * 0.6 / 60)
    assert rows["hash-4"]["speed_up"] == pytest.approx((300 + second) / (first + 200))
    assert rows["dense"]["updates_to_target"] is rows["dense"]["speed_up"] is None
    assert rows["hash-4"]["words_per_second"] == 2000
    # Markdown: as many cells everywhere, rounded, an empty last column.
    lines = [cells(line) for line in text.splitlines() if line.startswith("|")]
    assert {len(line) for line in lines} == {15}
    assert [line[-1] for line in lines] == ["paper", "----:", "", "", ""]
    assert all(re.fullmatch("-+:?", cell) for cell in lines[1])
    in_text = dict(zip(lines[0], next(line for line in lines if line[0] == "hash-4")))
    assert in_text["valid nll"] == "4.850 ± 0.071"
    assert in_text["seeds"] == "1, 2"
    assert in_text["parameters (total / active)"] == "7.4 M / -"
    assert in_text["speed-up"] == f"{rows['hash-4']['speed_up']:.2f}"
    dense = dict(zip(lines[0], next(line for line in lines if line[0] == "dense")))
    assert dense["experts"] == dense["updates to target"] == dense["speed-up"] == "-"
    assert dense["parameters (total / active)"] == "7.4 M / 7.4 M"
    assert "paper: fill in from the paper" in text
    assert "nrefs:1|case:mixed|eff:no|tok:13a" in text
    # CSV: the rows of the JSON.
    with (place.folder / "out" / "table.v1.csv").open(newline="", encoding="utf-8") as file:
        written = list(csv.DictReader(file))
    assert len(written) == len(report["rows"])
    for line, row in zip(written, report["rows"]):
        assert list(line) == list(row)
        for key, value in row.items():
            if isinstance(value, (int, float)):
                assert float(line[key]) == value
            else:
                assert line[key] == (value or "")
    assert all(row["paper"] is None for row in report["rows"])


def test_further_scores_have_columns(place):
    """Tokenised BLEU and COMET where they are; a dash where one run has none."""
    first, second = place.run("a"), place.run("b", router="hash")
    token = {"score": 27.123, "label": "Moses tokens with -a", "signature": "tok:none"}
    for folder in (first, second):
        place.change(folder, lambda e: e["scores"].update(tokenised_bleu=dict(token)))
    comet = {"score": 0.81234, "model": "Unbabel/wmt22-comet-da"}
    place.change(second, lambda e: e["scores"].update(comet=comet))
    report, rows, text = place.table()
    lines = [cells(line) for line in text.splitlines() if line.startswith("|")]
    assert lines[0][-3:] == ["tokenised BLEU", "COMET", "paper"]
    assert lines[2][-3:] == ["27.12", "-", ""]
    assert lines[3][-3:] == ["27.12", "0.8123", ""]
    assert "- tokenised BLEU: Moses tokens with -a, tok:none" in text
    assert report["signatures"]["COMET"] == "Unbabel/wmt22-comet-da"
    assert rows["hash-4"]["comet"] == 0.81234


def test_what_the_train_command_recorded(place):
    folder = place.run("a")
    record = {
        "parameters": {"total": 7000000, "active": 3000000},
        "versions": {"torch": "2"},
        "git": {"revision": "abc", "dirty": False},
    }
    write_json(folder / "run.json", record)
    report, rows, text = place.table()
    assert rows["switch-4"]["parameters_active"] == 3000000
    assert "7.0 M / 3.0 M" in text
    assert report["runs"][0]["versions"] == {"torch": "2"}
    assert report["runs"][0]["git"]["revision"] == "abc"


def test_what_else_rows_differ_in_is_noted(place):
    """Not what tells routers apart, nor what only models with experts have."""
    place.run("a", **{"model.jitter_eps": 0.2})
    place.run("b", router="hash", **{"model.encoder_moe_layers": "0,2"})
    place.run("c", router="dense")
    assert "rows also differ" not in place.table()[2]
    different = {"task.data": "data/other", "criterion.balance_weight": 0.05}
    place.run("d", router="topk", **different, **{"optimizer.weight_decay": 0.1})
    assert (
        "- rows also differ in data (data/bin, data/other); balance_weight (0.01, 0.05); "
        "weight_decay (unset, 0.1): this, and not the router, may be why"
    ) in place.table()[2]


def test_options_of_a_router_name_its_row(place):
    place.run("a")
    for name, options in (("b", '{"gate": "full"}'), ("c", '{"gate": "one", "seed": 2}')):
        place.run(name, **{"model.router_options": options})
    assert list(place.table()[1]) == ["switch-4", "switch-4,gate=full", "switch-4,gate=one,seed=2"]
    place.run("d", **{"model.router_options": '{"top_k": 1}', "model.top_k": 2})  # two of one name
    names = list(place.table(baseline="switch-4,model.top_k=1")[1])
    assert names[-1] == "switch-4,model.top_k=2,model.router_options.top_k=1"


def test_options_that_look_alike_stay_two_rows(place):
    for name, options in (("a", '{"seed": 1}'), ("b", '{"seed": "1"}')):
        place.run(name, **{"model.router_options": options})
    baseline = 'switch-4,router_options={"seed": 1}'
    assert list(place.table(baseline=baseline)[1]) == [
        baseline,
        'switch-4,router_options={"seed": "1"}',
    ]


def test_a_bar_in_a_name_does_not_break_the_table(place):
    place.run("a")
    place.run("b", **{"model.router_options": '{"a|b":1}'})
    _, rows, text = place.table()
    assert list(rows)[1] == "switch-4,a|b=1"
    lines = [cells(line) for line in text.splitlines() if line.startswith("|")]
    assert {len(line) for line in lines} == {15}


def test_unfinished_and_unscored_runs_are_listed_and_not_counted(place):
    place.run("a1", seed=1)
    place.run("a2", seed=2, log=straight_log({100: 8.0, 200: 3.0}, ended=False))
    place.run("a3", seed=3, curve={300: 3.0}, scored=False)
    (place.run("b", router="hash") / "hydra_train.log").unlink()
    (place.run("c", router="topk") / "hydra_train.log").write_text("nothing\n")
    place.run("d", router="random", curve={300: float("nan")})
    place.run("e", router="gshard", curve={300: 5.0, 600: 4.0}, max_update=600)
    report, rows, text = place.table()
    assert list(rows) == ["switch-4"]
    assert rows["switch-4"]["valid_nll"] == 5.0
    assert rows["switch-4"]["seeds"] == "1"
    assert rows["switch-4"]["bleu_deviation"] is None
    for note in (
        "switch-4, seed 2 ({runs}/a2): unfinished, 200 of 300 updates",
        "switch-4, seed 3 ({runs}/a3): not scored; fairseq-sparsemixer evaluate {runs}/a3",
        "hash-4, seed 1 ({runs}/b): there is no hydra_train.log",
        "topk-4, seed 1 ({runs}/c): hydra_train.log holds no validation",
        "random-4, seed 1 ({runs}/d): its validation nll is nan",
        "gshard-4, seed 1 ({runs}/e): scored at 300 of 600 updates; evaluate it again",
    ):
        assert f"- {note.format(runs=place.runs)}" in text
    lines = [cells(line) for line in text.splitlines() if line.startswith("| ")]
    assert len(lines) == 2 + 7
    assert {len(line) for line in lines} == {15}
    listed = [line for line in lines if line[0] == "switch-4"]
    assert [line[3] for line in listed] == ["1", "2", "3"]
    assert set(listed[1][4:-1]) == {"-"}
    raw = {(run["model"], run["seed"]): run for run in report["runs"]}
    assert raw["switch-4", 2]["valid_nll"] == 3.0
    assert raw["random-4", 1]["valid_nll"] is None


def test_mistakes_are_told_in_one_sentence(place, capsys, tmp_path):
    folder = place.run("a")
    assert "there is no folder" in place.error(capsys, tmp_path / "none")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "holds no run of fairseq-hydra-train" in place.error(capsys, empty)
    message = place.error(capsys, baseline="dense")
    assert message.endswith("--baseline: there is no dense; choose one of switch-4\n")
    place.run("u", router="hash", scored=False)
    message = place.error(capsys, baseline="hash-4")
    assert "--baseline hash-4 has no run that is finished and scored" in message
    assert "not scored" in message
    assert "leave out .md" in place.error(capsys, "--output", "out.md")
    (tmp_path / "taken.csv").mkdir()
    assert "taken.csv is a folder" in place.error(
        capsys, place.runs, "--output", str(tmp_path / "taken")
    )
    place.run("again")
    message = place.error(capsys)
    assert f"{folder} and {place.runs / 'again'} are the same run (switch-4, seed 1)" in message
    assert not (tmp_path / "out.md").exists()


# The script, and real runs


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "table runs/wmt14/ runs/wmt14x/ --baseline dense --output runs/wmt14-table"),
        (
            ["--baseline", "switch-8"],
            "table runs/wmt14/ runs/wmt14x/ --baseline dense --output runs/wmt14-table "
            "--baseline switch-8",
        ),
        (["a", "b"], "table --baseline dense --output runs/wmt14-table a b"),
        (["--help"], "table --baseline dense --output runs/wmt14-table --help"),
    ],
)
def test_script(arguments, expected, tmp_path):
    """With a stand-in for the environment and the command."""
    script = tmp_path / "scripts" / "reproduce_table.sh"
    script.parent.mkdir()
    script.write_text((ROOT / "scripts" / "reproduce_table.sh").read_text())
    (script.parent / "environment.sh").write_text(
        'fail() { echo "error: $*" >&2; exit 1; }\nPATH="$PWD:$PATH"\n'
    )
    command = tmp_path / "fairseq-sparsemixer"
    command.write_text('#!/bin/sh\necho "$@"\n')
    command.chmod(0o755)

    def run(*words):
        return subprocess.run(
            ["bash", script, *words], cwd=tmp_path, capture_output=True, text=True
        )

    if not arguments:
        assert "error: there is no folder runs/wmt14*: train first" in run().stderr
    for name in ("wmt14", "wmt14x", "demo"):
        (tmp_path / "runs" / name).mkdir(parents=True)
    (tmp_path / "runs" / "wmt14-table.md").touch()
    assert run(*arguments).stdout == expected + "\n"


@pytest.mark.slow
def test_runs_of_fairseq_hydra_train(corpus, tmp_path):
    """Real configs, logs and evaluations: two routers, trained, stopped, resumed and scored."""
    command = [
        *("--config-dir", ROOT / "configs", "--config-name", "demo", "--multirun"),
        f"common.user_dir={commands.PACKAGE}",
        f"task.data={corpus / 'bin'}",
        *("model.router=switch,sparsemixer", "+model.encoder_layers=1", "+model.decoder_layers=1"),
        *("+model.encoder_embed_dim=16", "+model.encoder_ffn_embed_dim=16"),
        *("checkpoint.save_interval_updates=2", "common.log_interval=1"),
        *(f"hydra.sweep.dir={tmp_path / 'runs'}", "hydra.sweep.subdir=${model.router}"),
    ]
    for updates in (3, 8):
        commands.run("fairseq_cli.hydra_train", *command, f"optimization.max_update={updates}")
    for router in ("switch", "sparsemixer"):
        run = tmp_path / "runs" / router
        assert "Loaded checkpoint" in (run / "hydra_train.log").read_text()
        commands.run(
            "fairseq_sparsemixer.cli",
            *("evaluate", run, "--checkpoint", "checkpoint_last.pt", "--data", corpus),
        )
    stem = tmp_path / "table"
    output = commands.run(
        "fairseq_sparsemixer.cli",
        *("table", tmp_path / "runs", "--baseline", "switch-4", "--output", stem),
    ).stdout
    assert output.startswith((tmp_path / "table.md").read_text())
    report = json.loads((tmp_path / "table.json").read_text())
    assert [row["model"] for row in report["rows"]] == ["sparsemixer-4", "switch-4"]
    for run in report["runs"]:
        log = (tmp_path / "runs" / run["settings"]["model.router"] / "hydra_train.log").read_text()
        logged = {
            entry["num_updates"]: entry["nll_loss"] for entry in commands.logged(log, "valid")
        }
        points = {point["updates"]: point["nll_loss"] for point in run["validations"]}
        assert points == logged
        assert run["valid_nll"] == logged[8]
        seconds = [point["seconds"] for point in run["validations"]]
        assert seconds == sorted(seconds)
        done = re.findall(r"done training in ([\d.]+) seconds", log)
        assert seconds[-1] == pytest.approx(sum(map(float, done)), abs=0.5)
        assert run["parameters"]["total"] > 1000


def test_settings_of_any_text_break_no_table(place):
    """Models are named after the settings in which they differ."""
    hostile = "a|b`c`\n<img src=x>"
    options = "model.router_options"
    place.run("a", router="switch", seed=1, **{options: hostile})
    place.run("b", router="switch", seed=1, **{options: "{}"})
    place.run("c", router="switch", seed=2, scored=False, **{options: "{}"})
    _, rows, text = place.table()
    assert f"switch-4,router_options={hostile}" in rows
    lines = [cells(line) for line in text.splitlines() if line.startswith("|")]
    assert {len(line) for line in lines} == {15}
    assert {line[0] for line in lines[2:]} == {
        "switch-4",
        "switch-4,router_options=a\\|b\\`c\\` \\<img src=x>",
    }
    assert not re.search(r"(?<!\\)[<`]", text)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_a_console_that_has_not_all_characters(place, encoding, monkeypatch):
    """Nor does a folder's name have to be text."""
    place.run("a", seed=1)
    place.run("b", seed=2)
    place.run("c", router="hash").rename(place.runs / os.fsdecode(b"\xff-\xc3\xbc"))
    console = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", console)
    report, _, text = place.table()
    assert console.errors == "strict"
    printed = console.buffer.getvalue().decode(encoding)
    assert ("±" if encoding != "ascii" else "\\xb1") in printed
    assert "±" in text
    assert any(run["folder"].endswith("/\udcff-ü") for run in report["runs"])


def test_names_that_are_none(place, capsys):
    """Of the table's files, and of the translations that were scored."""
    folder = place.run("a")
    for name in ("", ".", "..", "/"):
        assert "is no stem of file names" in place.error(capsys, place.runs, "--output", name)
    place.run("b", router="hash")
    place.change(folder, lambda content: content.update(hypotheses=""))
    assert "there is no ., which" in place.error(capsys) and not list(place.folder.glob("out*"))
