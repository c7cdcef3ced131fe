"""Whether runs may be compared, and the significance of how their scores differ."""

import json
import subprocess
import sys

import pytest
from support.run_folders import REFERENCE, straight_log, translations

from fairseq_sparsemixer.comparison import conditions
from fairseq_sparsemixer.evaluation import scoring, several
from fairseq_sparsemixer.files import read_lines, write_lines


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
    tests = [{"difference": 1.0, "p_value": 0.01}, {"difference": 2.0, "p_value": 0.02}]
    assert conditions.joint_p_value(tests, 1.5) == 0.02
    assert conditions.joint_p_value(tests, -0.5) == 1.0


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


def test_published_test_sets_are_named_in_the_signature(place):
    official = {"test_set": "wmt14/full", "langpair": "en-de"}
    scores = scoring.score(REFERENCE, REFERENCE, "13a", official)
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


def test_differences_are_tested_with_the_tokeniser_of_the_scores(place):
    """Whose translations would seem changed with another; those of before tell none."""
    for name, router in (("a", "switch"), ("b", "hash")):
        folder = place.run(name, router=router)
        text = read_lines(folder / "evaluation" / "test.checkpoint_last.de")
        scores = scoring.score(text, REFERENCE, "char")
        place.change(folder, lambda e, scores=scores: e.update(scores=scores))
    report, _, _ = place.table()
    assert "|tok:char|" in report["signatures"]["BLEU"]
    assert "|tok:char|" in report["signatures"]["p (BLEU)"]
    for name in ("a", "b"):
        text = read_lines(place.runs / name / "evaluation" / "test.checkpoint_last.de")
        scores = scoring.score(text, REFERENCE, "13a")
        del scores["bleu"]["tokeniser"]
        place.change(place.runs / name, lambda e, scores=scores: e.update(scores=scores))
    report, _, _ = place.table()
    assert "|tok:13a|" in report["signatures"]["p (BLEU)"]


def test_a_mean_of_languages_is_tested_language_by_language(place):
    """With the tokeniser of each; the p-value of all is the largest."""
    half = len(REFERENCE) // 2
    parts = {"en-de": (slice(0, half), "13a"), "en-ja": (slice(half, None), "char")}
    found = {}
    for name, router, keeps in (("a", "switch", (0.8, 0.8)), ("b", "hash", (0.97, 0.93))):
        folder = place.run(name, router=router)
        texts = [translations(keep, seed=name) for keep in keeps]
        lines = [line for text, (own, _) in zip(texts, parts.values()) for line in text[own]]
        write_lines(folder / "evaluation" / "test.checkpoint_last.de", lines)
        scores = {
            pair: scoring.score(lines[own], REFERENCE[own], tokeniser)
            for pair, (own, tokeniser) in parts.items()
        }
        content = {
            "scores": several.average(scores),
            "pairs": {
                pair: {"scores": score, "counts": {"hypothesis_lines": len(lines[parts[pair][0]])}}
                for pair, score in scores.items()
            },
        }
        place.change(folder, lambda e, content=content: e.update(content))
        found[name] = lines
    report, rows, _ = place.table()
    tests = [
        scoring.compare(found["b"][own], found["a"][own], REFERENCE[own], tokeniser)["bleu"]
        for own, tokeniser in parts.values()
    ]
    assert tests[0]["p_value"] != tests[1]["p_value"]
    assert rows["hash-4"]["p_value"] == max(test["p_value"] for test in tests)
    mean = sum(test["difference"] for test in tests) / 2
    assert rows["hash-4"]["bleu_difference"] == pytest.approx(mean)
    assert report["signatures"]["BLEU"].startswith("mean of en-de, en-ja: nrefs:1|")
    assert "the largest p-value of the pairs of languages" in report["signatures"]["p (BLEU)"]


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
