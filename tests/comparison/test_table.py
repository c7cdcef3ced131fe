"""The table of runs and the reading of training logs, on fabricated run folders and real ones."""

import csv
import json
import random
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from support import commands
from support.run_folders import (
    CURVE,
    REFERENCE,
    ROOT,
    Log,
    config,
    evaluation,
    straight_log,
    translations,
)

from fairseq_sparsemixer import cli
from fairseq_sparsemixer.comparison import conditions, speed_up
from fairseq_sparsemixer.evaluation import scoring
from fairseq_sparsemixer.files import read_lines, write_json, write_lines
from fairseq_sparsemixer.runs import folder as runs
from fairseq_sparsemixer.runs import grouping, settings
from fairseq_sparsemixer.runs.logs import Validation, by_layer, line_stats, read_log


@pytest.fixture
def place(tmp_path):
    return Place(tmp_path)


class Place:
    """Run folders, and the command over them."""

    def __init__(self, folder):
        self.folder = folder
        self.runs = folder / "runs"
        self.reference = folder / "test.de"
        write_lines(self.reference, REFERENCE)

    def run(self, name, keep=0.9, curve=CURVE, scored=True, log=None, **settings):
        """One run folder."""
        folder = self.runs / name
        (folder / ".hydra").mkdir(parents=True)
        OmegaConf.save(config(**settings), folder / ".hydra" / "config.yaml")
        (log or straight_log(curve)).write(folder / "hydra_train.log")
        if scored:
            hypotheses = translations(keep, seed=name)
            evaluation(folder, hypotheses, self.reference)
        return folder

    def change(self, folder, change, name="evaluation/test.checkpoint_last.json"):
        """Edit an evaluation."""
        path = folder / name
        content = json.loads(path.read_text())
        change(content)
        write_json(path, content)

    def table(self, *arguments, baseline="switch-4"):
        """Run the command; (JSON report, rows by model, Markdown)."""
        stem = self.folder / "out" / "table.v1"
        runs = [] if any(Path(str(a)).is_dir() for a in arguments) else [self.runs]
        command = ["table", *runs, *arguments, "--baseline", baseline, "--output", stem]
        assert cli.main(list(map(str, command))) == 0
        report = json.loads(stem.with_name("table.v1.json").read_text())
        rows = {row["model"]: row for row in report["rows"] if row["note"] is None}
        return report, rows, stem.with_name("table.v1.md").read_text()

    def error(self, capsys, *arguments, baseline="switch-4"):
        """Run the command, which must fail with one line."""
        runs = [] if any("/" in str(a) for a in arguments) else [self.runs]
        command = ["table", *runs, *arguments, "--baseline", baseline]
        if "--output" not in arguments:
            command += ["--output", self.folder / "out"]
        capsys.readouterr()
        assert cli.main(list(map(str, command))) == 2
        message = capsys.readouterr().err
        assert message.count("\n") == 1
        return message


def cells(line):
    """The cells of a line of a Markdown table; an escaped bar is no border."""
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


# The log


@pytest.mark.parametrize("seed", range(8))
def test_a_log_of_many_sessions_reads_as_if_never_stopped(seed, tmp_path):
    """Against a simulation that keeps the one line of training that survives."""
    rng = random.Random(seed)
    log, spent, history, speeds = Log(), {0: 0.0}, {}, {}
    saved = 0
    for session in range(rng.randint(2, 6)):
        log.wait(rng.uniform(1, 5000))  # a pause
        log.begin(saved)
        if session and rng.random() < 0.3:
            continue  # killed before it trained: takes nothing back
        log.train()
        clock, updates = spent[saved], saved
        for part in (history, speeds):
            for key in [key for key in part if key > saved]:
                del part[key]
        for updates in range(saved + 1, saved + rng.randint(2, 40)):
            step = round(rng.uniform(0.1, 9), 3)
            log.wait(step)
            clock += step
            if updates % 5 == 0:
                speeds[updates] = rng.randint(500, 900)
                log.inner(updates, speeds[updates])
            if updates % 4 == 0:
                history[updates] = (clock, round(rng.uniform(3, 9), 3))
                log.valid(updates, history[updates][1])
            if updates % 6 == 0:
                log.save(updates, seconds=0.5)
                clock += 0.5
                saved, spent[updates] = updates, clock
            if updates % 13 == 0:
                log.add("fairseq.trainer", "begin training epoch 2")
    log.write(tmp_path / "hydra_train.log")
    found = read_log(tmp_path / "hydra_train.log")
    assert [v.updates for v in found.validations] == sorted(history)
    for validation in found.validations:
        seconds, nll = history[validation.updates]
        assert validation.nll_loss == nll
        assert validation.loss == pytest.approx(nll + 1)
        assert validation.seconds == pytest.approx(seconds, abs=0.05)
    assert found.words_per_second == (statistics.median(speeds.values()) if speeds else None)
    assert found.parameters == 7438100
    assert not found.ended


def test_a_log_that_begins_in_the_middle_tells_no_time(tmp_path):
    log = Log()
    log.begin(500)
    log.train()
    log.wait(60)
    log.valid(600, 4.0)
    log.write(tmp_path / "log")
    (validation,) = read_log(tmp_path / "log").validations
    assert (validation.updates, validation.seconds) == (600, None)


def test_the_end_of_training(tmp_path):
    """A time limit is no end, and a session that goes on takes the end back."""
    log = straight_log()
    log.write(tmp_path / "log")
    assert read_log(tmp_path / "log").ended
    log.begin(300)
    log.write(tmp_path / "log")
    assert not read_log(tmp_path / "log").ended
    log.train()
    limit = "cumulative_training_time: 2.1 > stop_time_hours: 2.0 hour(s)"
    log.add("fairseq_cli.train", f"Stopping training due to {limit}")
    log.done()
    log.write(tmp_path / "log")
    assert not read_log(tmp_path / "log").ended


def test_lines_that_are_cut_off_or_of_other_kinds(tmp_path):
    log = straight_log()
    cut = log.lines[-2][:-9]
    assert "[valid]" in cut
    write_lines(tmp_path / "log", [*log.lines[:-2], cut])
    assert [v.updates for v in read_log(tmp_path / "log").validations] == [100, 200]
    assert line_stats(cut, "valid") is None
    assert line_stats(log.lines[-2], "train_inner") is None
    assert line_stats("[x][valid][INFO] - nothing", "valid") is None
    inner = next(line for line in log.lines if "[train_inner]" in line)
    assert line_stats(inner, "train_inner")["wps"] == 2000
    assert "clip" not in line_stats(inner, "train_inner")
    stats = read_log(tmp_path / "log").validations[0].stats
    assert by_layer(stats, "min_expert_share") == {"encoder.0": 0.2}


def test_another_validation_set_and_cross_entropy_without_smoothing(tmp_path):
    log = Log()
    log.begin()
    log.train()
    log.valid(10, 4.0)
    log.add("dev", '{"epoch": 1, "dev_loss": "3.5", "dev_num_updates": "10"}')
    log.write(tmp_path / "log")
    (validation,) = read_log(tmp_path / "log", "dev").validations
    assert (validation.loss, validation.nll_loss) == (3.5, 3.5)


def test_a_missing_log_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"cannot read .*no\.log: No such file"):
        read_log(tmp_path / "no.log")


# Figures


def naive_first_reached(curve, target):
    """The first point of the broken line at or below the target, by small steps."""
    points = sorted(curve.items())
    if points[0][1] <= target:
        return points[0][0]
    for (u, a), (v, b) in zip(points, points[1:]):
        for i in range(1, 10001):
            if a + (b - a) * i / 10000 <= target:
                return u + (v - u) * i / 10000
    return None


@pytest.mark.parametrize("seed", range(20))
def test_first_reached(seed):
    rng = random.Random(seed)
    updates = sorted(rng.sample(range(1, 1000), 6))
    curve = {u: rng.uniform(3, 9) for u in updates}
    validations = [Validation(u, 0, nll, 0.5 * u, {}) for u, nll in curve.items()]
    target = rng.uniform(2.5, 7)
    found = speed_up.first_reached(validations, target)
    expected = naive_first_reached(curve, target)
    if expected is None:
        assert found is None
    else:
        assert found.updates == pytest.approx(expected, abs=0.2)
        assert found.seconds == pytest.approx(0.5 * found.updates)


def test_first_reached_without_a_time_or_after_an_infinite_loss():
    points = [(10, float("nan"), 1.0), (20, 4.0, None), (30, 2.0, 3.0)]
    validations = [Validation(u, 0, nll, seconds, {}) for u, nll, seconds in points]
    assert speed_up.first_reached(validations, 4.5) == (20, None, True)
    assert speed_up.first_reached(validations, 4.0) == (20, None, False)
    assert speed_up.first_reached(validations, 3.0) == (25, None, False)


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


def sacrebleu_p(baseline, system, reference):
    """p of BLEU by sacrebleu's own command."""
    files = [str(path) for path in (baseline, system)]
    result = subprocess.run(
        [
            *(sys.executable, "-m", "sacrebleu", str(reference), "-i", *files),
            *("-m", "bleu", "--paired-bs", "--format", "json", "--width", "6"),
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(result.stdout)[1]["BLEU"]["p_value"]


def test_seeds_that_contradict_each_other_show_nothing(place):
    """Each seed differs from its partner for sure, in two directions."""
    for router, keeps in (("switch", (0.9, 0.5)), ("hash", (0.5, 0.95)), ("topk", (0.95, 0.8))):
        for seed, keep in enumerate(keeps, 1):
            place.run(f"{router}{seed}", keep=keep, router=router, seed=seed)
    report, rows, text = place.table()
    pairs = report["comparisons"]["hash-4"]
    assert all(pair["bleu"]["p_value"] < 0.05 for pair in pairs)
    assert rows["hash-4"]["p_value"] == 1.0
    assert rows["topk-4"]["p_value"] < 0.05
    assert "1 unless all differ in the same direction as the means" in text
    assert conditions.joint_p_value([1.0, 2.0], [0.01, 0.02], 1.5) == 0.02
    assert conditions.joint_p_value([1.0, 2.0], [0.01, 0.02], -0.5) == 1.0


def test_a_run_that_starts_below_the_target(place):
    place.run("a", router="switch")
    place.run("b", router="hash", curve={100: 4.0, 300: 3.0})
    _, rows, text = place.table()
    assert rows["hash-4"]["updates_to_target"] == 100
    assert "the first validation of seed 1 is below the target" in text


def test_what_the_report_keeps_is_no_evaluation(place):
    folder = place.run("a")
    (folder / runs.ROUTING).write_text("{")
    assert place.table()[1]["switch-4"]["bleu"] > 0


def test_p_values_are_those_of_sacrebleu(place):
    folders = {
        (router, seed): place.run(f"{router}{seed}", keep=keep, router=router, seed=seed)
        for router, keep in (("switch", 0.85), ("hash", 0.9))
        for seed in (1, 2)
    }
    report, rows, _ = place.table()
    expected = [
        sacrebleu_p(
            *(
                folders[router, seed] / "evaluation" / "test.checkpoint_last.de"
                for router in ("switch", "hash")
            ),
            place.reference,
        )
        for seed in (1, 2)
    ]
    pairs = report["comparisons"]["hash-4"]
    assert [(pair["seed"], pair["baseline_seed"]) for pair in pairs] == [(1, 1), (2, 2)]
    assert [pair["bleu"]["p_value"] for pair in pairs] == pytest.approx(expected, abs=1e-6)
    assert expected[0] != expected[1]
    assert rows["hash-4"]["p_value"] == pytest.approx(max(expected), abs=1e-6)
    assert "seed:12345" in report["signatures"]["p (BLEU)"]
    assert rows["switch-4"]["p_value"] is None


def test_seeds_that_do_not_pair(place):
    for name, router, seed in (
        *(("a1", "switch", 1), ("a2", "switch", 2), ("b2", "hash", 2), ("b3", "hash", 3)),
        *(("c7", "topk", 7), ("c9", "topk", 9)),
    ):
        place.run(name, router=router, seed=seed)
    report, _, text = place.table()
    pairs = {
        name: [(pair["seed"], pair["baseline_seed"]) for pair in compared]
        for name, compared in report["comparisons"].items()
    }
    assert pairs == {"hash-4": [(2, 2)], "topk-4": [(7, 1)]}
    assert "p is of seed 2 alone, which the baseline has too: hash-4" in text
    assert "topk-4: no seed in common with switch-4; p compares seed 7 with its seed 1" in text


def test_a_target_that_some_seeds_never_reach(place):
    place.run("a", router="switch")
    place.run("b1", router="hash", seed=1, curve={100: 6.0, 300: 4.0})
    place.run("b2", router="hash", seed=2, curve={100: 6.0, 300: 5.5})
    report, rows, text = place.table()
    assert rows["hash-4"]["updates_to_target"] is rows["hash-4"]["speed_up"] is None
    assert "hash-4: seed 2 never reaches the target" in text
    own = {(run["model"], run["seed"]): run["updates_to_target"] for run in report["runs"]}
    assert own["hash-4", 1] == 200
    assert own["hash-4", 2] is None


def test_a_resumed_run_counts_what_it_trained_last(place):
    """Killed after update 230, it goes on from 200 and comes out better."""
    log = straight_log({100: 8.0, 200: 6.0}, ended=False)
    log.save(200)
    log.wait(18)
    log.valid(230, 4.5)  # below the target, but forgotten
    log.wait(100000)
    log.begin(200)
    log.train()
    log.wait(60)
    log.valid(300, 5.0)
    log.done()
    place.run("a", router="switch")
    place.run("b", router="hash", log=log)
    report, rows, _ = place.table()
    assert rows["hash-4"]["updates_to_target"] == 300
    assert rows["hash-4"]["minutes_to_target"] == pytest.approx(3.0, abs=0.01)
    resumed = next(run for run in report["runs"] if run["model"] == "hash-4")
    assert [point["updates"] for point in resumed["validations"]] == [100, 200, 300]


# Arms


def names(*configs):
    """The names of arms of runs with these settings, and how many runs each has."""
    found = [
        runs.Run(
            folder=Path(str(number)),
            settings=settings.read_settings(OmegaConf.to_container(each)),
            seed=each.common.seed,
            max_update=each.optimization.max_update,
            log=None,
            scores_path=None,
            evaluation={},
            record={},
            note="",
        )
        for number, each in enumerate(configs)
    ]
    return {arm.name: len(arm.runs) for arm in grouping.group_runs(found)}


def test_names_of_arms():
    assert names(config("dense"), config("switch", 8), config("switch", 8, seed=2)) == {
        "dense": 1,
        "switch-8": 2,
    }
    jitter = {"model.jitter_eps": 0.2}
    assert names(config(), config(seed=2), config(**jitter), config("hash", **jitter)) == {
        "switch-4,jitter_eps=0.1": 2,
        "switch-4,jitter_eps=0.2": 1,
        "hash-4": 1,
    }
    released = {"criterion.routing_loss": "released", "optimization.lr": [0.001]}
    assert names(config(), config(**released)) == {
        "switch-4,routing_loss=corrected,lr=[0.002]": 1,
        "switch-4,routing_loss=released,lr=[0.001]": 1,
    }
    # Two settings of one short name, and one that only one run has.
    both = {"model.weight_decay": 0.1, "optimizer.weight_decay": 0.2, "model._name": "other"}
    assert list(names(config("dense"), config("dense", **both))) == [
        "dense,model._name=switch_transformer_demo,model.weight_decay=unset,"
        "optimizer.weight_decay=unset",
        "dense,model._name=other,model.weight_decay=0.1,optimizer.weight_decay=0.2",
    ]
    assert list(names(config("dense"), config("dense", **{"model._name": "transformer"}))) == [
        "dense,arch=switch_transformer_demo",
        "dense,arch=transformer",
    ]


def test_what_makes_no_arm_of_its_own():
    """Defaults, what a dense model does not use, where files are, how a batch is spread."""
    old, new = config(), config(seed=2, **{"model.balance_bias_rate": 0.0, "model.top_k": 1})
    assert names(old, new) == {"switch-4": 2}
    unused = {"model.jitter_eps": 0.3, "criterion.balance_weight": 0.5, "model.num_experts": 16}
    assert names(config("dense"), config("dense", seed=2, **unused)) == {"dense": 2}
    elsewhere = {
        **{"checkpoint.save_dir": "x", "common.user_dir": "y", "common.log_interval": 3},
        **{"model.moe_backend": "loop", "optimization.stop_time_hours": 2.0},
    }
    assert names(config(), config(seed=2, **elsewhere)) == {"switch-4": 2}
    four = {"optimization.update_freq": [4]}
    spread = {"distributed_training.distributed_world_size": 2, "dataset.max_tokens": 1600}
    assert names(config(**four), config(seed=2, **spread)) == {"switch-4": 2}
    assert names(config(**four), config(seed=2, **{"optimization.update_freq": [2]})) == {
        "switch-4,tokens_per_update=[3200]": 1,
        "switch-4,tokens_per_update=[1600]": 1,
    }
    by_sentences = {"dataset.max_tokens": None, "dataset.batch_size": 32}
    two = {"distributed_training.distributed_world_size": 2, "optimization.update_freq": [2]}
    made = [config(seed=n, **by_sentences, **each) for n, each in enumerate((four, two, {}))]
    assert names(*made) == {"switch-4,update_freq=[4]": 2, "switch-4,update_freq=[1]": 1}


def test_a_plain_transformer_of_fairseq_is_dense(place):
    folder = place.run("d", router="dense")
    made = OmegaConf.load(folder / ".hydra" / "config.yaml")
    made.model = {"_name": "transformer_wmt_en_de", "dropout": 0.1}
    made.criterion = {"_name": "label_smoothed_cross_entropy"}
    OmegaConf.save(made, folder / ".hydra" / "config.yaml")
    _, rows, _ = place.table(baseline="dense")
    assert rows["dense"]["router"] is None


def test_a_bar_in_a_name_does_not_break_the_table(place):
    place.run("a")
    place.run("b", **{"model.router_options": '{"a|b":1}'})
    _, rows, text = place.table(baseline="switch-4,router_options={}")
    assert list(rows)[1] == 'switch-4,router_options={"a|b":1}'
    lines = [cells(line) for line in text.splitlines() if line.startswith("|")]
    assert {len(line) for line in lines} == {15}


def test_experts_ascend(place):
    for experts in (16, 2, 8):
        place.run(f"s{experts}", experts=experts)
    _, rows, _ = place.table(baseline="switch-2")
    assert list(rows) == ["switch-2", "switch-8", "switch-16"]


# Runs that do not count


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
        "switch-4, seed 3 ({runs}/a3): not scored; `fairseq-sparsemixer evaluate {runs}/a3`",
        "hash-4, seed 1 ({runs}/b): there is no hydra_train.log",
        "topk-4, seed 1 ({runs}/c): hydra_train.log holds no validation",
        "random-4, seed 1 ({runs}/d): its last validation nll is nan",
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


def test_an_end_before_max_update_is_an_end(place):
    """By early stopping, or by epochs."""
    place.run("a", max_update=4000)
    place.run("b", router="hash", max_update=0)
    _, rows, _ = place.table()
    assert rows["switch-4"]["updates"] == rows["hash-4"]["updates"] == 300


# Several evaluations, and where files are


def test_scores_chooses_among_evaluations(place, capsys):
    folder = place.run("a", keep=0.9)
    evaluation(folder, translations(0.5, 0), place.reference, name="test")
    message = place.error(capsys)
    assert "holds evaluation/test.checkpoint_last.json and test.json; choose one with" in message
    _, rows, _ = place.table("--scores", "test")
    low = rows["switch-4"]["bleu"]
    for name in ("test.checkpoint_last", "evaluation/test.checkpoint_last.json"):
        assert place.table("--scores", name)[1]["switch-4"]["bleu"] > low + 10
    assert "no run has an evaluation named tset" in place.error(capsys, "--scores", "tset")
    # Other files of JSON are no evaluations.
    write_json(folder / "demo.json", {"finished": True})
    assert place.table("--scores", "test.json")[1]["switch-4"]["bleu"] == low


def test_a_run_without_the_chosen_evaluation_is_listed(place):
    place.run("a")
    folder = place.run("b", router="hash", scored=False)
    evaluation(folder, translations(0.5, 0), place.reference, name="test")
    _, rows, text = place.table("--scores", "test.checkpoint_last")
    assert list(rows) == ["switch-4"]
    assert "hash-4, seed 1" in text
    assert "not scored as test.checkpoint_last" in text


def test_runs_that_were_moved(place, monkeypatch, tmp_path):
    """Translations lie beside the scores; a path relative to elsewhere leads nowhere."""
    for name, router in (("a", "switch"), ("b", "hash")):
        folder = place.run(name, router=router)
        place.change(folder, lambda e: e.update(hypotheses="runs/gone/test.checkpoint_last.de"))
    monkeypatch.chdir(tmp_path)
    _, rows, _ = place.table()
    assert rows["hash-4"]["p_value"] > 0


def test_text_that_is_gone_or_changed(place, capsys):
    folder = place.run("a")
    other = place.run("b", router="hash")
    text = folder / "evaluation" / "test.checkpoint_last.de"
    lines = read_lines(text)
    write_lines(text, translations(0.3, 1))
    assert "was changed: it has not the BLEU recorded for it" in place.error(capsys)
    text.unlink()
    assert f"there is no {text}" in place.error(capsys)
    write_lines(text, lines)
    place.table()
    # Named in one evaluation only, but found by its content.
    place.change(other, lambda e: e["data"].update(reference="gone.de"))
    place.change(folder, lambda e: e["data"].update(reference=str(text)))
    message = place.error(capsys)
    assert "start this command in the folder where `fairseq-sparsemixer evaluate` ran" in message
    place.change(other, lambda e: e["data"].update(reference=str(place.reference)))
    place.table()


def test_scores_that_cannot_be_compared(place, capsys):
    place.run("a")
    other = place.run("b", router="hash")
    path = other / "evaluation" / "test.checkpoint_last.json"
    good = path.read_text()

    def refused(change):
        place.change(other, change)
        message = place.error(capsys)
        path.write_text(good)
        assert "cannot be compared" in message
        assert "--scores" in message
        return message

    assert "source text (1 and 2)" in refused(lambda e: e["data"].update(source_sha256="2"))
    assert "reference" in refused(lambda e: e["data"].update(reference_sha256="2"))
    assert "beam (5 and 4)" in refused(lambda e: e["generation"].update(beam=4))
    averaged = refused(lambda e: e["checkpoints"][0].update(averaged_from=["a", "b"]))
    assert "checkpoints averaged ([1] and [2])" in averaged
    signature = refused(lambda e: e["scores"]["bleu"].update(signature="tok:intl"))
    assert "signature of BLEU" in signature
    # What only decides how fast it is, and what runs that do not count were scored on, is free.
    place.change(other, lambda e: e["generation"].update(device="cuda", max_tokens=9))
    unfinished = place.run("c", router="topk", log=straight_log({100: 9.0}, ended=False))
    place.change(unfinished, lambda e: e["data"].update(source_sha256="2"))
    place.table()


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


def test_published_test_sets_are_named_in_the_signature(place):
    official = {"test_set": "wmt14/full", "langpair": "en-de"}
    scores = scoring.score(REFERENCE, REFERENCE, official)
    for name, router in (("a", "switch"), ("b", "hash")):
        folder = place.run(name, router=router)
        write_lines(folder / "evaluation" / "test.checkpoint_last.de", REFERENCE)
        data = {"sacrebleu": "wmt14/full", "source_lang": "en", "target_lang": "de"}
        place.change(folder, lambda e, data=data: e["data"].update(data))
        place.change(folder, lambda e: e.update(scores=scores))
    report, rows, _ = place.table()
    assert "test:wmt14/full" in report["signatures"]["p (BLEU)"]
    assert "test:wmt14/full" in report["signatures"]["BLEU"]
    assert rows["hash-4"]["p_value"] == 1.0


def test_what_the_train_command_recorded(place):
    folder = place.run("a")
    record = {
        "parameters": {"total": 7000000, "active": 3000000},
        "versions": {"torch": "2"},
        "git": "abc",
    }
    write_json(folder / "run.json", record)
    report, rows, text = place.table()
    assert rows["switch-4"]["parameters_active"] == 3000000
    assert "7.0 M / 3.0 M" in text
    assert report["runs"][0]["versions"] == {"torch": "2"}
    assert report["runs"][0]["git"] == "abc"


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


def test_a_folder_counts_once_however_it_is_named(place):
    folder = place.run("model=big,schedule=short/switch-4-seed1")
    report, _, _ = place.table(place.runs, folder, folder / "..")
    assert [run["folder"] for run in report["runs"]] == [str(folder)]


# Mistakes


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


@pytest.mark.parametrize("text", ["{", "a: [", "- 1", "common: {seed: 1}"])
def test_a_config_that_is_none(text, place, capsys):
    folder = place.run("a")
    (folder / ".hydra" / "config.yaml").write_text(text)
    assert "leave its folder out of RUN" in place.error(capsys)


def test_a_damaged_evaluation_is_named(place, capsys):
    folder = place.run("a")
    (folder / "evaluation" / "x.json").write_text('{"scores": ')
    message = place.error(capsys)
    assert "x.json" in message
    assert "remove it" in message


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
