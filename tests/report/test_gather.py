"""Curves and loads, of points and of logs."""

import json
import math
import shutil
import statistics

import pytest
from support.page_text import words_of
from support.report_study import LAYERS, make_report, point, read_arms, write_run
from support.run_folders import Log

from fairseq_sparsemixer.comparison.histories import read_histories
from fairseq_sparsemixer.report import gather
from fairseq_sparsemixer.runs.points import read_points


def test_curves_and_their_means(study):
    arms = read_arms(study)
    histories = read_histories(arms.values())
    curves = gather.validation_curves(arms.values(), histories)
    assert curves["topk-4"][0].updates == [20]
    assert not curves["topk-4"][0].counts
    mean = gather.mean_line(curves["switch-4"])
    assert (mean.updates, mean.values) == ([20, 40, 60], [9.0, 7.0, 6.25])
    assert mean.seconds == [10, 20, 30]
    bleu = gather.point_curves(arms.values(), histories, "bleu")
    assert gather.mean_line(bleu["switch-4"]).values == [1.0, 8.0, 11.0]
    assert bleu["dense"][0].updates == [40]
    drift = gather.layer_curves(list(arms.values()), histories, "drift")
    assert set(drift) == set(LAYERS)
    assert drift["encoder.0"]["switch-4"][0].updates == [40, 60]
    assert "dense" not in drift["encoder.0"]
    loads = gather.find_loads(arms.values(), histories)
    assert set(loads) == {"switch-4", "sparsemixer-4"}
    assert loads["switch-4"].layers["decoder.0"][-1] == pytest.approx([0.4, 0.2, 0.2, 0.2])
    travel = loads["switch-4"].by_domain["decoder.0"]["travel"]
    assert travel == pytest.approx([0.2, 0.2, 0.2, 0.4])
    real = read_points(study / "sparsemixer-4-seed1" / "points.jsonl")
    assert loads["sparsemixer-4"].updates == [p["updates"] for p in real] == [20, 40, 60]
    training = gather.training_curves(arms.values(), histories)
    assert training["sparsemixer-4"][0].updates == list(range(5, 61, 5))
    assert all(map(math.isfinite, training["sparsemixer-4"][0].values))


def test_a_mean_is_of_seeds_that_count_and_of_points_that_all_have():
    def line(seed, counts, updates, values):
        return gather.Line(seed, counts, updates, [None] * len(updates), values)

    lines = [
        line(1, True, [1, 2, 3], [4.0, 5.0, 6.0]),
        line(2, True, [2, 3], [7.0, 8.0]),
        line(3, False, [2, 3], [99.0, 99.0]),
    ]
    assert gather.mean_line(lines)[2:] == ([2, 3], [None, None], [6.0, 7.0])
    assert gather.mean_line(lines[2:]).values == [99.0, 99.0]


def test_long_curves_of_training_are_averaged():
    points = [(n, float(n), None if n == 7 else float(n)) for n in range(1, 1001)]
    thinned = gather._thinned(points)
    assert len(thinned) == 200
    assert thinned[0] == (5, 5.0, 3.0)
    assert thinned[1] == (10, 10.0, statistics.mean([6, 8, 9, 10]))


def test_arms_are_drawn_over_time_by_the_seeds_that_have_it(tmp_path, study):
    """Training and BLEU in the time of the points, or all in that of the log."""
    shutil.copytree(study / "data", tmp_path / "data")
    for seed, pace in ((1, 0.5), (2, None)):
        points = [point(u, 7.0, pace and pace * u, bleu=1.0) for u in (20, 40, 60)]
        write_run(tmp_path, f"s{seed}", points, router="switch", seed=seed)
    write_run(tmp_path, "t", [point(u, 7.0, None) for u in (20, 40, 60)], router="topk")
    arms = read_arms(tmp_path)
    histories = read_histories(arms.values())
    curves = gather.validation_curves(arms.values(), histories)
    timed = gather.timed(curves)
    assert [line.seed for line in timed["switch-4"]] == [1]
    assert "topk-4" not in timed
    left_out = "Left out over time, which is not known: switch-4 (seed 2), topk-4."
    assert gather.without_time(curves) == left_out
    assert gather.without_time(timed) == ""
    training = gather.training_curves(arms.values(), histories)["switch-4"][0]
    assert training.seconds == pytest.approx([10, 20, 30])  # 0.6 s an update in the log
    make_report(tmp_path, "--output", tmp_path / "page.html")
    assert left_out in words_of(tmp_path / "page.html")
    assert "bleu-minutes.svg" in {p.name for p in (tmp_path / "page_figures").iterdir()}
    (tmp_path / "t" / "points.jsonl").unlink()
    histories = read_histories(arms.values())
    bleu = gather.point_curves(arms.values(), histories, "bleu")["switch-4"]
    assert [line.seconds for line in bleu] == [pytest.approx([12, 24, 36], abs=0.1)] * 2


def test_a_log_alone_gives_curves_entropy_and_shares(tmp_path, study):
    shutil.copytree(study / "data", tmp_path / "data")
    log = Log()
    log.begin()
    log.train()
    for updates in (20, 40, 60):
        log.wait(60)
        log.inner(updates)
        routed = {f"valid_{key}/encoder.0": "0.5" for key in ("router_entropy", "max_expert_share")}
        stats = {"valid_loss": "9", "valid_nll_loss": "8", "valid_num_updates": str(updates)}
        log.add("valid", json.dumps({**stats, **routed}))
    log.done()
    log.write(write_run(tmp_path, "a", None) / "hydra_train.log")
    make_report(tmp_path, "--output", tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    names = {path.stem for path in (tmp_path / "page_figures").iterdir()}
    assert {"validation-updates", "validation-minutes", "entropy", "max-share"} <= names
    assert not names & {"drift", "load-at-end", "bleu-updates"}
    for sentence in (
        "No drift was measured",
        "Not measured during training",
        "the checkpoint that",
    ):
        assert sentence in text
    assert "the log, validation and saving included" in text
