"""Training with experts that are spread over workers is training with all of them in one place."""

import copy
import json
import random
import shutil
import signal
from types import SimpleNamespace

import pytest
import torch
from fairseq import checkpoint_utils, options
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.trainer import Trainer
from omegaconf import OmegaConf
from support import commands, models, spread_training
from support.training import assert_same, same

from fairseq_sparsemixer.models.config import ConfigError
from fairseq_sparsemixer.moe.feed_forward import moe_layers

TOTAL = 12
"""Sentences of an update, on however many workers; 400 are 33 updates, and one of 4 sentences."""
SGD = {"optimizer": "sgd", "lr": 0.5, "lr-scheduler": "fixed", "dropout": 0.0}
# Gradients that are 0 but for rounding, as of the keys' bias, would make whole steps.
ADAM = {**commands.ADAM, "dropout": 0.0, "lr": 0.002, "adam-eps": 1e-4}
EXACT = {
    "balance_weight": 1.0,
    "z_loss_weight": 0.1,
    "share_all_embeddings": True,
    "curriculum": 1000,  # batches in the order in which they are cut
    "max_tokens": None,
    "clip_norm": 1.0,
    "disable_validation": True,
    "no_epoch_checkpoints": True,
}
SMALL = {"arch": {"encoder-layers": 1, "decoder-layers": 1, "moe-every": 1}}
AVERAGE = {"store_ema": True, "ema_decay": 0.5, "ema_fp32": True}


class Runs:
    """Trains, each in a folder of its own."""

    def __init__(self, server, data, folder):
        self.server = server
        self.data = data
        self.folder = folder
        self.updates = {}

    def start(self, folder, workers, fault=None, patience=60, **settings):
        """Exit statuses of the workers, and what they printed."""
        folder.mkdir(exist_ok=True)
        (folder / "rendezvous").unlink(missing_ok=True)
        started = spread_training.command(self.data, folder, workers, **settings)
        environment = {spread_training.FAULT: json.dumps(fault)} if fault else {}
        log = folder / "log"
        statuses = self.server.run(*started, output=log, environment=environment, patience=patience)
        return statuses, log.read_text()

    def train(self, name, workers=1, **settings):
        """Train to a good end; the folder."""
        folder = self.folder / name
        settings = {**EXACT, "batch_size": TOTAL // workers, **settings}
        statuses, log = self.start(folder, workers, **settings)
        assert statuses == [0] * workers, log[-3000:]
        return folder

    def recorded(self, name, workers=1, size=1, **settings):
        """Updates as in one process: what is logged, losses, norms and all gradients."""
        if name in self.updates:
            return self.updates[name]
        record = self.folder / f"{name}.updates"
        folder = self.train(name, workers, size=size, record=record, **settings)
        entries = commands.logged((folder / "log").read_text(), "train_inner")
        each = [torch.load(f"{record}.{rank}") for rank in range(workers)]
        assert len(entries) == len(each[0])
        self.updates[name] = [
            {**joined(updates, size), "logged": commands.without_clock(entry)}
            for entry, *updates in zip(entries, *each)
        ]
        return self.updates[name]


def joined(updates, size):
    """One update of all workers, which must agree on what they share."""
    first = updates[0]
    for one in updates:
        assert one["norm"] == first["norm"]
        assert one["loss"] == pytest.approx(first["loss"], rel=1e-6)
        for name, gradient in one["gradients"].items():
            if ".experts." not in name:
                assert torch.equal(gradient, first["gradients"][name]), name
    gradients = dict(first["gradients"])
    for name in gradients:
        if ".experts." in name:
            parts = [one["gradients"][name] for one in updates]
            groups = [torch.cat(parts[i : i + size]) for i in range(0, len(parts), size)]
            assert all(torch.equal(group, groups[0]) for group in groups)
            gradients[name] = groups[0]
    return {**first, "gradients": gradients}


@pytest.fixture(scope="session")
def runs(server, toy_corpus, tmp_path_factory):
    return Runs(server, toy_corpus / "joined", tmp_path_factory.mktemp("spread"))


def assert_same_updates(actual, expected):
    assert len(actual) == len(expected)
    for one, whole in zip(actual, expected):
        assert one["logged"] == pytest.approx(whole["logged"], rel=1e-3, abs=1e-3)
        assert one["loss"] == pytest.approx(whole["loss"], rel=1e-5)
        assert float(one["norm"]) == pytest.approx(float(whole["norm"]), rel=1e-5)
        assert one["gradients"].keys() == whole["gradients"].keys()
        for name, gradient in whole["gradients"].items():
            error = (one["gradients"][name] - gradient).abs().max()
            assert error <= 1e-5 * gradient.abs().max() + 1e-7 * whole["norm"], name


def assert_close(actual, expected, tolerance=1e-4):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        error = (actual[name].float() - value.float()).abs().max()
        assert error <= tolerance * value.float().abs().max() + 1e-8, name


@pytest.mark.parametrize(
    ("workers", "size", "optimizer", "updates", "router"),
    [
        (4, 2, SGD, 4, "switch"),
        *(
            pytest.param(workers, size, optimizer, 50, "switch", marks=pytest.mark.slow)
            for optimizer in (SGD, ADAM)
            for workers, size in ((2, 1), (4, 1), (2, 2), (4, 2), (4, 4))
        ),
        pytest.param(4, 2, SGD, 50, "sparsemixer", marks=pytest.mark.slow),  # drawn by token
        pytest.param(2, 2, ADAM, 50, "sparsemixer", marks=pytest.mark.slow),
    ],
)
def test_workers_make_the_updates_of_one_process(workers, size, optimizer, updates, router, runs):
    """Clipped, and with workers that have no batch at the end of an epoch."""
    settings = {"optimizer": optimizer, "max_update": updates}
    if router == "sparsemixer":
        settings["arch"] = {"router": router, "jitter-eps": 0.3}
    if updates == 4:
        settings["train_subset"] = "valid"  # 29 sentences: the third update has 5
    whole = f"{router}-{optimizer['optimizer']}-{updates}"
    name = f"{whole}-{workers}-{size}"
    expected = runs.recorded(whole, **settings)
    actual = runs.recorded(name, workers, size, **settings)
    assert float(expected[0]["norm"]) > EXACT["clip_norm"]
    steps = 5 if optimizer is SGD else 1  # later ones begin from weights that differ a little
    assert_same_updates(actual[:steps], expected[:steps])
    files = [runs.folder / each / "checkpoint_last.pt" for each in (name, whole)]
    assert_close(*map(commands.parameters, files))


# Checkpoints


@pytest.fixture(scope="module")
def on_four(runs):
    """Six updates by four workers that share the experts."""
    return runs.train("on_four", 4, size=4, optimizer=ADAM, max_update=6, **AVERAGE, **SMALL)


def test_the_file_is_that_of_one_process(on_four, runs):
    whole = commands.load(
        runs.train("alone", optimizer=ADAM, max_update=6, **AVERAGE, **SMALL) / "checkpoint_last.pt"
    )
    state = commands.load(on_four / "checkpoint_last.pt")
    assert [path.name for path in on_four.glob("*.pt*")] == ["checkpoint_last.pt"]
    assert_close(state["model"], whole["model"])
    for average in ("ema", "ema_fp32_params"):
        assert_close(*(each["extra_state"][average] for each in (state, whole)))
    optimizers = [each["last_optimizer_state"] for each in (state, whole)]
    assert optimizers[0]["param_groups"] == optimizers[1]["param_groups"]
    assert optimizers[0]["state"].keys() == optimizers[1]["state"].keys()
    for moments, expected in zip(*(each["state"].values() for each in optimizers)):
        assert moments.pop("step") == expected.pop("step")
        assert_close(moments, expected, 1e-3)


@pytest.mark.parametrize(
    ("workers", "size"),
    [(2, 2), *(pytest.param(*each, marks=pytest.mark.slow) for each in ((4, 2), (1, 1)))],
)
def test_what_is_read_is_written_again_bit_by_bit(workers, size, on_four, runs):
    record = runs.folder / f"again-{workers}"
    runs.train(
        record.name,
        workers,
        size=size,
        record=record,
        restore_file=on_four / "checkpoint_last.pt",
        optimizer=ADAM,
        max_update=7,
        **AVERAGE,
        **SMALL,
    )
    (file,) = record.with_suffix(".again").glob("*.pt")
    again, before = (commands.load(path) for path in (file, on_four / "checkpoint_last.pt"))
    assert_same(again["model"], before["model"])
    same(again["last_optimizer_state"], before["last_optimizer_state"])
    for average in ("ema", "ema_fp32_params"):
        assert_same(*(each["extra_state"][average] for each in (again, before)))


def test_training_goes_on_with_fewer_workers(on_four, runs):
    """Four workers, then two, then one: as one process, which also validates."""
    folder = shutil.copytree(on_four, runs.folder / "fewer")
    whole = runs.folder / "alone to the end"
    for workers, updates in ((2, 9), (1, 12)):
        settings = {"max_update": updates, "optimizer": ADAM, **AVERAGE, **SMALL}
        runs.train(folder.name, workers, size=workers, **settings)
        runs.train(whole.name, **settings)
        losses = [validation_loss(each / "checkpoint_last.pt") for each in (folder, whole)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def validation_loss(path):
    """Of a token, by one process."""
    (model,), cfg, task = checkpoint_utils.load_model_ensemble_and_task([str(path)])
    task.load_dataset("valid")
    criterion = task.build_criterion(cfg.criterion)
    batches = task.get_batch_iterator(task.dataset("valid"), max_sentences=10).next_epoch_itr()
    outputs = [task.valid_step(batch, model.eval(), criterion)[2] for batch in batches]
    return float(sum(o["nll_loss"] for o in outputs)) / sum(o["ntokens"] for o in outputs)


def test_a_model_is_read_without_a_flag(on_four, tmp_path):
    """Also where there are workers, as in a validation by several."""
    path = on_four / "checkpoint_last.pt"
    torch.distributed.init_process_group(
        "gloo", f"file://{tmp_path / 'meet'}", rank=0, world_size=1
    )
    try:
        (model,), cfg, _ = checkpoint_utils.load_model_ensemble_and_task([str(path)])
    finally:
        torch.distributed.destroy_process_group()
    assert cfg.model.expert_parallel_size == 4
    assert all(layer.experts.num_experts == 4 for layer in moe_layers(model))
    assert_same(model.state_dict(), commands.parameters(path))


def test_it_is_averaged(on_four, tmp_path):
    path = on_four / "checkpoint_last.pt"
    commands.command("average", "--inputs", path, path, "--output", tmp_path / "average.pt")
    assert_close(commands.parameters(tmp_path / "average.pt"), commands.parameters(path), 1e-6)


# What fairseq can do besides


OTHERS = {
    "mixed": {
        "arch": {"router": "default-moe", "balance-bias-rate": 0.01},
        "checkpoint_activations": True,
        "disable_validation": None,
        "task": "translation_with_routing",
    },
    "two of four": {"arch": {"router": "topk", "top-k": 2}, "update_freq": 2},
}


@pytest.mark.parametrize("name", ["mixed", pytest.param("two of four", marks=pytest.mark.slow)])
def test_what_else_training_does_is_that_of_one_process(name, runs):
    """Balance bias and running means, activation checkpointing, validation; micro-batches."""
    settings = {**OTHERS[name], "optimizer": SGD, "max_update": 3}
    settings["arch"] = {**SMALL["arch"], **settings["arch"]}
    settings["batch_size"] = 3
    whole = dict(settings, batch_size=6)
    files = [
        runs.train(f"{name} of {workers}", workers, size=size, **each) / "checkpoint_last.pt"
        for workers, size, each in ((1, 1, whole), (2, 2, settings))
    ]
    assert_close(*map(commands.parameters, files))


def test_layers_are_left_out_together(runs):
    """On a CPU dropout uses up random numbers of the generator that LayerDrop draws from."""
    settings = {"encoder_layerdrop": 0.5, "decoder_layerdrop": 0.5, "dropout": 0.1}
    optimizer = {**SGD, "dropout": 0.1}
    runs.train("layerdrop", 2, size=2, max_update=8, optimizer=optimizer, **settings)


@pytest.mark.slow
def test_half_precision(runs):
    """On a CPU fairseq has no bf16."""
    settings = {"fp16": True, "fp16_no_flatten_grads": True, "max_update": 3, **SMALL}
    expected, actual = (
        runs.recorded(f"fp16-{size}", size, size, optimizer=ADAM, **settings) for size in (1, 2)
    )
    for one, whole in zip(actual, expected):
        assert one["loss"] == pytest.approx(whole["loss"], rel=2e-2)
        assert float(one["norm"]) == pytest.approx(float(whole["norm"]), rel=5e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("half", [{}, {"fp16": True, "fp16_no_flatten_grads": True}])
def test_two_workers_share_a_gpu(half, runs):
    """By gloo, over the host: NCCL takes a GPU for each."""
    settings = {"cpu": None, "max_update": 3, "optimizer": ADAM, **half, **SMALL}
    expected, actual = (
        runs.recorded(f"gpu-{bool(half)}-{size}", size, size, **settings) for size in (1, 2)
    )
    for one, whole in zip(actual, expected):
        assert one["loss"] == pytest.approx(whole["loss"], rel=2e-2 if half else 1e-3)
        assert float(one["norm"]) == pytest.approx(float(whole["norm"]), rel=5e-2 if half else 1e-2)


# Settings


@pytest.fixture(scope="module")
def settings():
    """Of a training that is not refused."""
    arch = {**commands.SIZE, "expert-parallel-size": 2}
    command = commands.train_command(
        "data", "run", arch=arch, distributed_world_size=4, ddp_backend="legacy_ddp"
    )
    parser = options.get_training_parser()
    return convert_namespace_to_omegaconf(options.parse_args_and_arch(parser, [*map(str, command)]))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("distributed_training.distributed_world_size", 3, r"\(2\) must divide .* workers \(3\)"),
        ("distributed_training.distributed_world_size", 1, r"\(2\) must divide .* workers \(1\)"),
        ("distributed_training.ddp_backend", "fully_sharded", "fully_sharded: choose legacy_ddp"),
        ("distributed_training.ddp_backend", "slowmo", "--ddp-backend slowmo: choose legacy_ddp"),
        ("optimization.use_bmuf", True, "--use-bmuf: leave"),
        ("distributed_training.zero_sharding", "os", "--zero-sharding: leave"),
        ("common.amp", True, "--amp: choose --bf16 or --fp16"),
        ("common.fp16", True, "--fp16 with gradients in one piece: add --fp16-no-flatten-grads"),
        ("optimizer._name", "adafactor", "--optimizer adafactor: choose from adam, "),
        ("task.eval_bleu", True, "--eval-bleu: "),
    ],
)
def test_what_would_be_wrong_is_refused(key, value, message, settings):
    settings = copy.deepcopy(settings)
    OmegaConf.update(settings, key, value)
    with pytest.raises(ConfigError, match=message):
        Trainer(settings, SimpleNamespace(cfg=settings.task), None, None)


def test_groups_hold_as_many_experts_each():
    with pytest.raises(ConfigError, match=r"-size \(3\) must divide --num-experts \(4\)"):
        models.build(num_experts=4, expert_parallel_size=3)


# Failures


@pytest.mark.slow
def test_an_infinite_gradient_of_one_workers_expert_stops_all(runs):
    fault = {"kind": "infinite", "rank": 1, "count": 2}
    folder = runs.folder / "infinite"
    settings = {**EXACT, "batch_size": 6, "optimizer": SGD, "max_update": 4, **SMALL}
    statuses, log = runs.start(folder, 2, fault, size=2, **settings)
    assert statuses == [1, 1]
    assert log.count("gradients are Nan/Inf") >= 2
    assert not list(folder.glob("*.pt"))  # crash.pt would hold half of the experts


def test_an_overflow_in_one_workers_expert_leaves_out_the_update_on_all(runs):
    fault = {"kind": "infinite", "rank": 1, "count": 2}
    settings = {**EXACT, "batch_size": 6, "optimizer": ADAM, "max_update": 4, **SMALL}
    settings.update(fp16=True, fp16_no_flatten_grads=True)
    statuses, log = runs.start(runs.folder / "overflow", 2, fault, size=2, **settings)
    assert statuses == [0, 0], log[-3000:]
    assert log.count("gradient overflow detected") == 1  # as the first worker says


@pytest.mark.slow
def test_a_worker_without_memory_ends_all(runs):
    fault = {"kind": "memory", "rank": 1, "count": 9}
    settings = {**EXACT, "batch_size": 6, "optimizer": SGD, "max_update": 4, **SMALL}
    statuses, log = runs.start(runs.folder / "memory", 2, fault, size=2, **settings)
    assert statuses == [1, 1]
    assert "out of memory" in log


def test_a_worker_that_is_killed_ends_all_and_loses_nothing(runs):
    kill_and_resume(runs, "killed", [("exchange", 30, 1), ("saving", 2, 0)])


@pytest.mark.slow
@pytest.mark.parametrize("kind", spread_training.KINDS)
def test_workers_that_are_killed_twenty_times(kind, runs):
    rng = random.Random(kind)
    latest = {"step": 10, "exchange": 40, "gathering": 40, "saving": 4}[kind]
    ends = [
        (kind, rng.randint(1, latest), 0 if kind == "saving" else rng.randrange(2))
        for _ in range(20)
    ]
    kill_and_resume(runs, f"killed in {kind}", ends)


SECONDS = 60
"""Within which the other workers have ended: they find the connection closed, or wait for none."""


def kill_and_resume(runs, name, ends):
    """Kill a worker again and again; what was saved is whole, and the run that of one start."""
    settings = {**EXACT, "optimizer": ADAM, "save_interval_updates": 3, "keep_interval_updates": 2}
    settings.update(SMALL, max_update=13, batch_size=6, size=2, patience=SECONDS)
    rng = random.Random(name)
    number, most = 0, len(ends) + 5
    while ends:
        number += 1
        folder = runs.folder / f"{name} {number}"
        killed = True
        while ends and killed:
            kind, count, rank = ends[0]
            delay = rng.choice([0, 0.01 * rng.random()])
            fault = {"kind": kind, "count": count, "rank": rank, "seconds": delay}
            statuses, log = runs.start(folder, 2, fault, **settings)
            killed = statuses != [0, 0]
            if killed:
                # Of the other, -9 would be that of a process that did not end by itself.
                assert statuses[rank] == -signal.SIGKILL, log[-3000:]
                assert statuses[1 - rank] == 1, log[-3000:]
                ends.pop(0)
            for path in folder.glob("*.pt"):
                assert commands.load(path)["last_optimizer_state"]["state"]
        statuses, log = runs.start(folder, 2, **settings)
        assert statuses == [0, 0], log[-3000:]
        whole = runs.train("never killed", 2, **settings)
        states = [commands.load(each / "checkpoint_last.pt") for each in (folder, whole)]
        for key in ("model", "last_optimizer_state"):
            same(*(state[key] for state in states))
        assert number < most, f"{ends[0]} does not come"
