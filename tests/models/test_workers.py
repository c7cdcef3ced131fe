"""Gradients and what is learnt of several micro-batches and workers."""

import pytest
import torch
from support import commands
from support.commands import SIZE, parameters
from support.training import assert_same, train_on_workers

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
def one_process(shared, toy_corpus, server):
    """Two updates: 8 sentences, then the 4 that are left."""

    def build(directory):
        settings = {**GRADIENT, "batch_size": 2 * SMALL_BATCH, "max_update": 2}
        train_on_workers(server, toy_corpus / "joined", directory, **settings)

    return shared.directory("one_process", build)


def assert_same_step(actual, expected, before):
    """Parameters agree to 1e-5 of themselves, and their changes to 1e-4 of the largest."""
    assert actual.keys() == expected.keys() == before.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-5, atol=1e-6, msg=name)
        step = (value - before[name]).abs().max()
        error = (actual[name] - value).abs().max()
        assert error <= 1e-4 * step + 1e-7, f"{name}: {error} of {step}"


def test_one_step_is_the_gradient_of_the_sum_over_micro_batches(
    toy_corpus, tmp_path, server, one_process
):
    train_on_workers(
        server,
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


def last_norm(checkpoint):
    """The norm of an update's gradient, before it was clipped, as its checkpoint has it."""
    meters = commands.load(checkpoint)["extra_state"]["metrics"]["train"]
    (norm,) = [state["val"] for _, name, _, state in meters if name == "gnorm"]
    return float(norm)


def assert_same_updates(actual, expected, before):
    """Of two folders: both updates, and the norms of their gradients."""
    for name in ("checkpoint_1_1.pt", "checkpoint_last.pt"):
        after = parameters(expected / name)
        assert_same_step(parameters(actual / name), after, before)
        norm = last_norm(expected / name)
        assert last_norm(actual / name) == pytest.approx(norm, rel=1e-5)
        before = after


@pytest.fixture(
    scope="session",
    params=[
        ("pytorch_ddp", 2, 1),
        ("legacy_ddp", 2, 1),
        ("no_c10d", 4, 1),
        pytest.param(("pytorch_ddp", 2, 2), marks=pytest.mark.slow),  # experts spread
    ],
)
def workers(request, shared, toy_corpus, server):
    """The updates of :func:`one_process`, shared by workers; of the last, half have no batch."""
    backend, number, spread = request.param

    def build(directory):
        settings = {**GRADIENT, "batch_size": 2 * SMALL_BATCH // number, "max_update": 2}
        settings["arch"] = {**settings["arch"], "expert-parallel-size": spread}
        train_on_workers(server, toy_corpus / "joined", directory, backend, number, **settings)

    return shared.directory(f"{backend}-{number}-{spread}", build)


def test_workers_take_the_step_of_one(one_process, workers):
    """At the end of an epoch fairseq gives a worker without a batch a dummy, without gradient."""
    before = rebuild(one_process / "checkpoint_1_1.pt")[-1].state_dict()
    assert_same_updates(workers, one_process, before)


# With gradients of several batches, clipped: the norm decides on the step.
ACCUMULATED = {**GRADIENT, "update_freq": 2, "clip_norm": 0.5, "max_update": 2}


def assert_accumulates(server, data, folder, backend, workers, **more):
    one, several = folder / "one", folder / "several"
    settings = {**ACCUMULATED, **more}
    train_on_workers(server, data, several, backend, workers, batch_size=4 // workers, **settings)
    train_on_workers(server, data, one, batch_size=4, **settings)
    before = rebuild(one / "checkpoint_1_1.pt")[-1].state_dict()
    assert last_norm(one / "checkpoint_1_1.pt") > 2 * ACCUMULATED["clip_norm"]
    assert_same_updates(several, one, before)


def test_workers_accumulate_gradients_as_one(toy_corpus, tmp_path, server):
    assert_accumulates(server, toy_corpus / "joined", tmp_path, "pytorch_ddp", 2)


def test_a_batch_counts_though_the_next_is_missing(toy_corpus, tmp_path, server):
    """Of 3 batches, two gradients of two workers each: the last of the second is a dummy."""
    settings = {**ACCUMULATED, "max_update": 1}
    for name, *by, batch in (("one", 8), ("several", "legacy_ddp", 2, 4)):
        data = toy_corpus / "joined"
        train_on_workers(server, data, tmp_path / name, *by, batch_size=batch, **settings)
    one, several = (tmp_path / name / "checkpoint_last.pt" for name in ("one", "several"))
    before = rebuild(one)[-1].state_dict()
    assert_same_step(parameters(several), parameters(one), before)
    assert last_norm(several) == pytest.approx(last_norm(one), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["legacy_ddp", "pytorch_ddp"])
def test_four_workers_accumulate_gradients_as_one(backend, toy_corpus, tmp_path, server):
    assert_accumulates(server, toy_corpus / "joined", tmp_path, backend, 4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("workers", "accumulated", "wrapped"), [(2, 1, None), (4, 1, None), (2, 2, 1000)]
)
def test_workers_with_sharded_parameters_take_the_step_of_one(
    workers, accumulated, wrapped, toy_corpus, tmp_path, server
):
    """And write the checkpoint of one, which one goes on from; also where layers are units."""
    pytest.importorskip("fairscale")
    data, one, several = toy_corpus / "joined", tmp_path / "one", tmp_path / "several"
    settings = {**ACCUMULATED, "update_freq": accumulated}
    batch = 8 // accumulated
    train_on_workers(
        server,
        data,
        several,
        "fully_sharded",
        workers,
        batch_size=batch // workers,
        min_params_to_wrap=wrapped,
        **settings,
    )
    train_on_workers(server, data, one, batch_size=batch, **settings)
    assert_same_updates(several, one, rebuild(one / "checkpoint_1_1.pt")[-1].state_dict())
    for folder in (one, several):
        train_on_workers(server, data, folder, batch_size=batch, **{**settings, "max_update": 4})
    for name, value in parameters(one / "checkpoint_last.pt").items():
        actual = parameters(several / "checkpoint_last.pt")[name]
        torch.testing.assert_close(actual, value, rtol=1e-4, atol=1e-5, msg=name)


ADAM = {**GRADIENT["optimizer"], "optimizer": "adam", "lr": 0.001}


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "number"), [("pytorch_ddp", 2), ("legacy_ddp", 4)])
@pytest.mark.parametrize("optimizer", [ADAM, {**GRADIENT["optimizer"], "lr": 0.1}])
def test_workers_train_as_one_for_fifty_updates(
    backend, number, optimizer, toy_corpus, tmp_path, server
):
    settings = {**GRADIENT, "optimizer": optimizer, "clip_norm": 1.0, "max_update": 50}
    settings = {**settings, "save_interval_updates": 0, "no_epoch_checkpoints": True}
    data, one, several = toy_corpus / "joined", tmp_path / "one", tmp_path / "several"
    train_on_workers(server, data, one, batch_size=8, **settings)
    train_on_workers(server, data, several, backend, number, batch_size=8 // number, **settings)
    expected, actual = (parameters(path / "checkpoint_last.pt") for path in (one, several))
    for name, value in expected.items():
        # Its gradient is 0 but for rounding, of which Adam makes steps.
        if not (name.endswith("k_proj.bias") and optimizer is ADAM):
            torch.testing.assert_close(actual[name], value, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize(
    "backend", ["pytorch_ddp", pytest.param("legacy_ddp", marks=pytest.mark.slow)]
)
def test_workers_in_half_precision_take_the_step_of_one(
    backend, toy_corpus, tmp_path, server, one_process
):
    """fp16, whose copies fairseq can only keep apart on a CPU; within its 11 bits."""
    half = {"fp16": True, "fp16_no_flatten_grads": True, "max_update": 1}
    settings = {**GRADIENT, **half, "batch_size": SMALL_BATCH}
    train_on_workers(server, toy_corpus / "joined", tmp_path / "run", backend, 2, **settings)
    expected = rebuild(one_process / "checkpoint_1_1.pt")[-1].state_dict()
    whole, halved = (
        parameters(path / "checkpoint_1_1.pt") for path in (one_process, tmp_path / "run")
    )
    for name, before in expected.items():
        step, error = (whole[name] - before).abs().max(), whole[name] - halved[name].float()
        assert error.abs().max() <= 0.01 * step + 1e-3, name
    norm = last_norm(one_process / "checkpoint_1_1.pt")
    assert last_norm(tmp_path / "run" / "checkpoint_1_1.pt") == pytest.approx(norm, rel=0.01)


def test_two_workers_agree_on_what_is_learnt_without_gradient(toy_corpus, tmp_path, server):
    """Balance bias and running means: those of one process, after four updates in two epochs."""
    arch = {**GRADIENT["arch"], "router": "default-moe", "balance-bias-rate": 0.01}
    settings = {**GRADIENT, "arch": arch, "balance_weight": 0.0, "lr": 0.1, "max_update": 4}
    one, two = tmp_path / "one", tmp_path / "two"
    train_on_workers(
        server, toy_corpus / "joined", one, **{**settings, "batch_size": 2 * SMALL_BATCH}
    )
    train_on_workers(
        server,
        toy_corpus / "joined",
        two,
        "legacy_ddp",
        2,
        **{**settings, "batch_size": SMALL_BATCH},
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


def test_what_is_learnt_without_gradient_is_resumed(toy_corpus, tmp_path, server):
    """Stopped between two updates, a run goes on as if it had not been."""
    arch = {**GRADIENT["arch"], "router": "default-moe", "balance-bias-rate": 0.01}
    settings = {**GRADIENT, "arch": arch, "batch_size": SMALL_BATCH, "lr": 0.1}
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    train_on_workers(server, toy_corpus / "joined", whole, **settings, max_update=5)
    for updates in (2, 5):
        train_on_workers(server, toy_corpus / "joined", stopped, **settings, max_update=updates)
    expected, actual = (parameters(path / "checkpoint_last.pt") for path in (whole, stopped))
    assert expected["encoder.layers.0.moe.router.balance_bias.bias"].abs().max() > 0
    assert_same(actual, expected)


@pytest.mark.slow
def test_two_workers_resume_with_the_noise_that_each_would_have_drawn(toy_corpus, tmp_path, server):
    """SparseMixer samples, and dropout draws; bit by bit, within an epoch."""
    settings = {
        "share_all_embeddings": True,
        "max_tokens": 200,
        "disable_validation": True,
        "load_checkpoint_on_all_dp_ranks": True,
    }
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    for folder, updates in ((whole, 4), (stopped, 2), (stopped, 4)):
        train_on_workers(
            server, toy_corpus / "joined", folder, "legacy_ddp", 2, **settings, max_update=updates
        )
    actual, expected = (parameters(path / "checkpoint_last.pt") for path in (stopped, whole))
    assert_same(actual, expected)


def test_two_workers_measure_the_whole_validation_set(toy_corpus, tmp_path, server):
    """A point of the task translation_with_routing: words and choices of both."""
    file = tmp_path / "points.jsonl"
    printed = train_on_workers(
        server,
        toy_corpus / "joined",
        tmp_path,
        "legacy_ddp",
        2,
        task="translation_with_routing",
        points_file=file,
        max_update=6,
    )
    (point,) = points.read_points(file)
    sizes = [entry["wpb"] for entry in commands.logged(printed, "train_inner")]
    assert len(sizes) == 6
    assert point["words"] == pytest.approx(sum(sizes), rel=1e-3)
    texts = [toy_corpus / "raw" / f"valid.{language}" for language in ("en", "de")]
    tokens = {sum(len(line.split()) + 1 for line in read_lines(path)) for path in texts}
    assert {len(choices) for choices in points.load_choices(file, 7).values()} == tokens


def test_two_workers_may_leave_out_different_layers(toy_corpus, tmp_path, server):
    """Under LayerDrop on the CPU, where dropout uses up random numbers of the same generator."""
    printed = train_on_workers(
        server,
        toy_corpus / "joined",
        tmp_path,
        "legacy_ddp",
        2,
        share_all_embeddings=True,
        encoder_layerdrop=0.5,
        decoder_layerdrop=0.5,
        max_tokens=200,
        max_update=8,
        disable_validation=True,
    )
    updates = commands.logged(printed, "train_inner")
    assert len(updates) == 8
    assert updates[-1]["nll_loss"] < updates[0]["nll_loss"]
