"""What training and evaluation leave in the folder of a run, written by hand; tables of these."""

import json
import random
import re
from datetime import datetime, timedelta
from pathlib import Path

from omegaconf import OmegaConf

from fairseq_sparsemixer import cli
from fairseq_sparsemixer.evaluation import scoring
from fairseq_sparsemixer.files import read_lines, sha256_of, write_json, write_lines

ROOT = Path(__file__).parents[2]
WORDS = (ROOT / "LICENSE").read_text().split()
REFERENCE = [" ".join(WORDS[i : i + 8]) for i in range(0, len(WORDS), 8)]
CURVE = {100: 8.0, 200: 6.0, 300: 5.0}
"""Validation nll after so many updates."""


class Log:
    """fairseq's log lines, as fairseq-hydra-train wrote them to a real hydra_train.log."""

    def __init__(self):
        self.lines = []
        self.now = datetime(2026, 11, 22, 23, 50, 0)

    def wait(self, seconds):
        self.now += timedelta(seconds=seconds)

    def add(self, logger, text, level="INFO"):
        # Three digits of milliseconds.
        time = self.now.strftime("%Y-%m-%d %H:%M:%S,%f")[:-3]
        self.lines.append(f"[{time}][{logger}][{level}] - {text}")

    def begin(self, updates=0):
        """A session up to its first update, from a checkpoint of ``updates``."""
        path = "runs/a/checkpoint_last.pt"
        self.add("fairseq_cli.train", "{'_name': None, 'common': {'_name': None, 'seed': 1}}")
        self.add("fairseq_cli.train", "SwitchTransformerModel(")
        self.lines.append("  (encoder): SwitchTransformerEncoder(")
        shared = "num. shared model params: 7,438,096 (num. trained: 7,438,096)"
        self.add("fairseq_cli.train", shared)
        self.add("fairseq_cli.train", "num. expert model params: 4 (num. trained: 4)")
        self.add("fairseq.trainer", f"Preparing to load checkpoint {path}")
        self.wait(3)
        if updates:
            self.add("fairseq.trainer", f"Loaded checkpoint {path} (epoch 1 @ {updates} updates)")
        else:
            self.add("fairseq.trainer", f"No existing checkpoint found {path}")
        self.add("fairseq.trainer", "loading train data for epoch 1")
        self.wait(4)

    def train(self):
        self.add("fairseq.trainer", "begin training epoch 1")
        self.add("fairseq_cli.train", "Start iterating over samples")

    def inner(self, updates, wps=2000.0):
        stats = {"epoch": 1, "update": 0.1, "loss": "9.5", "wps": f"{wps}", "clip": None}
        self.add("train_inner", json.dumps({**stats, "num_updates": str(updates), "wall": "9"}))

    def warn(self, updates, text):
        self.add("fairseq_sparsemixer.watchdogs", f"update {updates}: {text}", level="WARNING")

    def valid(self, updates, nll):
        self.add("fairseq_cli.train", 'begin validation on "valid" subset')
        stats = {"epoch": 1, "valid_loss": f"{nll + 1:.3f}", "valid_nll_loss": f"{nll:.3f}"}
        shares = {"valid_min_expert_share/encoder.0": "0.2"}
        numbers = {"valid_wps": "9", "valid_num_updates": str(updates)}
        self.add("valid", json.dumps({**stats, **shares, **numbers}))

    def save(self, updates, seconds=0.0):
        path = f"runs/a/checkpoint_1_{updates}.pt"
        utils = "fairseq.checkpoint_utils"
        self.add(utils, f"Preparing to save checkpoint for epoch 1 @ {updates} updates")
        self.add("fairseq.trainer", f"Saving checkpoint to {path}")
        self.wait(seconds)
        score = "score 4.1) (writing took 0.2 seconds)"
        self.add(utils, f"Saved checkpoint {path} (epoch 1 @ {updates} updates, {score}")

    def done(self):
        self.add("fairseq_cli.train", "done training in 502.2 seconds")

    def write(self, path):
        write_lines(path, self.lines)


def straight_log(curve=CURVE, seconds=0.6, ended=True):
    """A run that was never stopped; each update takes ``seconds``."""
    log = Log()
    log.begin()
    log.train()
    before = 0
    for updates, nll in curve.items():
        log.wait(seconds * (updates - before))
        before = updates
        log.inner(updates)
        log.valid(updates, nll)
    if ended:
        log.done()
    return log


def translations(keep, seed):
    """The reference with a share of ``keep`` of its words."""
    rng = random.Random(seed)
    return [" ".join(w for w in line.split() if rng.random() < keep) for line in REFERENCE]


def config(router="switch", experts=4, seed=1, max_update=300, **more):
    """hydra's config.yaml; ``more`` as ``{"model.jitter_eps": 0.2}``."""
    dense = {"model.encoder_moe_layers": "none", "model.decoder_moe_layers": "none"}
    settings = {
        "common.seed": seed,
        "common.user_dir": "/somewhere/fairseq_sparsemixer",
        "distributed_training.distributed_world_size": 1,
        "dataset.max_tokens": 800,
        "dataset.valid_subset": "valid",
        "optimization.max_update": max_update,
        "optimization.update_freq": [1],
        "optimization.lr": [0.002],
        "checkpoint.save_dir": "${hydra:runtime.output_dir}",
        "model._name": "switch_transformer_demo",
        "model.num_experts": experts,
        "model.router": "sparsemixer" if router == "dense" else router,
        "model.dropout": 0.1,
        "task._name": "translation",
        "task.data": "data/bin",
        "criterion._name": "label_smoothed_cross_entropy_with_routing",
        "criterion.balance_weight": 0.01,
        "bpe": None,
        **(dense if router == "dense" else {}),
        **more,
    }
    made = OmegaConf.create()
    for key, value in settings.items():
        OmegaConf.update(made, key, value, force_add=True)
    return made


def evaluation(folder, hypotheses, reference, name="evaluation/test.checkpoint_last", updates=300):
    """Write what ``fairseq-sparsemixer evaluate`` writes; its content."""
    path = folder / f"{name}.json"
    text = path.with_suffix(".de")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_lines(text, hypotheses)
    content = {
        "scores": scoring.score(hypotheses, read_lines(reference), "13a"),
        "hypotheses": str(text),
        "checkpoints": [
            {"name": "checkpoint_last.pt", "sha256": "0", "updates": updates, "averaged_from": []}
        ],
        "data": {
            "name": "test",
            "source_sha256": "1",
            "reference": str(reference),
            "reference_sha256": sha256_of(reference),
        },
        "generation": {"beam": 5, "lenpen": 1.0, "device": "cpu", "max_tokens": 4096},
    }
    write_json(path, content)
    return path, content


class Place:
    """Run folders, and ``fairseq-sparsemixer table`` over them."""

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
