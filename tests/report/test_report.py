"""The report: its figures against hand-computed values, its page by parser and by browser."""

import collections
import html.parser
import json
import math
import re
import shutil
import statistics
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from sklearn.metrics import mutual_info_score
from support import browser, commands
from support.run_folders import Log, config, evaluation, straight_log

from fairseq_sparsemixer import cli
from fairseq_sparsemixer.comparison import results as scores
from fairseq_sparsemixer.comparison import speed_up
from fairseq_sparsemixer.comparison.histories import read_histories, times_are_of_points
from fairseq_sparsemixer.errors import UserError
from fairseq_sparsemixer.evaluation import scoring
from fairseq_sparsemixer.evaluation.translator import Translator
from fairseq_sparsemixer.files import read_lines, sha256_of, write_json, write_lines
from fairseq_sparsemixer.models.layers import switch_layers
from fairseq_sparsemixer.report import canvas, figures, gather, page, routing
from fairseq_sparsemixer.report.drawing import FILES
from fairseq_sparsemixer.report.specialisation import (
    MIN_COUNT,
    entropy,
    information,
    mutual_information,
    typical_words,
)
from fairseq_sparsemixer.runs.folder import ROUTING, find_runs, read_run
from fairseq_sparsemixer.runs.grouping import group_runs
from fairseq_sparsemixer.runs.logs import read_log
from fairseq_sparsemixer.runs.points import read_points

DOMAINS = ["ding", "travel & <food>"]
LAYERS = ("encoder.0", "decoder.0")
CPU = 0.1
"""Seconds of an update by which CPU time exceeds the other, in fabricated points."""
TINY = [
    "+model.encoder_layers=1", "+model.decoder_layers=1", "+model.encoder_embed_dim=32",
    "+model.encoder_ffn_embed_dim=32", "optimization.lr=[0.01]", "common.log_interval=5",
    "dataset.validate_interval_updates=20", "checkpoint.save_interval_updates=20",
    "task.points_sentences=4", "optimization.max_update=60", "model.router=sparsemixer",
]  # fmt: skip


def point(updates, nll, seconds, experts=4, drift=0.25, bleu=None):
    """A line of points.jsonl, with as little as may be in it."""
    load = [0.4, *[0.6 / (experts - 1)] * (experts - 1)] if experts else []
    layer = {"load": load, "entropy": 1.2, "drift": drift, "load_by_domain": {"ding": load}}
    return {
        "updates": updates,
        "seconds": seconds,
        "cpu_seconds": None if seconds is None else seconds + CPU * updates,
        "words": 100 * updates,
        "words_per_second": 100.0,
        "loss": None if nll is None else nll + 1,
        "nll_loss": nll,
        "layers": dict.fromkeys(LAYERS, layer) if experts else {},
        **({} if bleu is None else {"bleu": bleu, "chrf": 2 * bleu}),
    }


def write_run(study, name, points, keep=0.8, curve=None, scored=True, **settings):
    """A fabricated run of ``study``, scored on its data without any checkpoint."""
    folder = study / name
    (folder / ".hydra").mkdir(parents=True)
    OmegaConf.save(config(max_update=60, **settings), folder / ".hydra" / "config.yaml")
    straight_log(curve or {20: 9.0, 40: 7.0, 60: 6.0}).write(folder / "hydra_train.log")
    if points:
        write_lines(folder / "points.jsonl", map(json.dumps, points))
    if scored:
        raw = study / "data" / "raw"
        hypotheses = [
            " ".join(
                word for n, word in enumerate(line.split()) if (n * 7 + len(name)) % 10 < 10 * keep
            )
            for line in read_lines(raw / "test.de")
        ]
        path, content = evaluation(folder, hypotheses, raw / "test.de", updates=60)
        content["data"].update(
            source="data/raw/test.en",
            source_sha256=sha256_of(raw / "test.en"),
            reference="data/raw/test.de",
        )
        real = study / "sparsemixer-4-seed1" / "evaluation" / "test.checkpoint_last.json"
        if real.is_file():
            content["generation"] = json.loads(real.read_text())["generation"]
        write_json(path, content)
    return folder


def build_study(corpus, study):
    """A real run, and fabricated ones: two seeds, dense, without points, diverged, unscored."""
    shutil.copytree(corpus, study / "data")
    raw = study / "data" / "raw"
    lines = read_lines(raw / "test.en")
    write_lines(raw / "test.domain", (DOMAINS[n % 2] for n in range(len(lines))))
    real = study / "sparsemixer-4-seed1"
    commands.run(
        "fairseq_cli.hydra_train",
        *("--config-dir", commands.PACKAGE.parent / "configs", "--config-name", "demo"),
        *(f"common.user_dir={commands.PACKAGE}", "task.data=data/bin", f"hydra.run.dir={real}"),
        *TINY,
        cwd=study,
    )
    evaluate = ["evaluate", real.name, "--checkpoint", "checkpoint_last.pt", "--data", "data"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(study)
        assert cli.main([*evaluate, "--beam", "1"]) == 0
    for seed, best in ((1, 6.0), (2, 6.5)):
        points = [
            point(20, 9.0, 10.0, drift=None, bleu=1.0),
            point(40, 7.0, 20.0, bleu=8.0),
            point(60, best, 30.0, bleu=9.5 + seed),
        ]
        write_run(study, f"switch-4-seed{seed}", points, router="switch", seed=seed)
    points = [point(20, 8.0, 6.0, experts=0), point(40, 7.5, 12.0, experts=0, bleu=3.0)]
    write_run(study, "dense-seed1", points, keep=0.4, router="dense")
    diverged = [point(20, 8.0, 10.0), point(40, math.nan, 20.0), point(60, None, 30.0)]
    curve = {20: 8.0, 40: math.nan, 60: math.nan}
    write_run(study, "topk-4-seed1", diverged, curve=curve, router="topk")
    write_run(study, "hash-4-seed1", points=points, router="hash", scored=False)


@pytest.fixture(scope="module")
def study(shared, corpus):
    return shared.directory("report_study", lambda folder: build_study(corpus, folder))


def make(*arguments):
    assert cli.main(["report", *map(str, arguments)]) == 0


@pytest.fixture(scope="module")
def report(shared, study):
    """The page of the study; where it ran, the data are not."""

    def build(folder):
        folder.mkdir()
        make(study, "--output", folder / "study.v1.html")

    return shared.directory("report", build) / "study.v1.html"


def read_arms(*folders):
    return {arm.name: arm for arm in group_runs(map(read_run, find_runs(folders)))}


# Measures


def test_information_against_scikit_learn():
    rng = np.random.default_rng(1)
    words = rng.integers(0, 40, 3000)
    experts = np.where(rng.random(3000) < 0.6, words % 5, rng.integers(0, 5, 3000))
    assert mutual_information(experts, words) == pytest.approx(mutual_info_score(experts, words))
    rng = np.random.default_rng(2)
    shuffled = [rng.permutation(words) for _ in range(20)]
    found = information(experts, words, "experts", shuffled)
    assert found.share == pytest.approx(mutual_info_score(experts, words) / entropy(experts))
    # By chance (rows - 1) (columns - 1) / 2T nats, to first order.
    assert found.shuffled == pytest.approx(4 * 39 / 6000 / entropy(experts), rel=0.2)
    by_hand = sorted(mutual_info_score(experts, each) / entropy(experts) for each in shuffled)
    assert found.chance == pytest.approx(np.quantile(by_hand, 0.95))
    assert by_hand[0] < found.shuffled < found.chance < by_hand[-1]
    assert information(words % 5, words, "experts", shuffled).share == pytest.approx(1)
    assert information(experts, words, "others", shuffled).share < found.share
    assert information(np.zeros(9, int), words[:9], "experts", []) is None


def test_domains_that_experts_know_nothing_of_are_within_chance():
    """Sentences of one word each differ in their words, and so in experts, but not by domain."""
    rng = np.random.default_rng(3)
    translator = SimpleNamespace(model=SimpleNamespace(encoder=SimpleNamespace(dictionary="ab")))
    pairs = [routing._Pair(n, torch.zeros(30, dtype=int), torch.tensor([0])) for n in range(200)]
    choices = [
        {"encoder.0": np.full((30, 1), expert, np.int16)} for expert in rng.integers(0, 4, 200)
    ]
    domains = [str(each) for each in rng.integers(0, 4, 200)]
    found = routing._describe_layer(translator, "encoder.0", 4, pairs, choices, domains)["domains"]
    # Of 200 sentences, not of 6,000 choices: (4 - 1) (4 - 1) / 2T nats.
    assert found["shuffled"] == pytest.approx(9 / 400 / math.log(4), rel=0.3)
    assert found["share"] < found["chance"]


def test_typical_words_by_hand():
    """Expert 0: word 0 six times of 12, word 1 six of 6, word 2 four of 4, word 3 five of 10."""
    counts = {(0, 0): 6, (0, 1): 6, (0, 2): 4, (0, 3): 5, (1, 0): 6, (1, 3): 5, (1, 4): 10}
    pairs = [pair for pair, count in counts.items() for _ in range(count)]
    experts, words = np.array(pairs).T
    found = typical_words(experts, words, 0, most=9)
    assert MIN_COUNT == 5
    # Word 2 is too rare; the shares of expert 0 are of 21 choices, all of 42.
    assert [(each.word, each.times) for each in found] == [(1, 6)]
    assert found[0].lift == pytest.approx((6 / 21) / (6 / 42))
    assert [each.word for each in typical_words(experts, words, 1, most=9)] == [4]
    assert typical_words(experts, words, 1, most=0) == []
    more = np.append(experts, [1] * 21), np.append(words, [5] * 21)
    lifts = {each.word: each.lift for each in typical_words(*more, 0, most=9)}
    assert lifts == pytest.approx({1: 3.0, 0: 1.5, 3: 1.5})
    assert list(lifts) == [1, 0, 3]


def test_samples_are_spread_over_domains_and_of_moderate_length():
    sources = ["one two three four five"] * 40 + ["short"] * 40 + [" ".join("x" * 21)]
    assert routing.choose_samples(sources, None) == [3, 10, 16, 23, 30, 36]
    domains = ["a"] * 10 + ["b"] * 29 + ["c"] * 42
    assert routing.choose_samples(sources, domains) == [2, 7, 17, 31, 39]


# Training


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
    make(tmp_path, "--output", tmp_path / "page.html")
    text = words_of(tmp_path / "page.html")
    assert "≤\N{NO-BREAK SPACE}20 ≥\N{NO-BREAK SPACE}2.00" in text
    assert "unknown: one of the two runs has no loss" in text
    assert "topk-4, at least 2.00 times as fast in updates" in text
    make(tmp_path, "--output", tmp_path / "page.html", "--baseline", "hash-4")
    assert "best validation loss on every seed" not in words_of(tmp_path / "page.html")


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
        return page.at_a_glance(2, 2, 2, table, summary, 0.05)[-1]

    assert line(updates=9, by_updates=0.33, by_time=1.2) == (
        "No other arm reached the baseline's best validation loss in fewer updates; closest: b, "
        "0.33 times as fast in updates and 1.20 times in time."
    )
    assert line(updates=9, by_updates=1.5).startswith("Soonest at")
    assert "on every seed" in line()


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
    make(tmp_path, "--output", tmp_path / "page.html")
    assert left_out in words_of(tmp_path / "page.html")
    assert "bleu-minutes.svg" in {p.name for p in (tmp_path / "page_figures").iterdir()}
    (tmp_path / "t" / "points.jsonl").unlink()
    histories = read_histories(arms.values())
    bleu = gather.point_curves(arms.values(), histories, "bleu")["switch-4"]
    assert [line.seconds for line in bleu] == [pytest.approx([12, 24, 36], abs=0.1)] * 2


def test_the_zoom_shows_all_seeds_from_a_fifth_of_the_longest_run_on(tmp_path, monkeypatch):
    def line(seed, updates, values):
        return gather.Line(seed, True, updates, [None] * len(updates), values)

    curves = {
        "a": [line(1, [10, 20, 100], [9.0, 8.0, 2.0]), line(2, [10, 20, 100], [9.0, 8.0, 5.0])],
        "b": [line(1, [4, 10], [30.0, 20.0])],
    }
    seen = []
    monkeypatch.setattr(figures, "keep", lambda figure, *_: seen.append(figure))
    painter = figures.Painter(tmp_path, canvas.styles(list(curves), "b"))
    painter.curves("x", curves, "nll", "updates", zoom=True)
    (axis,) = seen[0].axes
    assert axis.get_ylim() == pytest.approx((2 - 0.06 * 6, 8 + 0.06 * 6))
    single, _, mean, _ = axis.get_lines()
    assert single.get_linestyle() == mean.get_linestyle() == canvas.styles("ab", "b")["a"].line


def test_an_odd_number_of_panels_and_strange_script(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(figures, "keep", lambda figure, *_: seen.append(figure))
    painter = figures.Painter(tmp_path, canvas.styles(["新聞"], None))
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


def test_training_that_was_taken_back_is_not_drawn(tmp_path):
    log = straight_log({20: 9.0}, ended=False)
    log.save(20)
    log.wait(10)
    log.inner(40)
    log.begin(20)
    log.train()
    log.wait(10)
    log.inner(30)
    log.write(tmp_path / "log")
    assert [(p.updates, p.nll_loss) for p in read_log(tmp_path / "log").training] == [
        (20, 9.5),
        (30, 9.5),
    ]


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
    make(tmp_path, "--output", tmp_path / "page.html")
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


# Scores


def test_scores_by_domain_are_those_of_the_lines(study, monkeypatch):
    monkeypatch.setattr(scores, "LEAST_LINES", 10)
    arms = read_arms(study)
    runs = [run for arm in arms.values() for run in arm.counted]
    text = scores.read_test_text(runs)
    results = scores.read_results(list(arms.values()), "switch-4", text, "")
    assert results.domains == {DOMAINS[0]: 11, DOMAINS[1]: 10}
    for name in ("switch-4", "dense", "sparsemixer-4"):
        for domain in DOMAINS:
            kept = [n for n, label in enumerate(text.domains) if label == domain]
            expected, tests = {}, []
            for run in arms[name].counted:
                lines = read_lines(run.scores_path.with_suffix(".de"))
                own, reference = ([each[n] for n in kept] for each in (lines, text.references))
                expected[run.seed] = scoring.score(own, reference)["bleu"]["score"]
                base = read_lines(arms["switch-4"].runs[0].scores_path.with_suffix(".de"))
                tests.append(scoring.compare(own, [base[n] for n in kept], reference))
            score = results.by_domain[name][domain]
            assert score.by_seed == pytest.approx(expected)
            assert score.mean == pytest.approx(statistics.mean(expected.values()))
            if name == "switch-4":
                assert (score.difference, score.p_value) == (None, None)
                assert score.deviation == pytest.approx(statistics.stdev(expected.values()))
            else:
                assert score.deviation is None
                base_mean = results.by_domain["switch-4"][domain].mean
                assert score.difference == pytest.approx(score.mean - base_mean)
                assert score.p_value == pytest.approx(tests[0]["bleu"]["p_value"])
    assert "topk-4" not in results.by_domain
    monkeypatch.setattr(scores, "LEAST_LINES", 11)
    results = scores.read_results(list(arms.values()), "switch-4", text, "")
    tested = [score.p_value is not None for score in results.by_domain["dense"].values()]
    assert tested == [True, False]


def test_settings_that_only_the_dense_arm_lacks_are_common(study):
    common, differing = scores.compare_settings(
        list(read_arms(study / "dense-seed1", study).values())
    )
    assert "model.router" in differing
    assert "model.moe_every" in common
    assert common["model._name"] == "switch_transformer_demo"


def test_default_baseline(study):
    arms = read_arms(study)
    assert scores.default_baseline(list(arms.values())) == "switch-4"
    assert scores.default_baseline([arms["sparsemixer-4"], arms["dense"]]) == "dense"
    assert scores.default_baseline([arms["topk-4"], arms["sparsemixer-4"]]) == "sparsemixer-4"
    assert scores.default_baseline([arms["topk-4"]]) is None


# Routing


def test_routing_against_sentences_one_at_a_time(study, report, one_thread):
    """Without batches and padding: shares, words and their lifts, domains, samples."""
    folder = study / "sparsemixer-4-seed1"
    found = json.loads((folder / ROUTING).read_text())
    translator = Translator(str(folder), "checkpoint_last.pt", data=study / "data")
    raw = study / "data" / "raw"
    sources, references = (read_lines(raw / f"test.{language}") for language in ("en", "de"))
    assert (found["sentences"], found["left_out"]) == (len(sources), 0)
    eos = translator.target_dictionary.eos()

    def run(source, target):
        """{layer: [(piece, expert), ...]}"""
        source, target = translator.encode_pair(source, target)
        previous = torch.cat([torch.tensor([eos]), target[:-1]])
        indices = {}
        handles = [
            layer.moe.register_forward_hook(
                lambda _, __, output, name=name: indices.update({name: output[1].expert_index})
            )
            for name, layer in switch_layers(translator.model).items()
        ]
        with torch.no_grad():
            translator.model(source[None], torch.tensor([len(source)]), previous[None])
        for handle in handles:
            handle.remove()
        read = {"encoder.0": source, "decoder.0": previous}
        return {
            name: [
                (translator.target_dictionary[token], expert)
                for token, (expert,) in zip(read[name].tolist(), indices[name].tolist())
            ]
            for name in read
        }

    seen = collections.defaultdict(list)
    for n, pair in enumerate(zip(sources, references)):
        for name, choices in run(*pair).items():
            seen[name] += [(word, expert, DOMAINS[n % 2]) for word, expert in choices]
    assert set(found["layers"]) == set(seen) == set(LAYERS)
    for name, layer in found["layers"].items():
        words, experts, domains = zip(*seen[name])
        assert (layer["num_experts"], layer["tokens"]) == (4, len(words))
        assert layer["unrouted"] == 0
        given = [mutual_info_score(experts, words), mutual_info_score(experts, domains)]
        assert layer["words"]["share"] == pytest.approx(given[0] / entropy(np.array(experts)))
        codes = np.array([DOMAINS.index(domain) for domain in domains])
        assert layer["domains"]["share"] == pytest.approx(given[1] / entropy(codes), abs=1e-9)
        assert layer["domain_shares"][DOMAINS[0]] == pytest.approx((codes == 0).mean())
        for expert, each in enumerate(layer["experts"]):
            own = [word for word, chosen, _ in seen[name] if chosen == expert]
            assert each["share"] == pytest.approx(len(own) / len(words))
            for word in each["words"]:
                assert word["count"] == own.count(word["word"]) >= MIN_COUNT
                lift = word["count"] / len(own) / (words.count(word["word"]) / len(words))
                assert word["lift"] == pytest.approx(lift)
                assert lift > 1
    for sample in found["samples"]:
        choices = run(sample["source"], sample["translation"])
        assert sample["domain"] == DOMAINS[sample["line"] % 2]
        for side in ("encoder", "decoder"):
            assert sample[side]["layer"] == f"{side}.0"
            pairs = list(zip(sample[side]["pieces"], (e for (e,) in sample[side]["experts"])))
            assert pairs == choices[f"{side}.0"]


def test_several_experts_of_a_token_and_none():
    """Tokens 0 to 5; the first has no expert, the third only one of two."""
    translator = SimpleNamespace(model=SimpleNamespace(encoder=SimpleNamespace(dictionary="abc")))
    choices = [{"encoder.1": np.array([[-1, -1], [0, 1], [2, -1]], np.int16)}] * 2
    pairs = [routing._Pair(n, torch.tensor([0, 1, 2]), torch.tensor([9])) for n in (5, 7)]
    domains = ["x"] * 6 + ["y"] * 2
    layer = routing._describe_layer(translator, "encoder.1", 4, pairs, choices, domains)
    assert (layer["tokens"], layer["unrouted"]) == (6, pytest.approx(1 / 3))
    assert [each["share"] for each in layer["experts"]] == pytest.approx([1 / 3] * 3 + [0])
    assert layer["domain_shares"] == {"x": 0.5, "y": 0.5}
    assert layer["experts"][3]["domain_shares"] == {}
    assert layer["domains"]["share"] == pytest.approx(0, abs=1e-9)
    assert layer["words"]["share"] == pytest.approx(entropy(np.array([0, 0, 1])) / math.log(3))
    without = routing._describe_layer(translator, "encoder.1", 4, pairs, choices, None)
    assert without["domains"] is None
    assert without["domain_shares"] == {}


def test_routing_is_kept_and_made_anew_where_the_checkpoint_changed(
    study, report, tmp_path, monkeypatch
):
    folder = shutil.copytree(study / "sparsemixer-4-seed1", tmp_path / "run")
    run = read_run(folder)
    kept = (folder / ROUTING).read_text()
    (folder / "checkpoint_last.pt").unlink()
    problem = "the text is gone"
    assert routing.routing_of_run(run, None, problem) == json.loads(kept)
    run.evaluation["checkpoints"][0]["sha256"] = "another"
    with pytest.raises(UserError, match=problem):
        routing.routing_of_run(run, None, problem)
    text = scores.read_test_text([read_run(study / "sparsemixer-4-seed1")])
    run.evaluation["checkpoints"][0]["path"] = "nowhere.pt"
    with pytest.raises(UserError, match=r"there is no .*checkpoint_last.pt, the check"):
        routing.routing_of_run(run, text, "")
    shutil.copy(study / "sparsemixer-4-seed1" / "checkpoint_best.pt", folder / "checkpoint_last.pt")
    with pytest.raises(UserError, match="is not the checkpoint that"):
        routing.routing_of_run(run, text, "")
    shutil.copy(study / "sparsemixer-4-seed1" / "checkpoint_last.pt", folder)
    for damaged in ("{", "[]", '{"of": []}'):
        (folder / ROUTING).write_text(damaged)
        run = read_run(folder)
        assert routing._identity(run, routing._read(folder / ROUTING), None)
    monkeypatch.setattr(routing, "BATCH_TOKENS", 50)
    again = routing.routing_of_run(run, text, "")
    assert again["layers"].keys() == json.loads(kept)["layers"].keys()
    for name, layer in again["layers"].items():
        assert layer["experts"] == json.loads(kept)["layers"][name]["experts"]
    # Other labels, of the same domains.
    changed = text._replace(domains=text.domains[1:] + text.domains[:1])
    assert routing._identity(run, again, changed) != again["of"]
    assert routing._identity(run, again, None) == again["of"]

    def refuse(*_):
        raise PermissionError

    monkeypatch.setattr(routing, "write_json", refuse)
    of_changed = routing.routing_of_run(run, changed, "")
    assert [sample["domain"] for sample in of_changed["samples"]] != [
        sample["domain"] for sample in again["samples"]
    ]


# The page


class Outline(html.parser.HTMLParser):
    """What a page is made of; complains about tags that do not match."""

    VOID = ("meta", "link", "br", "hr", "img", "input")

    def __init__(self, text):
        super().__init__()
        self.ids, self.addresses, self.open, self.tags = [], [], [], collections.Counter()
        self.headings, self.scopeless, self.text = [], 0, []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags[tag] += 1
        if "id" in attributes:
            self.ids.append(attributes["id"])
        if tag not in self.VOID:
            self.open.append(tag)
        for name in ("src", "href", "xlink:href", "srcset", "action", "data"):
            if attributes.get(name):
                self.addresses.append(attributes[name])
        if re.fullmatch("h[1-6]", tag):
            self.headings.append(int(tag[1]))
        self.scopeless += tag == "th" and "scope" not in attributes

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] not in (["style"], ["script"]):
            self.text.append(data)


def words_of(path):
    """The text of a page, with single spaces (of which those that do not break stay)."""
    return re.sub("[ \n]+", " ", " ".join(Outline(path.read_text(encoding="utf-8")).text))


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
    assert all(FILES.fullmatch(path.name) for path in folder.iterdir())
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
    assert "never reached it" in text
    assert "its last validation nll is nan" in text
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
    make(moved, "--output", tmp_path / "page.html", "--baseline", "dense")
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
    make(moved, "--output", tmp_path / "page.html")
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
    make(moved / "dense-seed1", "--output", tmp_path / "alone.html")
    assert "tested, without correction" not in words_of(tmp_path / "alone.html")


def test_a_report_without_any_scored_run(study, tmp_path):
    make(study / "hash-4-seed1", study / "topk-4-seed1", "--output", tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert "2 arms, 2 runs, of which 0 are finished and scored" in text
    assert "so there is no baseline" in text


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
    assert "a report needs jinja2: run `pip install 'fairseq-sparsemixer[report]'`" in needed


# In a browser


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    if browser.find() is None:
        pytest.skip(browser.HOW_TO_INSTALL)
    with browser.start(tmp_path_factory.mktemp("profile")) as driver:
        yield driver


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
            arms = {"domains": 3, "load-at-end": 2, "validation-updates": 5, "drift": 3}
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
    make(tmp_path, "--output", tmp_path / "page.html")
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
