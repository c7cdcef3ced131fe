"""A run that is killed, or out of space, and started again equals one that never was."""

import json
import random
import signal
from collections import Counter

import pytest
import torch
from support import commands, moments
from support.fork_server import ForkServer
from support.training import assert_same
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


@pytest.fixture(scope="module")
def server():
    with ForkServer() as server:
        yield server


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
        """What a run comes to: the names of its files, the last checkpoint, the log, and more."""
        state = commands.load(self.folder / "checkpoint_last.pt")
        return {
            "files": sorted(path.name for path in self.folder.glob("*.pt*")),
            "state": state,
            "log": logged(self.log.read_text()),
            "random": {path.name: path.read_text() for path in self.folder.glob("random.*")},
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


def same(one, other, place=""):
    """Assert that two values are equal, tensors bit for bit."""
    assert type(one) is type(other), place
    if isinstance(one, dict):
        assert one.keys() == other.keys(), place
        for key in one:
            same(one[key], other[key], f"{place}.{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), place
        for number, pair in enumerate(zip(one, other)):
            same(*pair, f"{place}[{number}]")
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other), place
    else:
        assert one == other or (one != one and other != other), place


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
