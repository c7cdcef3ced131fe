"""Updates to the baseline's scored loss (the table's), and to its best loss (the report's)."""

import random
import shutil

import pytest
from support.page_text import words_of
from support.report_study import CPU, make_report, point, read_arms, write_run
from support.run_folders import straight_log

from fairseq_sparsemixer.comparison import speed_up
from fairseq_sparsemixer.comparison.histories import read_histories, times_are_of_points
from fairseq_sparsemixer.files import write_json
from fairseq_sparsemixer.runs.logs import Validation


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


# To the scored loss


def test_a_run_that_starts_below_the_target(place):
    place.run("a", router="switch")
    place.run("b", router="hash", curve={100: 4.0, 300: 3.0})
    _, rows, text = place.table()
    assert rows["hash-4"]["updates_to_target"] == 100
    assert "the first validation of seed 1 is below the target" in text


def test_of_a_run_that_was_scored_at_its_best_that_loss_counts(place):
    for name, router, curve in (
        ("a", "switch", {100: 5.0, 200: 3.0, 300: 3.5}),
        ("b", "hash", {100: 4.0, 200: 3.6, 300: 3.2}),
    ):
        run = place.run(name, router=router, curve=curve)
        best = {"name": "checkpoint_best.pt", "updates": min(curve, key=curve.get)}
        place.change(run, lambda content, best=best: content["checkpoints"][0].update(best))
    report, rows, _ = place.table()
    assert [rows[name]["valid_nll"] for name in ("switch-4", "hash-4")] == [3.0, 3.2]
    assert [rows[name]["updates"] for name in ("switch-4", "hash-4")] == [200, 300]
    own = [(run["updates"], run["valid_nll"]) for run in report["runs"]]
    assert own == [(200, 3.0), (300, 3.2)]
    assert report["target_nll"] == 3.0
    assert [rows[name]["updates_to_target"] for name in ("switch-4", "hash-4")] == [200, None]


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


# To the best loss


def test_speed_up_by_hand(tmp_path, study):
    shutil.copytree(study / "data", tmp_path / "data")
    base = {1: [9.0, 7.0, 6.0], 2: [9.0, 6.4, 6.6]}
    other = {1: [8.0, 5.5, 5.0], 2: [8.0, 7.0, 6.5], 3: [6.5, 5.5, 5.6]}
    for router, runs, pace in (("switch", base, 0.5), ("topk", other, 0.6)):
        for seed, curve in runs.items():
            points = [point(u, nll, pace * u) for u, nll in zip((20, 40, 60), curve)]
            write_run(tmp_path, f"{router}{seed}", points, router=router, seed=seed)
    for seed in (1, 2):  # without a GPU; of the third it is not known
        for router in ("switch", "topk"):
            write_json(tmp_path / f"{router}{seed}" / "run.json", {"gpus": []})
    arms = read_arms(tmp_path)
    histories = read_histories(arms.values())
    assert times_are_of_points(histories)
    first, second, third = speed_up.reach_best_loss(arms["topk-4"], arms["switch-4"], histories)
    reached = 20 + 20 * (8.0 - 6.0) / (8.0 - 5.5)
    time, cpu_time = 0.6 * reached, (0.6 + CPU) * reached
    by_cpu_time = 60 * (0.5 + CPU) / cpu_time
    assert first == pytest.approx(
        (1, 1, 6.0, reached, time, cpu_time, 60 / reached, 50 / reached, by_cpu_time, False)
    )
    assert second == (2, 2, 6.4, *[None] * 6, False)
    # Seed 3 against seed 1.
    assert third[:4] == pytest.approx((3, 1, 6.0, 30))
    assert third.by_time is not None and third.cpu_seconds is third.by_cpu_time is None
    own = speed_up.reach_best_loss(arms["switch-4"], arms["switch-4"], histories)
    assert [each.updates for each in own] == [60, 40]
    assert {each.by_updates for each in own} == {each.by_time for each in own} == {1.0}
    summary = speed_up.summarise([first, second])
    assert (summary["never"], summary["by_updates"]) == (1, None)
    summary = speed_up.summarise([first, third])
    assert summary["by_updates"] == pytest.approx((60 / reached + 2) / 2)
    # One run without the file: all times are the log's.
    (tmp_path / "topk2" / "points.jsonl").unlink()
    histories = read_histories(arms.values())
    assert not times_are_of_points(histories)
    (own, _) = speed_up.reach_best_loss(arms["switch-4"], arms["switch-4"], histories)
    assert own.updates == 60
    assert own.seconds == pytest.approx(36, abs=0.1)


def test_speed_ups_that_are_bounds_or_unknown(tmp_path, study):
    """topk starts below the target, hash and its third seed have no loss."""
    shutil.copytree(study / "data", tmp_path / "data")
    for name, losses, settings in (
        ("s1", (6.0, 5.0, 5.5), {"router": "switch"}),
        ("t1", (4.9, 4.8, 4.0), {"router": "topk"}),
        ("h1", (None, None, None), {"router": "hash"}),
    ):
        points = [point(u, nll, 0.5 * u) for u, nll in zip((20, 40, 60), losses)]
        write_run(tmp_path, name, points, **settings)
    arms = read_arms(tmp_path)
    histories = read_histories(arms.values())
    (bound,) = speed_up.reach_best_loss(arms["topk-4"], arms["switch-4"], histories)
    assert bound == (1, 1, 5.0, 20, 10, None, 2, 2, None, True)
    (exact,) = speed_up.reach_best_loss(arms["switch-4"], arms["switch-4"], histories)
    assert not exact.or_sooner
    for one, other in (("hash-4", "switch-4"), ("switch-4", "hash-4")):
        (unknown,) = speed_up.reach_best_loss(arms[one], arms[other], histories)
        assert unknown == (1, 1, *[None] * 7, False)
    make_report(tmp_path, "--output", tmp_path / "page.html")
    text = words_of(tmp_path / "page.html")
    assert "≤\N{NO-BREAK SPACE}20 ≥\N{NO-BREAK SPACE}2.00" in text
    assert "unknown: one of the two runs has no loss" in text
    assert "topk-4, at least 2.00 times as fast in updates" in text
    make_report(tmp_path, "--output", tmp_path / "page.html", "--baseline", "hash-4")
    assert "best validation loss on every seed" not in words_of(tmp_path / "page.html")
