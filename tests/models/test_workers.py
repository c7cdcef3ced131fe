"""Gradients and what is learnt of several micro-batches and workers."""

import socket

import pytest
import torch
from support import commands
from support.commands import SIZE, parameters
from support.training import assert_same

from fairseq_sparsemixer.files import read_lines
from fairseq_sparsemixer.runs import points

# No randomness, plain SGD, and routing losses as large as the cross-entropy: a parameter's change
# is its gradient, and an error in the routing losses shows in it.
GRADIENT = {
    "arch": {**SIZE, "router": "switch", "jitter-eps": 0},
    "optimizer": {"optimizer": "sgd", "lr": 1.0, "lr-scheduler": "fixed", "dropout": 0.0},
    "balance_weight": 1.0,
    "z_loss_weight": 0.1,
    "share_all_embeddings": True,
    "train_subset": "test1",  # 12 sentences
    "disable_validation": True,
    "curriculum": 1,  # batches in the order in which they are cut
    "max_tokens": None,
    "save_interval_updates": 1,
}


SMALL_BATCH = 4


# Gradients: several micro-batches, several workers


@pytest.fixture(scope="session")
def one_process(shared, toy_corpus):
    """Two updates: 8 sentences, then the 4 that are left."""

    def build(directory):
        settings = {**GRADIENT, "batch_size": 2 * SMALL_BATCH, "max_update": 2}
        result = commands.train(toy_corpus / "joined", directory, **settings)
        (directory / "log").write_text(result.stdout)

    return shared.directory("one_process", build)


def assert_same_step(actual, expected, before):
    """Parameters agree to 1e-5 of themselves, and their changes to 1e-4 of the largest."""
    assert actual.keys() == expected.keys() == before.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-5, atol=1e-6, msg=name)
        step = (value - before[name]).abs().max()
        error = (actual[name] - value).abs().max()
        assert error <= 1e-4 * step + 1e-7, f"{name}: {error} of {step}"


def test_one_step_is_the_gradient_of_the_sum_over_micro_batches(toy_corpus, tmp_path, one_process):
    commands.train(
        toy_corpus / "joined",
        tmp_path,
        **{**GRADIENT, "batch_size": SMALL_BATCH, "max_update": 1, "update_freq": 2},
    )
    accumulated = commands.load(tmp_path / "checkpoint_1_1.pt")
    before, gradients, sizes = micro_batch_gradients(tmp_path / "checkpoint_1_1.pt")
    assert sizes[0] != sizes[1]  # so that a mean of means would show
    stepped = {name: before[name] - gradients[name] / sum(sizes) for name in before}
    accumulated = parameters(tmp_path / "checkpoint_1_1.pt")
    assert_same_step(accumulated, stepped, before)
    # Each micro-batch has its own shares of experts, so this is not the step of the whole batch.
    whole = parameters(one_process / "checkpoint_1_1.pt")
    router = "encoder.layers.0.moe.router.weight"
    assert not torch.allclose(whole[router], accumulated[router], rtol=1e-5, atol=1e-6)


def rebuild(checkpoint):
    """fairseq's configuration, task and freshly initialised model of a run."""
    from fairseq import checkpoint_utils, utils

    _, cfg, task = checkpoint_utils.load_model_ensemble_and_task([str(checkpoint)])
    utils.set_torch_seed(cfg.common.seed)
    return cfg, task, task.build_model(cfg.model)


def micro_batch_gradients(checkpoint):
    """The initial parameters of a run, the summed gradients of its first batches, their sizes."""
    cfg, task, model = rebuild(checkpoint)
    criterion = task.build_criterion(cfg.criterion)
    task.load_dataset("test1")
    batches = task.get_batch_iterator(
        task.dataset("test1"), max_sentences=SMALL_BATCH, seed=cfg.common.seed
    ).next_epoch_itr(shuffle=False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    results = [criterion(model, batch)[:2] for _, batch in zip(range(2), batches)]
    sum(loss for loss, _ in results).backward()
    gradients = dict.fromkeys(before, 0.0)
    for name, value in model.named_parameters(remove_duplicate=False):
        gradients[name] = value.grad
    return before, gradients, [size for _, size in results]


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


# fairseq hands a device number to pytorch_ddp, which refuses it for a model on the CPU.
WITHOUT_DEVICES = """
import torch.nn.parallel as parallel
original = parallel.DistributedDataParallel
def on_cpu(*args, device_ids, output_device, **kwargs):
    return original(*args, **kwargs)
parallel.DistributedDataParallel = on_cpu
"""


def train_on_two_workers(data, save_dir, ddp_backend, **settings):
    """As on a machine without a GPU: one command for each worker."""
    workers = {
        "ddp_backend": ddp_backend,
        "distributed_world_size": 2,
        "distributed_init_method": f"tcp://127.0.0.1:{free_port()}",
        "distributed_no_spawn": True,
        "distributed_backend": "gloo",
    }
    prelude = WITHOUT_DEVICES if ddp_backend == "pytorch_ddp" else None
    processes = []
    for rank in range(2):
        command = commands.train_command(
            data, save_dir, **{**workers, **settings}, distributed_rank=rank
        )
        processes.append(commands.start("fairseq_cli.train", *command, prelude=prelude))
    return [commands.checked(result) for result in commands.finish(*processes)]


@pytest.fixture(
    scope="session",
    params=[
        "pytorch_ddp",
        "legacy_ddp",
        pytest.param("pytorch_ddp, spread", marks=pytest.mark.slow),
    ],
)
def two_workers(request, shared, toy_corpus):
    """The updates of :func:`one_process`, 4 sentences for each worker; the last has one batch."""
    backend, _, spread = request.param.partition(", ")

    def build(directory):
        settings = {**GRADIENT, "batch_size": SMALL_BATCH, "max_update": 2}
        if spread:
            settings["arch"] = {**settings["arch"], "expert-parallel-size": 2}
        train_on_two_workers(toy_corpus / "joined", directory, backend, **settings)

    return shared.directory(request.param, build)


def test_two_workers_take_the_step_of_one(one_process, two_workers):
    before = rebuild(one_process / "checkpoint_1_1.pt")[-1].state_dict()
    one, two = (parameters(path / "checkpoint_1_1.pt") for path in (one_process, two_workers))
    assert_same_step(two, one, before)


def test_a_worker_without_a_batch_changes_nothing(one_process, two_workers):
    """At the end of an epoch fairseq gives a worker without a batch a dummy, without gradient."""
    before = parameters(one_process / "checkpoint_1_1.pt")
    one, two = (parameters(path / "checkpoint_last.pt") for path in (one_process, two_workers))
    assert_same_step(two, one, before)


def test_two_workers_agree_on_what_is_learnt_without_gradient(toy_corpus, tmp_path):
    """Balance bias and running means: those of one process, after four updates in two epochs."""
    arch = {**GRADIENT["arch"], "router": "default-moe", "balance-bias-rate": 0.01}
    settings = {**GRADIENT, "arch": arch, "balance_weight": 0.0, "lr": 0.1, "max_update": 4}
    one, two = tmp_path / "one", tmp_path / "two"
    commands.train(toy_corpus / "joined", one, **{**settings, "batch_size": 2 * SMALL_BATCH})
    train_on_two_workers(
        toy_corpus / "joined", two, "legacy_ddp", **{**settings, "batch_size": SMALL_BATCH}
    )
    expected, actual = (parameters(path / "checkpoint_last.pt") for path in (one, two))
    assert actual.keys() == expected.keys()
    for layer in ("encoder.layers.0", "decoder.layers.0"):
        router = f"{layer}.moe.router"
        assert expected[f"{router}.balance_bias.bias"].abs().max() > 0
        assert expected[f"{router}.expert_means.updates"].max() == 4
        assert expected[f"{router}.expert_means.token_count"].sum() == 0
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_what_is_learnt_without_gradient_is_resumed(toy_corpus, tmp_path):
    """Stopped between two updates, a run goes on as if it had not been."""
    arch = {**GRADIENT["arch"], "router": "default-moe", "balance-bias-rate": 0.01}
    settings = {**GRADIENT, "arch": arch, "batch_size": SMALL_BATCH, "lr": 0.1}
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    commands.train(toy_corpus / "joined", whole, **settings, max_update=5)
    for updates in (2, 5):
        commands.train(toy_corpus / "joined", stopped, **settings, max_update=updates)
    expected, actual = (parameters(path / "checkpoint_last.pt") for path in (whole, stopped))
    assert expected["encoder.layers.0.moe.router.balance_bias.bias"].abs().max() > 0
    assert_same(actual, expected)


@pytest.mark.slow
def test_two_workers_resume_with_the_noise_that_each_would_have_drawn(toy_corpus, tmp_path):
    """SparseMixer samples, and dropout draws; bit by bit, within an epoch."""
    settings = {
        "share_all_embeddings": True,
        "max_tokens": 200,
        "disable_validation": True,
        "load_checkpoint_on_all_dp_ranks": True,
    }
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    for folder, updates in ((whole, 4), (stopped, 2), (stopped, 4)):
        train_on_two_workers(
            toy_corpus / "joined", folder, "legacy_ddp", **settings, max_update=updates
        )
    actual, expected = (parameters(path / "checkpoint_last.pt") for path in (stopped, whole))
    assert_same(actual, expected)


def test_two_workers_measure_the_whole_validation_set(toy_corpus, tmp_path):
    """A point of the task translation_with_routing: words and choices of both."""
    file = tmp_path / "points.jsonl"
    first, _ = train_on_two_workers(
        toy_corpus / "joined",
        tmp_path,
        "legacy_ddp",
        task="translation_with_routing",
        points_file=file,
        max_update=6,
    )
    (point,) = points.read_points(file)
    sizes = [entry["wpb"] for entry in commands.logged(first.stdout + first.stderr, "train_inner")]
    assert len(sizes) == 6
    assert point["words"] == pytest.approx(sum(sizes), rel=1e-3)
    texts = [toy_corpus / "raw" / f"valid.{language}" for language in ("en", "de")]
    tokens = {sum(len(line.split()) + 1 for line in read_lines(path)) for path in texts}
    assert {len(choices) for choices in points.load_choices(file, 7).values()} == tokens


def test_two_workers_may_leave_out_different_layers(toy_corpus, tmp_path):
    """Under LayerDrop on the CPU, where dropout uses up random numbers of the same generator."""
    first, _ = train_on_two_workers(
        toy_corpus / "joined",
        tmp_path,
        "legacy_ddp",
        share_all_embeddings=True,
        encoder_layerdrop=0.5,
        decoder_layerdrop=0.5,
        max_tokens=200,
        max_update=8,
        disable_validation=True,
    )
    updates = commands.logged(first.stdout, "train_inner")
    assert len(updates) == 8
    assert updates[-1]["nll_loss"] < updates[0]["nll_loss"]
