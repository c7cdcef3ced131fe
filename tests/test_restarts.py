"""A run that is killed, or out of space, and started again equals one that never was."""

import json
import random
import signal
from collections import Counter

import pytest
from support import commands, moments
from support.training import assert_same, same
from support.wmt14 import TINY

from fairseq_sparsemixer.files import write_lines

UPDATES = 36
"""In four and a half epochs."""
CLOCKS = ("wps", "ups", "wall", "train_wall")
PLAIN = {
    "max_update": UPDATES,
    "save_interval_updates": 5,
    "keep_interval_updates": 2,
    "keep_last_epochs": 2,
    "keep_best_checkpoints": 2,
    "patience": 50,
    "log_interval": 3,
    "clip_norm": 1.0,
}
"""Nothing falls on the end of an epoch: not what is saved, not what is logged."""
ROUTERS = {
    "switch": {},
    "sparsemixer": {"update_freq": 2, "max_tokens": 200},
    "sparsemixer-cv": {"balance_bias_rate": 0.01},
    "sparsemixer-v2": {"top_k": 2, "encoder_layerdrop": 0.2, "store_ema": None},
    "default-moe": {"balance_bias_rate": 0.01, "workers": 2, "max_tokens": 200},
    "gshard": {"top_k": 2, "workers": 2, "max_tokens": 200},
}
"""Six configurations: a router, further settings, and how many workers there are."""


class PlainRun:
    """A run of ``fairseq-train --user-dir`` in a folder of its own, started again and again."""

    def __init__(self, server, folder, data, router, workers=1, **settings):
        self.server = server
        self.folder = folder
        self.log = folder / "log"
        folder.mkdir()
        settings = {"router": router, **PLAIN, **settings}
        arch = {**commands.SIZE, "encoder-layers": 1, "decoder-layers": 1}
        self.commands = []
        for rank in range(workers):
            distributed = {
                "ddp_backend": "legacy_ddp",
                "distributed_world_size": workers,
                "distributed_init_method": f"file://{folder}/rendezvous",
                "distributed_no_spawn": True,
                "distributed_backend": "gloo",
                "distributed_rank": rank,
            }
            more = {**settings, **(distributed if workers > 1 else {})}
            flags = commands.train_command(data, folder, arch=arch, **more)
            self.commands.append(["fairseq_cli.train", *flags])

    def start(self, moment):
        """Train until the moment, or the end; whether it was the end."""
        (self.folder / "rendezvous").unlink(missing_ok=True)
        environment = {moments.OWN: self.describe(moment)}
        statuses = self.server.run(*self.commands, output=self.log, environment=environment)
        return self.check(statuses, moment)

    def describe(self, moment):
        files = self.folder.glob("checkpoint*.pt")
        size = max((path.stat().st_size for path in files), default=100_000)
        random_file = str(self.folder / "random")
        return json.dumps({**moment, "file_bytes": size, "random_file": random_file})

    def check(self, statuses, moment):
        if moment["kind"].startswith("full") and any(statuses):
            tail = self.log.read_text().splitlines()[-100:]
            errors = [line for line in tail if "error: cannot write " in line]
            assert errors and "(File too large)" in errors[-1], tail[-30:]
        elif any(statuses):
            assert -signal.SIGKILL in statuses, self.log.read_text()[-3000:]
        return not any(statuses)

    def found(self):
        """Names of files, the last checkpoint, the log, random state after the last update."""
        state = commands.load(self.folder / "checkpoint_last.pt")
        return {
            "files": sorted(path.name for path in self.folder.glob("*.pt*")),
            "state": state,
            "log": logged(self.log.read_text()),
            "random": {path.name: path.read_text() for path in self.folder.glob("random.[0-9]")},
        }


class LaunchedRun(PlainRun):
    """The same of ``fairseq-sparsemixer train``, whose training process is what ends."""

    def __init__(self, server, folder, data, router, workers=1, **settings):
        self.server = server
        self.folder = folder / f"{router}-4-seed1"
        self.log = self.folder / "train.log"
        folder.mkdir()
        if "update_freq" in settings:
            settings["update_freq"] = f"[{settings['update_freq']}]"
        prefixes = {"update_freq": "optimization.", "max_tokens": "dataset."}
        prefixes["encoder_layerdrop"] = "+model."
        overrides = [
            *TINY,
            "optimization.update_freq=[1]",
            "dataset.max_tokens=400",
            *(
                f"{prefixes.get(key, 'model.')}{key}={value}"
                for key, value in settings.items()
                if value is not None
            ),
            f"task.data={data}",
            f"optimization.max_update={UPDATES}",
            "checkpoint.save_interval_updates=5",
            "common.log_interval=3",
        ]
        what = ["--router", router, "--experts", 4]
        self.commands = [["fairseq_sparsemixer.cli", "train", "--runs", folder, *what, *overrides]]
        write_lines(
            folder / "path" / "sitecustomize.py",
            ["from support import moments", "moments.install(moments.OF_CHILD)"],
        )
        self.path = f"{folder / 'path'}:{commands.PACKAGE.parent}:{commands.PACKAGE.parent}/tests"
        self.printed = folder / "printed"

    def start(self, moment):
        environment = {moments.OF_CHILD: self.describe(moment), "PYTHONPATH": self.path}
        statuses = self.server.run(*self.commands, output=self.printed, environment=environment)
        assert statuses in ([0], [2]), self.printed.read_text()[-3000:]
        if moment["kind"].startswith("full") and any(statuses):
            assert "cannot write" in self.log.read_text()[-3000:]
        return statuses == [0]


def logged(text):
    """What was logged, the last of what was logged again: {(tag, updates): values}."""
    found = {}
    for line in text.splitlines():
        for tag in ("train_inner", "valid", "train"):
            if line.endswith("}") and (f"| {tag} |" in line or f"[{tag}]" in line):
                (entry,) = commands.logged(line, tag)
                found[tag, entry["num_updates"]] = commands.without_clock(entry)
    return found


def assert_equal_runs(run, whole):
    """Weights, optimiser, what is learnt without gradient, random numbers, logs and files."""
    states = [each.pop("state") for each in (run, whole)]
    for state in states:
        state["optimizer_history"] = state["optimizer_history"][-1:]  # one for each start
        state.pop("cfg")  # where it is
        extra = state["extra_state"]
        extra.pop("previous_training_time")
        extra.pop("metrics")  # with clocks; what they come to is in the log
    assert_same(states[0]["model"], states[1]["model"])
    same(*states)
    same(run, whole)


def kill_and_compare(kind, server, tmp_path, data, router, ends):
    """End a run at each of the moments; further runs where it reaches its end before the last.

    Returns:
        How often a process ended at each kind of moment.
    """
    settings = ROUTERS[router]
    whole = kind(server, tmp_path / "whole", data, router, **settings)
    assert whole.start(moments.NEVER)
    counts, number = Counter(), 0
    ends = list(ends)
    while ends:
        run = kind(server, tmp_path / f"stopped{number}", data, router, **settings)
        number += 1
        finished = False
        while ends and not finished:
            finished = run.start(ends[0])
            if not finished:
                counts[ends.pop(0)["kind"]] += 1
        assert not ends or number < 10, f"{ends[0]} does not come"
        if not finished:
            assert run.start(moments.NEVER)
        assert_equal_runs(run.found(), whole.found())
    return counts


@pytest.mark.slow
@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("kind", [PlainRun, LaunchedRun])
def test_a_run_that_is_killed_at_twenty_random_moments(kind, router, server, tmp_path, toy_corpus):
    rng = random.Random(f"{kind.__name__} {router}")
    drawn = [moments.draw(rng) for _ in range(20)]
    counts = kill_and_compare(kind, server, tmp_path, toy_corpus / "joined", router, drawn)
    print(kind.__name__, router, dict(counts))
    assert sum(counts.values()) == 20


def test_a_run_that_is_killed_in_a_later_epoch(server, tmp_path, toy_corpus):
    ends = [
        {"kind": "step", "count": 24, "share": 0.5},
        {"kind": "full copying", "count": 1, "share": 0.5},
        {"kind": "copying", "count": 2, "share": 0.3},
        {"kind": "saving", "count": 1, "share": 0.7},
    ]
    data = toy_corpus / "joined"
    counts = kill_and_compare(PlainRun, server, tmp_path, data, "default-moe", ends)
    assert sum(counts.values()) == len(ends)


def updates_of(folder):
    return commands.load(folder / "checkpoint_last.pt")["optimizer_history"][-1]["num_updates"]


@pytest.mark.parametrize(
    "limit", [{"max_update": 5}, {"patience": 1, "lr": 0.0}, {"stop_time_hours": 1e-6}]
)
def test_a_finished_run_does_not_train_on(limit, server, tmp_path, toy_corpus):
    run = PlainRun(server, tmp_path / "run", toy_corpus / "joined", "switch", **limit)
    assert run.start(moments.NEVER)
    before = run.found()
    assert run.start(moments.NEVER)
    assert "nothing is left to train: " in run.log.read_text()
    assert run.log.read_text().count("done training in") == 2
    same(run.found()["state"], before["state"])
    assert run.found()["log"] == before["log"]


def test_patience_is_that_of_the_whole_run(server, tmp_path, toy_corpus):
    """No validation is better than the first: the third of them ends the run, whoever makes it."""
    settings = {"lr": 0.0, "patience": 2, "save_interval_updates": 4}
    run = PlainRun(server, tmp_path / "run", toy_corpus / "joined", "switch", **settings)
    # Killed after the second validation is saved.
    assert not run.start({"kind": "step", "count": 9, "share": 0.0})
    assert updates_of(run.folder) == 8
    assert run.start(moments.NEVER)
    assert "hasn't improved for last 2 runs" in run.log.read_text()
    assert updates_of(run.folder) == 12


def test_a_rate_that_goes_by_validations_is_resumed(server, tmp_path, toy_corpus):
    """From the end of an epoch, before whose checkpoint fairseq does not tell the schedule."""
    settings = {
        "lr_scheduler": "reduce_lr_on_plateau",
        "warmup_updates": None,
        "lr_shrink": 0.5,
        "lr_threshold": 0.9,
        "save_interval_updates": None,
    }
    whole, run = (
        PlainRun(server, tmp_path / name, toy_corpus / "joined", "switch", **settings)
        for name in ("whole", "run")
    )
    assert whole.start(moments.NEVER)
    assert not run.start({"kind": "step", "count": 20, "share": 0.0})
    assert run.start(moments.NEVER)
    assert_equal_runs(run.found(), whole.found())


TWO_RUNS = """
import sys
from fairseq_cli import train
for name in sys.argv.pop(1).split(","):
    arguments = [argument.replace("RUN", name) for argument in sys.argv]
    sys.argv, kept = arguments, sys.argv
    train.cli_main()
    sys.argv = kept
"""


def test_runs_of_one_process_leave_each_other_alone(tmp_path, toy_corpus):
    """Early stopping, TensorBoard's writers and files of the log, as in a sweep of hydra."""
    settings = {
        **{"lr": 0.0, "patience": 2, "max_update": 50, "save_interval_updates": 2},
        "tensorboard_logdir": tmp_path / "RUN" / "tensorboard",
        "log_file": tmp_path / "RUN.log",
    }
    arguments = commands.train_command(toy_corpus / "joined", tmp_path / "RUN", **settings)
    script = tmp_path / "two_runs.py"
    script.write_text(TWO_RUNS)
    (result,) = commands.finish(commands.start(script, "first,second", *arguments))
    commands.checked(result)
    shown = [
        commands.events(tmp_path / run / "tensorboard" / "valid") for run in ("first", "second")
    ]
    assert [step for step, _ in shown[0]["loss"]] == [2, 4, 6]
    assert shown[0]["loss"] == shown[1]["loss"]
    assert [updates_of(tmp_path / run) for run in ("first", "second")] == [6, 6]
    texts = [(tmp_path / f"{run}.log").read_text() for run in ("first", "second")]
    assert [text.count("done training in") for text in texts] == [1, 1]
