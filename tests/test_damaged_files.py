"""Files of JSON that are cut, empty or odd are told in one line that names them."""

import json
import math

import numpy as np
import pytest
from support.run_folders import straight_log

from fairseq_sparsemixer.errors import UserError
from fairseq_sparsemixer.evaluation import scored_text
from fairseq_sparsemixer.files import misfit, write_json, write_lines
from fairseq_sparsemixer.laboratory import gradients
from fairseq_sparsemixer.runs import folder, points, record
from fairseq_sparsemixer.runs.logs import read_log
from fairseq_sparsemixer.study import demo, engine, layout

CASE = [{"kind": "order", "estimator": "topk", "scales": [1], "bias": [0.5], "slope": 1.5}]
DEMO = {"settings": {"overrides": [], "configs": {}}, "finished": True}
RUN = {"settings": {"dataset": {}}, "tokens_per_update": 9, "data": {}, "starts": []}
STATE = {"finished_updates": 30, "overrides": ["a=1"], "beam": 4, "by_machine": []}
SCORE = {"bleu": 1.5, "signature": "s"}
FILES = {
    "run.json": (RUN, lambda path: record.read_record(path.parent)),
    "study.json": (STATE, lambda path: layout.read_run_state(path.parent)),
    "demo.json": (DEMO, lambda path: engine.read_state(path, demo._STATE)),
    "record.json": (
        {"test": {"sacrebleu": "wmt14/full"}, "copy_score": {"test": SCORE}},
        lambda path: scored_text._read_record(path.parent),
    ),
    "points.clock.json": ({"3": [1.0, None, 3]}, points.read_clocks),
    "gradients.json": (
        {"settings": {"seed": 1}, "cases": {"order of accuracy": CASE}},
        lambda path: gradients._read_results(path, {"seed": 1}),
    ),
}


def replaced(value):
    """``value`` with one part after the other in a kind that it never has."""
    entries = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in entries:
        for odd in ([[0]], 10**30) if isinstance(value, dict) else ({},):
            changed = value.copy()
            changed[key] = odd
            yield changed
        if isinstance(inner, (dict, list)):
            for each in replaced(inner):
                changed = value.copy()
                changed[key] = each
                yield changed


@pytest.mark.parametrize("name", FILES)
def test_records_that_are_damaged(name, tmp_path):
    content, read = FILES[name]
    path = tmp_path / name
    write_json(path, content)
    assert read(path)
    good = path.read_text()
    odd = map(json.dumps, replaced(content))
    for text in ("", good[: len(good) // 2], "[]", "7", "null", "[" * 100_000, "\0", *odd):
        path.write_text(text)
        with pytest.raises(UserError, match=rf"{path}.*: (remove|name|make)"):
            read(path)
    path.write_bytes(b'{"\xff": 1}')
    with pytest.raises(UserError, match=str(path)):
        read(path)


def test_evaluations_and_settings_of_runs(place):
    """In the folders that ``table`` and ``report`` read."""
    run = place.run("a")
    write_json(run / "run.json", {"gpus": [], "git": {"revision": "r", "dirty": False}})
    assert folder.read_run(run).evaluation
    settings = run / ".hydra" / "config.yaml"
    for path in (run / "evaluation" / "test.checkpoint_last.json", run / "run.json"):
        good = path.read_text()
        content = json.loads(good)
        for odd in replaced(content):
            if all(key in odd for key in content):
                path.write_text(json.dumps(odd))
                try:
                    found = folder.read_run(run)
                except UserError as error:
                    assert path.name in str(error)
                else:
                    assert found.scores["bleu"]["score"] and found.parameters
        path.write_text(good)
    deep = "a: " + "[" * 5000 + "]" * 5000
    for text in ("common: 3", "common: {seed: x}\noptimization: {}", deep, "a: ${", "a: [", "\0"):
        settings.write_text(text)
        with pytest.raises(UserError, match=r"config\.yaml.*leave its folder out of RUN"):
            folder.read_run(run)


def test_points_that_are_damaged(tmp_path):
    path = tmp_path / points.FILE
    good = {"updates": 1, "seconds": None, "loss": 2.0, "nll_loss": math.nan, "layers": {}}
    write_lines(path, [json.dumps(good)])
    assert points.read_points(path)
    for key in good:
        for odd in ({**good, key: "odd"}, {k: good[k] for k in good if k != key}):
            write_lines(path, map(json.dumps, (good, odd)))
            with pytest.raises(UserError, match=rf"jsonl \(.*{key}.* in line 2\): remove it"):
                points.read_points(path)


def test_points_of_a_training_that_diverged_are_kept(tmp_path):
    path = tmp_path / points.FILE
    layer = {"load": [1.0, math.nan], "entropy": math.inf, "drift": None}
    point = {"updates": 1, "seconds": 1.0, "loss": math.nan, "nll_loss": None}
    points.add_point(path, {**point, "layers": {"encoder.0": layer}, "bleu": np.float64("nan")})
    (kept,) = points.read_points(path)
    assert (kept["loss"], kept["bleu"]) == (None, None)
    assert kept["layers"]["encoder.0"] == {"load": [1.0, None], "entropy": None, "drift": None}


def test_choices_that_are_damaged(tmp_path):
    path = tmp_path / points.FILE
    points.save_choices(path, 5, {"encoder.0": np.zeros((3, 1), np.int16)})
    assert points.load_choices(path, 6)["encoder.0"].shape == (3, 1)
    file = tmp_path / "points.5.npz"
    good = file.read_bytes()
    for content in (b"", b"PK", good[: len(good) // 2], b"x" * 9):
        file.write_bytes(content)
        with pytest.raises(UserError, match=r"points\.5\.npz .*: remove it \(the drift"):
            points.load_choices(path, 6)
    points.save_choices(path, 5, {"encoder.0": np.array(["a"], dtype=object)})
    with pytest.raises(UserError, match="remove it"):
        points.load_choices(path, 6)


def test_log_lines_of_other_programs(tmp_path):
    """They are no lines of training, as those that are cut."""
    log = straight_log()
    write_lines(tmp_path / "log", log.lines)
    good = read_log(tmp_path / "log")
    log.lines.pop()
    for logger in ("train_inner", "valid"):
        for text in ('{"loss": "1"}', "[]", "3", '{"num_updates": "x"}', "[" * 100_000):
            log.add(logger, text)
        updates = f"{'valid_' * (logger == 'valid')}num_updates"
        for value in ("nan", "inf", None, "7"):
            log.add(logger, json.dumps({updates: value}))
    log.lines.append("[2026-13-41 00:00:00,000][fairseq.trainer][INFO] - begin training epoch 1")
    log.done()
    write_lines(tmp_path / "log", log.lines)
    assert read_log(tmp_path / "log") == good


@pytest.mark.parametrize(
    ("value", "shape", "wrong"),
    [
        ({"a": 1}, {"a": int, "b?": str}, ""),
        ({}, {"a": int}, "there is no a"),
        ({"a": True}, {"a": int}, "its a is no whole number"),
        ({"a": 1 << 64}, {"a": float}, "its a is no number"),
        ({"a": 1, "z": None}, {"a": int, str: (str, None)}, ""),
        ({"a": [1, "x"]}, {"a": [float]}, "entry 1 of its a is no number"),
        ([], {}, "its content is no object"),
        ("x", (None, int), "its content is not null"),
        (0, bool, "its content is no true or false"),
    ],
)
def test_what_does_not_fit_a_shape_is_named(value, shape, wrong):
    assert misfit(value, shape) == wrong
