"""Runs with points and scores, real and written by hand, and reports of them."""

import json
import math
import shutil

import pytest
from omegaconf import OmegaConf

from fairseq_sparsemixer import cli
from fairseq_sparsemixer.files import read_lines, sha256_of, write_json, write_lines
from fairseq_sparsemixer.runs.folder import find_runs, read_run
from fairseq_sparsemixer.runs.grouping import group_runs
from support import commands
from support.run_folders import config, evaluation, straight_log

DOMAINS = ["ding", "travel & <food>"]
LAYERS = ("encoder.0", "decoder.0")
WARNED = "switch-4-seed2"
"""A run in whose log there is a warning."""
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
    layer = {
        "load": load,
        "entropy": 1.2,
        "drift": drift,
        "load_by_domain": {"ding": load, "travel": load[::-1]},
    }
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
    log = straight_log(curve or {20: 9.0, 40: 7.0, 60: 6.0})
    if name == WARNED:
        log.warn(40, "encoder.0, since update 20: expert 1 starves <&>")
    log.write(folder / "hydra_train.log")
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


def read_arms(*folders):
    """The arms of runs by name."""
    return {arm.name: arm for arm in group_runs(map(read_run, find_runs(folders)))}


def make_report(*arguments):
    """Run ``fairseq-sparsemixer report``."""
    assert cli.main(["report", *map(str, arguments)]) == 0
