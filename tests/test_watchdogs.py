"""Watchdogs: what they say of trainings that were made to fail, and that they let others be."""

import json
import math
import runpy

import pytest
import torch
from fairseq.optim.dynamic_loss_scaler import DynamicLossScaler
from support import commands
from support.models import build
from support.report_study import point
from support.run_folders import Log
from support.training import LAYERS

from fairseq_sparsemixer.files import write_lines
from fairseq_sparsemixer.runs.logs import WARNING
from fairseq_sparsemixer.watchdogs import Layer, Watchdogs, router_gradients

HEALTHY = Layer([0.2, 0.3, 0.26, 0.24], 1.2, 0.02, 0.01)
STARVED = Layer([0.5, 0.0, 0.5, 0.001], 1.2, 0.02, 0.01)

# What is said when


def look(watchdogs, *layers, every=10):
    """{updates: warnings} of lines of the log; None is of a layer that did not run."""
    found = {}
    for number, layer in enumerate(layers, start=1):
        warnings = watchdogs.look(every * number, {} if layer is None else {"encoder.0": layer})
        if warnings:
            found[every * number] = warnings
    return found


def test_a_warning_says_where_since_when_and_what_to_try():
    found = look(Watchdogs(0.02, 20), HEALTHY, STARVED, STARVED, STARVED, STARVED)
    assert list(found) == [40], "20 updates after the line of update 20, and once"
    (warning,) = found[40]
    assert warning.startswith("encoder.0, since update 20: experts 1, 3 got less than 0.5 % ")
    assert "--balance-weight" in warning


def test_what_does_not_help_is_not_advised():
    (warning,) = look(Watchdogs(0.02, 10), *[STARVED._replace(balancing="")] * 2)[20]
    assert "--balance" not in warning and "try fewer --num-experts" in warning


def test_it_has_to_last():
    watchdogs = Watchdogs(0.02, 20)
    assert not look(watchdogs, STARVED, STARVED, HEALTHY, STARVED, STARVED, HEALTHY)
    again = look(Watchdogs(0.02, 10), STARVED, STARVED, HEALTHY, STARVED, STARVED)
    assert list(again) == [20, 50], "told again where it went away in between"


def test_one_line_is_not_enough_however_long():
    assert list(look(Watchdogs(0.02, 20), STARVED, STARVED, every=1000)) == [2000]


def test_a_line_without_the_layer_changes_nothing():
    assert list(look(Watchdogs(0.02, 20), STARVED, None, STARVED)) == [30]


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"entropy": 0.99 * 0.01 * math.log(4)}, "entropy"),
        ({"entropy": 1.01 * 0.01 * math.log(4)}, None),
        ({"part": 0.99e-5}, "learns nothing"),
        ({"part": 1.01e-5}, None),
        ({"gradient": 101.0}, "thrown about"),
        ({"gradient": 99.0}, None),
        ({"gradient": None, "part": None, "entropy": None}, None),
        ({"shares": [1.0], "entropy": 0.0, "part": 0.0}, None),
        ({"shares": [0.9847, 0.0051, 0.0051, 0.0051]}, None),
        ({"shares": [0.9853, 0.0049, 0.0049, 0.0049]}, "experts 1, 2, 3 got"),
    ],
)
def test_what_is_wrong_with_a_layer(changes, text):
    found = look(Watchdogs(0.02, 10), *[HEALTHY._replace(**changes)] * 2)
    if text is None:
        assert not found
    else:
        (warning,) = found[20]
        assert text in warning


def test_a_gradient_that_is_not_known_is_no_other_one():
    """LayerDrop may leave out the layer at just the update that is looked at."""
    vanished, unknown = (HEALTHY._replace(gradient=value, part=value) for value in (0.0, None))
    assert list(look(Watchdogs(0.02, 20), vanished, unknown, vanished)) == [30]
    assert not look(Watchdogs(0.02, 20), vanished, HEALTHY, vanished)


def test_gradients_of_flattened_parameters_are_not_known():
    """fully_sharded leaves views of them in the layers."""
    model = build()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    assert len(router_gradients(model)) == 4
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                delattr(module, name)
                setattr(module, name, parameter.view_as(parameter))
    assert router_gradients(model) == {}


def test_a_sinking_loss_scale():
    """fairseq's own scaler, whose gradients overflow again and again."""
    scaler, watchdogs, found = DynamicLossScaler(init_scale=128.0), Watchdogs(0.02, 500), {}
    for _ in range(17):
        with pytest.raises(OverflowError):
            scaler.check_overflow(math.inf)
        warnings = watchdogs.look_at_scale(scaler.loss_scale)
        if warnings:
            found[scaler.loss_scale] = warnings
    assert list(found) == [0.25, 0.25 / 256]
    assert found[0.25][0].startswith("the loss scale has sunk from 64 to 0.25: ")
    rising = Watchdogs(0.02, 500)
    assert not [w for n in range(40) for w in rising.look_at_scale(2.0 ** (n % 8))]


def test_logs_of_before_are_replayed(tmp_path):
    """The smallest share of a line stands for an expert."""
    log = Log()
    for updates in range(100, 1001, 100):
        line = {"num_updates": str(updates), "gnorm": "1.5", "router_gradient/encoder.0": "0.3"}
        line["router_entropy/encoder.0"] = "1.2"
        log.add("train_inner", json.dumps({**line, "min_expert_share/encoder.0": "0.004"}))
    log.write(tmp_path / "hydra_train.log")
    loads = [[0.5, 0.496, 0.004, 0.0], [0.5, 0.49, 0.01, 0.0]]
    points = [point(500 * n, 9.0, 1.0) for n in (1, 2)]
    for each, load in zip(points, loads):
        each["layers"] = {"encoder.0": {**each["layers"]["encoder.0"], "load": load}}
    write_lines(tmp_path / "points.jsonl", map(json.dumps, points))
    script = runpy.run_path(str(commands.PACKAGE.parent / "scripts" / "replay_watchdogs.py"))
    (found,) = script["replay"](tmp_path)
    assert (found["longest"], found["since"], found["updates"]) == (900, 100, 1000)
    assert found["starved_at_points"] == [2, 1] and found["came_back"] == 1
    assert found["least_gradient"] == pytest.approx(0.2)
    assert found["warnings"] == ["encoder.0, since update 100"]


# Training

WORKERS = {
    "ddp_backend": "legacy_ddp",
    "distributed_world_size": 2,
    "distributed_no_spawn": True,
    "distributed_backend": "gloo",
    "max_tokens": 200,
}


@pytest.fixture
def train(server, toy_corpus, tmp_path):
    """Train a small model; (exit status, output, its warnings as (updates, text))."""

    def run(save_dir="run", prelude="", updates=20, router="switch", workers=1, **settings):
        user_dir = tmp_path / "user"
        user_dir.mkdir(exist_ok=True)
        (user_dir / "__init__.py").write_text(f"import fairseq_sparsemixer\n{prelude}")
        if workers > 1:
            settings.update(WORKERS, distributed_init_method=f"file://{tmp_path}/rendezvous")
        words = commands.train_command(
            toy_corpus / "joined",
            tmp_path / save_dir,
            arch={**commands.SIZE, "encoder-layers": 1, "decoder-layers": 1, "router": router},
            **{"user_dir": user_dir, "max_update": updates, "log_interval": 2, **settings},
            watchdog_updates=10,
        )
        log = tmp_path / "log"
        log.unlink(missing_ok=True)
        ranks = [["--distributed-rank", rank] if workers > 1 else [] for rank in range(workers)]
        processes = [["fairseq_cli.train", *words, *rank] for rank in ranks]
        status = max(map(abs, server.run(*processes, output=log)))
        output = log.read_text()
        lines = [
            line for line in output.splitlines() if "| fairseq_sparsemixer.watchdogs |" in line
        ]
        assert all("| WARNING |" in line for line in lines)
        found = [WARNING.search(line).groups() for line in lines]
        return status, output, [(int(updates), text) for updates, text in found]

    return run


BIASED = """
from fairseq_sparsemixer.moe import Router
begin = Router.reset_parameters
def reset_parameters(self):
    begin(self)
    self.bias.data[0] += 30
Router.reset_parameters = reset_parameters
"""
"""All tokens go to expert 0."""
DETACHED = """
from fairseq_sparsemixer.moe import Router
logits = Router.logits
Router.logits = lambda self, x_TD: logits(self, x_TD).detach()
"""
"""A router of one's own that does not learn."""
SINKING = """
from fairseq.logging import metrics
from fairseq.tasks import FairseqTask
step = FairseqTask.train_step
def train_step(self, sample, model, criterion, optimizer, update_num, *args, **kwargs):
    metrics.log_scalar("loss_scale", 128 / 2**min(update_num, 9), weight=0)
    return step(self, sample, model, criterion, optimizer, update_num, *args, **kwargs)
FairseqTask.train_step = train_step
"""
"""As fairseq logs it of fp16, which needs a GPU."""


def test_a_normal_run_is_silent_and_logs_the_gradients(train, tmp_path):
    board = tmp_path / "board"
    status, output, warnings = train(router="sparsemixer", updates=24, tensorboard_logdir=board)
    assert (status, warnings) == (0, [])
    for entry in commands.logged(output, "train_inner"):
        norms = [entry[f"router_gradient/{layer}"] for layer in LAYERS]
        assert all(0 < norm < entry["gnorm"] for norm in norms)
    shown = commands.events(board / "train_inner")["router_gradient/encoder.0"]
    assert [updates for updates, _ in shown] == list(range(2, 25, 2))


def told(warnings, text):
    """When, and of which layers, what was said."""
    return sorted((n, said.split(",")[0]) for n, said in warnings if text in said)


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_starved_experts(train, workers):
    status, _, warnings = train(prelude=BIASED, balance_weight=0, workers=workers)
    assert status == 0
    assert len(set(warnings)) == len(warnings), "each once, however many workers"
    assert told(warnings, "experts 1, 2, 3 got less than 0.5 %") == [
        (12, "decoder.0"),
        (12, "encoder.0"),
    ]


@pytest.mark.slow
def test_a_collapsed_entropy(train):
    _, _, warnings = train(router_init_scale=1000, updates=14)
    assert told(warnings, "entropy is below") == [(12, "decoder.0"), (12, "encoder.0")]


@pytest.mark.slow
def test_a_vanished_gradient(train):
    _, _, warnings = train(prelude=DETACHED, balance_weight=0, updates=14)
    assert told(warnings, "learns nothing") == [(12, "decoder.0"), (12, "encoder.0")]


@pytest.mark.slow
def test_an_exploded_gradient(train):
    _, _, warnings = train(balance_weight=0, z_loss_weight=5000, lr=1e-6, updates=14)
    assert warnings == [(n, said) for n, said in warnings if "thrown about" in said]
    assert told(warnings, "thrown about") == [(12, "decoder.0"), (12, "encoder.0")]


@pytest.mark.slow
def test_a_sunk_loss_scale(train):
    _, _, warnings = train(prelude=SINKING, updates=12)
    assert told(warnings, "sunk from 128 to 0.5") == [
        (9, "the loss scale has sunk from 128 to 0.5: gradients overflow again and again")
    ]


@pytest.mark.slow
def test_stop_and_going_on(train, tmp_path):
    """The next start has as long to get better, and other runs of a process know nothing of it."""
    settings = {"prelude": BIASED, "balance_weight": 0, "save_interval_updates": 4}
    status, output, warnings = train(watchdogs="stop", **settings)
    assert status != 0 and {n for n, _ in warnings} == {12}
    assert "error: --watchdogs stop: " in output and "Traceback" not in output
    _, output, warnings = train(updates=16, **settings)
    assert "Loaded checkpoint" in output and not warnings, "updates 9 to 16 are less than 10"
    _, _, warnings = train(save_dir="off", watchdogs="off", **settings)
    assert not warnings
