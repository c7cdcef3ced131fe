"""One model for several languages, through fairseq's own command lines."""

import argparse
import contextlib
import copy
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fairseq import tasks
from fairseq.models.transformer import TransformerModel
from omegaconf import OmegaConf
from support import commands, hostile, one_text, several_languages
from support.commands import command, load, parameters
from support.debian import LANGUAGES
from support.several_languages import MODEL, PAIRS, SETTINGS
from support.training import assert_same, train_on_workers

from fairseq_sparsemixer.comparison.results import TestText
from fairseq_sparsemixer.errors import UserError
from fairseq_sparsemixer.evaluation import scoring, several
from fairseq_sparsemixer.evaluation.translator import Translator
from fairseq_sparsemixer.files import read_lines
from fairseq_sparsemixer.report.routing import routing_of_run
from fairseq_sparsemixer.runs import archives, points, vetting
from fairseq_sparsemixer.tasks.translation_multi_simple_epoch_with_routing import (
    TranslationMultiSimpleEpochWithRoutingConfig,
    TranslationMultiSimpleEpochWithRoutingTask,
)

UPDATES = 6
MEASURED = {"task": "translation_multi_simple_epoch_with_routing", "points_sentences": 6}


@pytest.fixture(scope="session")
def texts(shared, server):
    """A prepared corpus, ``data``."""
    return shared.directory("languages", lambda folder: several_languages.build(server, folder))


@pytest.fixture(scope="session")
def trained(shared, texts, server):
    """Six updates, measured: ``log``, points and checkpoints."""

    def build(directory):
        settings = {**SETTINGS, **MEASURED, "points_file": directory / points.FILE}
        settings["points_text"] = texts / "data" / "raw"
        text = one_text.train(
            server, texts / "data" / "bin", directory, max_update=UPDATES, **settings
        )
        (directory / "log").write_text(text)

    return shared.directory("languages_trained", build)


@pytest.fixture(scope="module")
def scored(trained, tmp_path_factory):
    """The file of ``evaluate``, of all pairs."""
    output = tmp_path_factory.mktemp("scored") / "scores.json"
    command("evaluate", trained / "checkpoint_last.pt", "--output", output, "--beam", 1)
    return output


def valid(text):
    return commands.logged(text, "valid")[-1]


def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(trained, texts, tmp_path, server):
    """With fairseq's own task, which draws the same; it is the same model without points."""
    for updates in (UPDATES // 2, UPDATES):
        one_text.train(server, texts / "data" / "bin", tmp_path, max_update=updates, **SETTINGS)
    resumed, whole = (load(folder / "checkpoint_last.pt") for folder in (tmp_path, trained))
    assert_same(resumed["model"], whole["model"])


def test_validation_finds_what_training_found(trained, texts, server):
    found = one_text.read(
        server,
        "fairseq_cli.validate",
        texts / "data" / "bin",
        trained / "checkpoint_last.pt",
        **{key: SETTINGS[key] for key in ("task", *several_languages.LANGUAGES)},
    )
    expected = valid((trained / "log").read_text())
    for name in ("loss", "nll_loss", "balance_loss"):
        assert valid(found)[name] == pytest.approx(expected[name], abs=2e-3), name


def test_points_tell_each_language(trained):
    *_, point = points.read_points(trained / points.FILE)
    logged = valid((trained / "log").read_text())
    own = point["by_domain"]
    assert list(own) == PAIRS
    tokens = [own[pair]["tokens"] for pair in PAIRS]
    mean = sum(own[pair]["nll_loss"] * n for pair, n in zip(PAIRS, tokens)) / sum(tokens)
    assert mean == pytest.approx(logged["nll_loss"], abs=2e-3)
    assert point["sentences"] == 6 and [own[pair]["sentences"] for pair in PAIRS] == [3, 3]
    for metric in ("bleu", "chrf"):
        expected = sum(own[pair][metric] for pair in PAIRS) / 2
        assert point[metric] == pytest.approx(expected, abs=1e-4)
        assert point["signatures"][metric].startswith("mean of en-de, en-it: nrefs:1|")
    encoder = point["layers"]["encoder.0"]["load_by_domain"]
    assert encoder == {"en-de": [1.0, 0.0], "en-it": [0.0, 1.0]}
    # What stands before the tag is the first language's.
    decoder = point["layers"]["decoder.0"]["load_by_domain"]
    assert decoder["en-de"] == [1.0, 0.0]
    assert 0 < decoder["en-it"][0] == pytest.approx(12 / tokens[1], abs=1e-6)


@pytest.mark.parametrize("language", ["it", pytest.param("de", marks=pytest.mark.slow)])
def test_fairseq_generates_what_the_translator_does(language, trained, texts, server):
    """The same sentences: with tags, experts and prefixes of the language."""
    data, model = texts / "data", trained / "checkpoint_last.pt"
    output = one_text.read(
        server,
        "fairseq_cli.generate",
        data / "bin",
        model,
        **{key: SETTINGS[key] for key in ("task", *several_languages.LANGUAGES)},
        source_lang="en",
        target_lang=language,
        remove_bpe="sentencepiece",
        beam=3,
    )
    found = (line[2:].split("\t") for line in output.splitlines() if line.startswith("H-"))
    lines = {int(number): (float(score), text) for number, score, text in found}
    translator = Translator(str(model), target_lang=language)
    sources = read_lines(data / "raw" / f"test.en-{language}.en")
    translations = translator.translate(sources, beam=3)
    assert len(lines) == len(sources)
    for number, (score, text) in lines.items():
        assert translations[number].text == text.strip()
        # fairseq-generate tells it to the base 2.
        assert translations[number].score / math.log(2) == pytest.approx(score, abs=2e-3)


def test_a_line_that_is_cut_leaves_room_for_the_tag(trained):
    translator = Translator(str(trained / "checkpoint_last.pt"), target_lang="de")
    assert translator.max_source_positions == translator.model.encoder.max_positions() - 1
    (found,) = translator.translate(["a b " * translator.max_source_positions], beam=1)
    assert found.text


def test_evaluation_of_all_pairs(scored, texts):
    found, folder = json.loads(scored.read_text()), scored.parent
    raw = texts / "data" / "raw"
    scores = {}
    for pair, language in zip(PAIRS, LANGUAGES):
        hypotheses = read_lines(folder / f"scores.{pair}.{language}")
        references = read_lines(raw / f"test.{pair}.{language}")
        scores[pair] = scoring.score(hypotheses, references, "13a")
        assert found["pairs"][pair]["scores"] == scores[pair]
        assert found["pairs"][pair]["copy"]["scores"]["bleu"]["score"] > 0
    for metric in ("bleu", "chrf"):
        mean = sum(scores[pair][metric]["score"] for pair in PAIRS) / 2
        assert found["scores"][metric]["score"] == pytest.approx(mean)
        assert found["scores"][metric]["signature"].startswith("mean of en-de, en-it: ")
    bleu, chrf = (f"{found['scores'][metric]['score']:.2f}" for metric in ("bleu", "chrf"))
    rows = [line.split() for line in several.format_pairs(found).split("\n")]
    assert [row[:3] for row in rows[1:4]][-1] == ["mean", bleu, chrf]
    labels = read_lines(folder / "scores.domain")
    assert labels == ["en-de"] * 12 + ["en-it"] * 12
    for side in ("source", "reference", "hypotheses"):
        assert len(read_lines(folder / f"scores.{side}")) == 24


def test_evaluation_of_one_pair(trained, scored, tmp_path):
    output = tmp_path / "scores.json"
    only = ["--output", output, "--target-lang", "it", "--beam", 1]
    command("evaluate", trained / "checkpoint_last.pt", *only)
    found, whole = (json.loads(path.read_text()) for path in (output, scored))
    assert "pairs" not in found
    assert found["scores"] == whole["pairs"]["en-it"]["scores"]


def test_the_report_reads_each_line_in_its_language(scored, tmp_path):
    """With the tags of the line, so that it goes to the experts that it was trained with."""
    evaluation = json.loads(scored.read_text())
    run = SimpleNamespace(
        folder=tmp_path,
        name="language-2",
        evaluation=evaluation,
        scores=evaluation["scores"],
        scores_path=scored,
    )
    source = scored.with_suffix(".source")
    files = [source.with_suffix(f".{side}") for side in ("source", "reference", "domain")]
    found = routing_of_run(run, TestText(source, *map(read_lines, files)), "")
    assert found["sentences"] == 24 and found["samples"]
    shares = [expert["domain_shares"] for expert in found["layers"]["encoder.0"]["experts"]]
    assert shares == [{"en-de": 1.0, "en-it": 0.0}, {"en-de": 0.0, "en-it": 1.0}]


def test_a_dense_one_of_it_translates(trained, tmp_path):
    output = tmp_path / "dense.pt"
    few = ["--sentences", 4, "--beam", 1, "--target-lang", "it", "--output", output]
    command("prune", trained / "checkpoint_last.pt", *few, "--to-dense", "keep")
    translator = Translator(str(output), target_lang="it")
    assert type(translator.model) is TransformerModel
    assert [each.text for each in translator.translate(["a b", "c"], beam=1)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["evaluate", "--target-lang", "fr"],
            "^--target-lang fr: the model was trained on en-de, ",
        ),
        (
            ["evaluate", "--source-lang", "de"],
            "--source-lang de: the model was trained on en-de, e",
        ),
        (["evaluate", "--baseline", "x"], "--baseline are for one pair .*: choose one with --targ"),
        (["translate"], "the model was trained on en-de, en-it: choose one with --target-lang"),
        (["prune"], "the model was trained on en-de, en-it: choose one with"),
    ],
)
def test_a_pair_that_is_none_or_not_chosen(trained, arguments, message):
    name, *more = arguments
    with pytest.raises(UserError, match=message):
        command(name, trained / "checkpoint_last.pt", *more)


def test_no_setting_of_a_checkpoint_is_evaluated(trained, texts, tmp_path, monkeypatch):
    """Text that runs when it is evaluated, in each field: refused, or taken for what it is."""
    monkeypatch.chdir(tmp_path)
    with (trained / "checkpoint_last.pt").open("rb") as file:
        state = archives.contents(file)
    whole = state["cfg"]["task"]
    legacy = {**whole, "_name": SETTINGS["task"], "task": SETTINGS["task"]}
    refused = {}
    for cfg in (whole, argparse.Namespace(**legacy)):
        name = "Namespace" if isinstance(cfg, argparse.Namespace) else "config"
        for key in whole.keys() - {"_name", "data"}:
            own = copy.deepcopy(vars(cfg) if name == "Namespace" else cfg)
            own[key] = hostile.EVAL
            settings = argparse.Namespace(**own) if name == "Namespace" else own
            try:
                vetting.check({**state, "cfg": {**state["cfg"], "task": settings}})
                with contextlib.suppress(Exception):
                    tasks.setup_task(settings if name == "Namespace" else OmegaConf.create(own))
            except archives.Untrusted:
                refused.setdefault(name, set()).add(key)
            assert not Path(hostile.CANARY).exists(), (name, key)
    assert {"left_pad_source", "left_pad_target"} <= refused["config"] & refused["Namespace"]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (
            {"langtoks": "open('x')"},
            "--langtoks must be a dictionary such as {'main': 1}, not open",
        ),
        ({"left_pad_source": "1 + 1"}, "--left-pad-source must be True or False, not 1"),
        ({"sampling_weights": "[1]"}, "--sampling-weights must be a dictionary"),
    ],
)
def test_a_setting_that_is_none(setting, message, texts):
    settings = {**vars(TranslationMultiSimpleEpochWithRoutingConfig()), "data": str(texts)}
    settings.update(several_languages.LANGUAGES, **setting)
    with pytest.raises(UserError, match=message):
        TranslationMultiSimpleEpochWithRoutingTask.setup_task(argparse.Namespace(**settings))


# No randomness, plain SGD, and routing losses as large as the rest: a step is a gradient.
STEP = {
    "optimizer": {"optimizer": "sgd", "lr": 1.0, "lr-scheduler": "fixed", "dropout": 0.0},
    "arch": {**MODEL, "router": "switch", "jitter-eps": 0, "attention-dropout": 0.0},
    "balance_weight": 1.0,
    "disable_validation": True,
    "no_epoch_checkpoints": True,
    "max_tokens": None,
    "max_update": 2,
    "curriculum": 1,  # one worker reads in one batch what two read in two
}


@pytest.mark.parametrize("router", ["language", pytest.param("switch", marks=pytest.mark.slow)])
def test_two_workers_take_the_steps_of_one(router, texts, tmp_path, server):
    settings = {**SETTINGS, **STEP}
    settings["arch"] = {**STEP["arch"], "router": router}
    data = texts / "data" / "bin"
    train_on_workers(server, data, tmp_path / "one", batch_size=8, **settings)
    train_on_workers(server, data, tmp_path / "two", "pytorch_ddp", 2, batch_size=4, **settings)
    one, two = (parameters(tmp_path / name / "checkpoint_last.pt") for name in ("one", "two"))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-5, msg=name)
