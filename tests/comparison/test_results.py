"""The test set as plain data: scores by domain, settings, the default baseline."""

import statistics

import pytest
from support.report_study import DOMAINS, read_arms

from fairseq_sparsemixer.comparison import results as scores
from fairseq_sparsemixer.evaluation import scoring
from fairseq_sparsemixer.files import read_lines


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
                expected[run.seed] = scoring.score(own, reference, "13a")["bleu"]["score"]
                base = read_lines(arms["switch-4"].runs[0].scores_path.with_suffix(".de"))
                tests.append(scoring.compare(own, [base[n] for n in kept], reference, "13a"))
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
