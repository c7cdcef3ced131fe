"""fairseq's own command lines, run as users run them, on a toy corpus.

A command takes some seconds to start, so runs are shared by several tests.
"""

import math
import shutil
import socket

import pytest
import torch
from support import commands
from support.commands import EVERY_SENTENCE, PACKAGE, SENTENCES, SIZE, flags, parameters

from fairseq_sparsemixer.files import read_lines
from fairseq_sparsemixer.runs import points

PLAIN_CRITERION = {"criterion": "label_smoothed_cross_entropy", "label-smoothing": 0.1}
ROUTING_METRICS = ("balance_loss", "z_loss", "router_entropy", "max_expert_share")
LAYERS = ("encoder.0", "decoder.0")

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


@pytest.fixture(scope="session")
def trained(shared, toy_corpus):
    """64 updates with a joined dictionary: ``log``, ``tensorboard`` and the checkpoints."""

    def build(directory):
        result = commands.train(
            toy_corpus / "joined",
            directory,
            share_all_embeddings=True,
            max_update=64,
            save_interval_updates=10,
            save_interval=1000,
            validate_interval=1000,
            tensorboard_logdir=directory / "tensorboard",
        )
        (directory / "log").write_text(result.stdout)

    return shared.directory("trained", build)


@pytest.fixture(scope="session")
def stopped(shared, toy_corpus):
    """The first 10 updates of :func:`trained`, which end within an epoch: the same files."""

    def build(directory):
        result = commands.train(
            toy_corpus / "joined",
            directory,
            share_all_embeddings=True,
            max_update=10,
            validate_interval=1000,
            save_interval=1000,
        )
        (directory / "log").write_text(result.stdout)

    return shared.directory("stopped", build)


def log_of(directory, tag):
    return commands.logged((directory / "log").read_text(), tag)


def assert_same(left, right):
    """Two models are the same, bit for bit."""
    assert list(left) == list(right)
    differing = [name for name in left if not torch.equal(left[name], right[name])]
    assert not differing


def last_line(text):
    return text.strip().splitlines()[-1]


def generate(data, *checkpoints, **settings):
    """fairseq-generate's output; all sentences of the test set unless told otherwise."""
    settings = {"batch-size": 8, **EVERY_SENTENCE, "cpu": True, **settings}
    path = ":".join(map(str, checkpoints))
    words = [data, "--user-dir", PACKAGE, "--path", path, *flags(settings)]
    return commands.run("fairseq_cli.generate", *words)


# Wrong settings. First in the file: they need no training run, so that one worker of xdist can
# work on them while the other trains.

WRONG_FLAGS = {
    "unknown router": ({"router": "sparsmixer"}, "--router", "did you mean 'sparsemixer'"),
    "no expert": ({"num-experts": 0}, "--num-experts", "at least 1, not 0"),
    "more experts for a token than there are": ({"top-k": 5}, "--top-k", "(4), not 5"),
    "negative jitter": ({"jitter-eps": -1}, "--jitter-eps", "at least 0, not -1"),
    "jitter that changes the sign": (
        {"router": "switch", "jitter-eps": 1.5},
        "--router switch",
        "jitter_eps must be at least 0 and below 1",
    ),
    "layer that does not exist": (
        {"encoder-moe-layers": 7},
        "--encoder-moe-layers",
        "the layers are 0 to 1",
    ),
    "quantization noise": ({"quant-noise-pq": 0.1}, "--quant-noise-pq", "must be 0"),
    "widths that cannot be shared": (
        {"share-all-embeddings": True, "decoder-embed-dim": 64},
        "--share-all-embeddings",
        "--decoder-embed-dim",
    ),
    "heads that do not divide the width": (
        {"encoder-attention-heads": 3},
        "--encoder-attention-heads (3)",
        "multiple",
    ),
}


def assert_one_clear_line(result, *parts):
    assert result.returncode != 0
    assert "Traceback" not in result.stderr
    assert last_line(result.stderr).startswith("error: ")
    assert result.stderr.count("error: ") == 1
    for part in parts:
        assert part in last_line(result.stderr)


@pytest.mark.parametrize("case", list(WRONG_FLAGS))
def test_a_wrong_flag_gives_one_clear_line(case, toy_corpus, tmp_path):
    changes, flag, message = WRONG_FLAGS[case]
    command = commands.train_command(
        toy_corpus / "joined", tmp_path, arch={**SIZE, **changes}, max_update=1
    )
    (result,) = commands.finish(commands.start("fairseq_cli.train", *command))
    assert_one_clear_line(result, flag, message)
    assert not list(tmp_path.glob("*.pt"))


# Training and resuming


def test_a_resumed_run_equals_an_uninterrupted_one(trained, stopped, toy_corpus, tmp_path):
    assert_same(
        parameters(trained / "checkpoint_1_10.pt"), parameters(stopped / "checkpoint_last.pt")
    )
    shutil.copy(stopped / "checkpoint_last.pt", tmp_path)
    resumed = commands.train(
        toy_corpus / "joined",
        tmp_path,
        share_all_embeddings=True,
        max_update=20,
        validate_interval=1000,
        save_interval=1000,
    )
    expected, actual = (
        commands.load(path)
        for path in (trained / "checkpoint_2_20.pt", tmp_path / "checkpoint_last.pt")
    )
    assert_same(expected["model"], actual["model"])
    for name, state in expected["last_optimizer_state"]["state"].items():
        for key, value in state.items():
            actual_value = actual["last_optimizer_state"]["state"][name][key]
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(actual_value))
    # and the log of the epoch in which it was stopped, shares of experts included
    assert commands.without_clock(
        commands.logged(resumed.stdout, "train")[0]
    ) == commands.without_clock(log_of(trained, "train")[0])


def test_training_learns(trained):
    losses = [entry["nll_loss"] for entry in log_of(trained, "valid")]
    assert losses[-1] < losses[0] - 1


def test_activation_checkpointing_changes_nothing(stopped, toy_corpus, tmp_path):
    result = commands.train(
        toy_corpus / "joined",
        tmp_path,
        share_all_embeddings=True,
        max_update=10,
        validate_interval=1000,
        save_interval=1000,
        checkpoint_activations=True,
    )
    entries = [commands.logged(result.stdout, "train_inner"), log_of(stopped, "train_inner")]
    with_, without = ([commands.without_clock(entry) for entry in log] for log in entries)
    assert len(without) == 10
    assert with_ == without
    expected = parameters(stopped / "checkpoint_last.pt")
    for name, value in parameters(tmp_path / "checkpoint_last.pt").items():
        # Embeddings that are shared sum their gradients in another order. The gradient of a key's
        # bias is 0 but for rounding, which Adam magnifies.
        atol = 1e-4 if name.endswith("k_proj.bias") else 1e-6
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=atol, msg=name)


@pytest.fixture(scope="session")
def layerdrop(shared, toy_corpus):
    """8 updates with LayerDrop, an exponential moving average and gradient accumulation."""

    def build(directory):
        result = commands.train(
            toy_corpus / "joined",
            directory,
            share_all_embeddings=True,
            encoder_layerdrop=0.5,
            decoder_layerdrop=0.5,
            store_ema=True,
            ema_decay=0.75,
            ema_fp32=True,
            update_freq=2,
            max_update=8,
            save_interval_updates=1,
            tensorboard_logdir=directory / "tensorboard",
        )
        (directory / "log").write_text(result.stdout)

    return shared.directory("layerdrop", build)


def test_layers_left_out_by_layerdrop_log_nothing(layerdrop):
    updates = log_of(layerdrop, "train_inner")
    assert [entry["num_updates"] for entry in updates] == list(range(1, 9))
    assert all(math.isfinite(entry["loss"]) for entry in updates)
    for layer in LAYERS:
        assert 0 < sum(f"balance_loss/{layer}" in entry for entry in updates) < 8


def test_layers_left_out_by_layerdrop_have_no_share(layerdrop):
    for entry in log_of(layerdrop, "train_inner"):
        for name, share in entry.items():
            if name.startswith("max_expert_share"):
                assert share >= 1 / 4, name  # the largest of 4


def test_update_freq_makes_batches_larger(layerdrop, stopped):
    accumulated, single = (
        [entry["bsz"] for entry in log_of(path, "train_inner")] for path in (layerdrop, stopped)
    )
    # The same batches in the same order, by two. LayerDrop does not change them.
    pairs = [sum(single[i : i + 2]) for i in range(0, 10, 2)]
    assert accumulated[:5] == pairs


def test_the_moving_average_holds_the_experts(layerdrop):
    first, second = (commands.load(layerdrop / f"checkpoint_1_{n}.pt") for n in (1, 2))
    before, after = (state["extra_state"]["ema"] for state in (first, second))
    # fairseq averages a tensor that has three names (shared embeddings) three times
    names = [name for name in after if ".layers." in name]
    assert any(name.endswith("moe.experts.w1") for name in names)
    for name in names:
        expected = 0.75 * before[name] + 0.25 * second["model"][name]
        torch.testing.assert_close(after[name], expected, msg=name)


def test_finetuning_starts_from_the_model_alone(trained, toy_corpus, tmp_path):
    result = commands.train(
        toy_corpus / "joined",
        tmp_path,
        optimizer={"optimizer": "adam", "lr": 0.0, "stop-min-lr": -1},
        share_all_embeddings=True,
        finetune_from_model=trained / "checkpoint_last.pt",
        max_update=1,
    )
    before, after = (commands.load(folder / "checkpoint_last.pt") for folder in (trained, tmp_path))
    assert_same(before["model"], after["model"])
    assert after["optimizer_history"][-1]["num_updates"] == 1
    (validation,) = commands.logged(result.stdout, "valid")
    assert validation["loss"] == log_of(trained, "valid")[-1]["loss"]


@pytest.fixture(scope="session")
def plain(shared, toy_corpus):
    """A user's own command with nothing new but --arch; two dictionaries."""

    def build(directory):
        result = commands.train(
            toy_corpus / "separate",
            directory,
            arch={**SIZE, "router": None, "num-experts": None},
            criterion=PLAIN_CRITERION,
            max_update=24,
        )
        (directory / "log").write_text(result.stdout)

    return shared.directory("plain", build)


def test_a_plain_criterion_trains_and_warns_once(plain):
    log = (plain / "log").read_text()
    assert log.count("the criterion ignores the routing losses") == 1
    assert "WARNING" in next(line for line in log.splitlines() if "ignores the routing" in line)
    updates = log_of(plain, "train_inner")
    assert updates[-1]["nll_loss"] < updates[0]["nll_loss"] - 0.5
    assert not any(name.startswith("balance_loss") for name in updates[-1])


def test_separate_dictionaries(plain, toy_corpus):
    state = parameters(plain / "checkpoint_last.pt")
    sizes = [state[f"{side}.embed_tokens.weight"].shape[0] for side in ("encoder", "decoder")]
    assert sizes[0] != sizes[1]
    output = generate(toy_corpus / "separate", plain / "checkpoint_last.pt", beam=2).stdout
    texts = commands.hypotheses(output)
    assert sorted(texts) == list(range(SENTENCES["test"]))
    german = set((toy_corpus / "raw" / "train.de").read_text().split())
    assert {word for text in texts.values() for word in text.split()} <= german


def test_tensorboard_shows_the_routing(trained):
    for folder in ("train", "train_inner", "valid"):
        values = commands.events(trained / "tensorboard" / folder)
        for metric in ROUTING_METRICS:
            for tag in (metric, *(f"{metric}/{layer}" for layer in LAYERS)):
                assert tag in values, f"{folder}: {sorted(values)}"
                assert all(math.isfinite(value) for _, value in values[tag])
        for metric, low, high in (
            ("balance_loss", 0.9, 4.0),  # 1 when uniform, 4 when one of 4 experts takes all
            ("router_entropy", 0.0, math.log(4) + 1e-3),
            ("max_expert_share", 0.25, 1.0),
        ):
            assert all(low <= value <= high for _, value in values[metric])
        steps = [step for step, _ in values["balance_loss"]]
        assert steps == sorted(steps) and steps[-1] == 64
    # as the log says
    logged = [entry["balance_loss"] for entry in log_of(trained, "valid")]
    assert [value for _, value in values["balance_loss"]] == pytest.approx(logged)


# Validation and generation


@pytest.fixture(scope="session")
def validated(shared, toy_corpus, trained):
    """fairseq-validate of the valid and test sets, called from another folder."""

    def build(directory):
        directory.mkdir()
        result = commands.run(
            "fairseq_cli.validate",
            toy_corpus / "joined",
            *flags(
                {
                    **commands.RUN,
                    "user-dir": f"{PACKAGE.name}/",
                    "task": "translation",
                    "path": trained / "checkpoint_last.pt",
                    "valid-subset": "valid,test",
                }
            ),
            cwd=PACKAGE.parent,
        )
        (directory / "log").write_text(result.stdout)

    return shared.directory("validated", build)


def test_validate_finds_what_training_logged(validated, trained):
    log = (validated / "log").read_text()
    assert "leaves out" not in log
    (after,) = log_of(validated, "valid")
    during = log_of(trained, "valid")[-1]
    assert after["bsz"] == SENTENCES["valid"]
    assert during["bsz"] == SENTENCES["valid"] / 2  # training logs the mean over batches
    for name in ("loss", "nll_loss"):
        assert after[name] == during[name]
    for name in ("z_loss", "router_entropy", "max_expert_share"):
        assert after[name] == pytest.approx(during[name], abs=3e-4)  # a mean of rounded means
    (test,) = log_of(validated, "test")
    assert test["bsz"] == SENTENCES["test"]


def test_validate_finds_the_balance_loss_that_training_logged(validated, trained):
    (after,) = log_of(validated, "valid")
    assert after["balance_loss"] == pytest.approx(log_of(trained, "valid")[-1]["balance_loss"])


def test_validate_warns_of_sentences_left_out(trained, toy_corpus):
    result = commands.run(
        "fairseq_cli.validate",
        toy_corpus / "joined",
        *flags(
            {
                **commands.RUN,
                "required-batch-size-multiple": None,
                "user-dir": PACKAGE,
                "task": "translation",
                "path": trained / "checkpoint_last.pt",
            }
        ),
    )
    assert "fairseq leaves out 5 of 29 sentences" in result.stdout
    assert "pass --required-batch-size-multiple 1" in result.stdout
    assert commands.logged(result.stdout, "valid")[0]["bsz"] == 24


@pytest.fixture(scope="session")
def generated(shared, toy_corpus, trained):
    """The test set translated with a beam of 4, 8 sentences at a time."""

    def build(directory):
        directory.mkdir()
        result = generate(toy_corpus / "joined", trained / "checkpoint_last.pt", beam=4)
        assert "leaves out" not in result.stderr
        (directory / "log").write_text(result.stdout)

    return (shared.directory("generated", build) / "log").read_text()


def scores(output):
    return {number: float(score) for number, (score, _) in commands.printed(output, "H").items()}


def test_generate_does_not_depend_on_the_batch(generated, trained, toy_corpus):
    # 25 sentences, 8 at a time: the last batch has one
    texts = commands.hypotheses(generated)
    assert sorted(texts) == list(range(SENTENCES["test"]))
    assert len(set(texts.values())) > SENTENCES["test"] / 2
    alone = generate(
        toy_corpus / "joined", trained / "checkpoint_last.pt", **{"beam": 4, "batch-size": 1}
    ).stdout
    assert commands.hypotheses(alone) == texts
    assert scores(alone) == pytest.approx(scores(generated), abs=2e-4)


def test_interactive_translates_as_generate_does(trained, toy_corpus):
    """Greedily; generate's default batches leave out a sentence, interactive's do not."""
    some = generate(
        toy_corpus / "joined",
        trained / "checkpoint_last.pt",
        **{"beam": 1, "required-batch-size-multiple": None},
    )
    assert "fairseq leaves out 1 of 25 sentences" in some.stderr
    some = some.stdout
    every = commands.run(
        "fairseq_cli.interactive",
        toy_corpus / "joined",
        *flags(
            {
                "user-dir": PACKAGE,
                "path": trained / "checkpoint_last.pt",
                "input": toy_corpus / "raw" / "test.en",
                "buffer-size": 100,
                "batch-size": 8,
                "beam": 1,
                "cpu": True,
            }
        ),
    ).stdout
    texts, expected = commands.hypotheses(every), commands.hypotheses(some)
    assert sorted(texts) == list(range(SENTENCES["test"]))
    assert len(expected) == 24
    assert {number: texts[number] for number in expected} == expected
    for number, score in scores(some).items():
        assert scores(every)[number] == pytest.approx(score, abs=2e-4)


def test_prefix_size_keeps_the_start_of_the_reference(generated, trained, toy_corpus):
    output = generate(
        toy_corpus / "joined", trained / "checkpoint_last.pt", **{"beam": 4, "prefix-size": 2}
    ).stdout
    texts = commands.hypotheses(output)
    references = {n: text for n, (text,) in commands.printed(output, "T").items()}
    assert sorted(texts) == sorted(references) == list(range(SENTENCES["test"]))
    for number, text in texts.items():
        assert text.split()[:2] == references[number].split()[:2]
    assert texts != commands.hypotheses(generated)


def test_reference_scores_and_ensembles(validated, trained, toy_corpus):
    last, middle = trained / "checkpoint_last.pt", trained / "checkpoint_5_50.pt"
    alone, other, both = (
        commands.positional_scores(
            generate(toy_corpus / "joined", *paths, **{"score-reference": True}).stdout
        )
        for paths in ([last], [middle], [last, middle])
    )
    # the same likelihood as in validation
    every = [score for scores_ in alone.values() for score in scores_]
    (test,) = log_of(validated, "test")
    assert len(alone) == SENTENCES["test"]
    assert len(every) == test["wpb"]
    assert -sum(every) / len(every) == pytest.approx(test["nll_loss"], abs=1e-3)
    # an ensemble is the mean of the probabilities
    for number, ensemble in both.items():
        expected = [math.log2((2**a + 2**b) / 2) for a, b in zip(alone[number], other[number])]
        assert ensemble == pytest.approx(expected, abs=3e-4)
    assert alone != other


@pytest.fixture(scope="session")
def pruned_by_hand(shared, trained, toy_corpus):
    """Translations of a checkpoint with the second encoder layer alone, which has no experts."""

    def build(directory):
        directory.mkdir()
        state = commands.load(trained / "checkpoint_last.pt")
        state["model"] = {
            name.replace("encoder.layers.1.", "encoder.layers.0."): value
            for name, value in state["model"].items()
            if not name.startswith("encoder.layers.0.")
        }
        state["cfg"]["model"].update(encoder_layers=1, encoder_moe_layers="none")
        torch.save(state, directory / "pruned.pt")
        result = generate(toy_corpus / "joined", directory / "pruned.pt", beam=4)
        (directory / "log").write_text(result.stdout)

    return (shared.directory("pruned_by_hand", build) / "log").read_text()


@pytest.mark.parametrize(
    "overrides",
    [
        {"encoder_layers_to_keep": "1", "decoder_layers_to_keep": "0,1"},
        {"encoder_layers_to_keep": "1"},
    ],
    ids=["both sides", "encoder"],
)
def test_layers_can_be_pruned(overrides, pruned_by_hand, generated, trained, toy_corpus):
    settings = {"beam": 4, "model-overrides": overrides}
    output = generate(toy_corpus / "joined", trained / "checkpoint_last.pt", **settings).stdout
    assert sorted(commands.hypotheses(output)) == list(range(SENTENCES["test"]))
    assert commands.hypotheses(output) == commands.hypotheses(pruned_by_hand)
    assert scores(output) == scores(pruned_by_hand)
    assert scores(output) != scores(generated)


def test_another_number_of_experts_does_not_fit_the_checkpoint(trained, toy_corpus, tmp_path):
    shutil.copy(trained / "checkpoint_last.pt", tmp_path)
    command = commands.train_command(
        toy_corpus / "joined",
        tmp_path,
        arch={**SIZE, "num-experts": 8},
        share_all_embeddings=True,
        max_update=200,
    )
    overrides = {"model-overrides": "{'num_experts': 8}", "cpu": True}
    results = commands.finish(
        commands.start("fairseq_cli.train", *command),
        commands.start(
            "fairseq_cli.generate",
            toy_corpus / "joined",
            *("--user-dir", PACKAGE, "--path", trained / "checkpoint_last.pt"),
            *flags(overrides),
        ),
    )
    for result in results:
        assert_one_clear_line(result, "--num-experts", "there and (8")


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


@pytest.fixture(scope="session", params=["pytorch_ddp", "legacy_ddp"])
def two_workers(request, shared, toy_corpus):
    """The updates of :func:`one_process`, 4 sentences for each worker; the last has one batch."""

    def build(directory):
        settings = {**GRADIENT, "batch_size": SMALL_BATCH, "max_update": 2}
        train_on_two_workers(toy_corpus / "joined", directory, request.param, **settings)

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


# Hydra

CONFIGS = PACKAGE.parent / "configs"

# What the demo's files set, under the group and name that hydra knows it by, with other values.
HYDRA_SETTINGS = {
    "model.dropout": 0.3,
    "model.attention_dropout": 0.1,
    "model.activation_dropout": 0.2,
    "model.share_all_embeddings": True,
    "criterion.label_smoothing": 0.1,
    "criterion.balance_weight": 0.02,
    "criterion.z_loss_weight": 0.001,
    "lr_scheduler.warmup_updates": 1,
    "lr_scheduler.warmup_init_lr": 1e-7,
    "optimization.clip_norm": 1.5,
    "optimization.max_update": 2,
    "dataset.max_tokens": 400,
    "checkpoint.best_checkpoint_metric": "nll_loss",
}


def hydra_command(data, save_dir, *overrides):
    """fairseq-hydra-train with the project's demo configuration, made small."""
    sizes = {name.replace("-", "_"): value for name, value in SIZE.items()}
    return [
        *("--config-dir", CONFIGS, "--config-name", "demo"),
        *(f"common.user_dir={PACKAGE}", f"task.data={data}", "common.log_interval=1"),
        *(f"checkpoint.save_dir={save_dir}", f"hydra.run.dir={save_dir}"),
        f"model._name={sizes.pop('arch')}",
        *(f"++model.{key}={value}" for key, value in sizes.items()),
        *(f"{key}={value}" for key, value in HYDRA_SETTINGS.items()),
        "optimization.lr=[0.005]",
        *overrides,
    ]


@pytest.fixture(scope="session")
def by_hydra(shared, toy_corpus):
    """Two updates with the settings above."""

    def build(directory):
        command = hydra_command(toy_corpus / "joined", directory)
        result = commands.run("fairseq_cli.hydra_train", *command, cwd=directory.parent)
        (directory / "log").write_text(result.stdout)

    return shared.directory("by_hydra", build)


def test_flags_and_hydra_train_the_same_model(by_hydra, toy_corpus, tmp_path):
    settings = {name.split(".")[1]: value for name, value in HYDRA_SETTINGS.items()}
    adam = {"optimizer": "adam", "adam-betas": "(0.9, 0.98)", "lr": 0.005}
    by_flags = commands.train(
        toy_corpus / "joined",
        tmp_path,
        criterion={"criterion": commands.CRITERION["criterion"]},
        optimizer={**adam, "lr-scheduler": "inverse_sqrt"},
        task="translation_with_routing",
        points_file=tmp_path / "points.jsonl",
        **settings,
    )
    assert_same(
        parameters(tmp_path / "checkpoint_last.pt"), parameters(by_hydra / "checkpoint_last.pt")
    )
    for tag in ("train_inner", "valid"):
        entries = commands.logged(by_flags.stdout, tag), log_of(by_hydra, tag)
        with_flags, with_hydra = ([commands.without_clock(entry) for entry in e] for e in entries)
        assert with_flags == with_hydra


def test_a_model_trained_by_hydra_generates(by_hydra, toy_corpus):
    output = generate(
        toy_corpus / "joined", by_hydra / "checkpoint_last.pt", **{"beam": 2, "max-len-b": 10}
    ).stdout
    assert sorted(commands.hypotheses(output)) == list(range(SENTENCES["test"]))


def test_hydra_sweeps_over_routers(by_hydra, toy_corpus, tmp_path):
    command = hydra_command(toy_corpus / "joined", tmp_path / "${model.router}")
    commands.run(
        "fairseq_cli.hydra_train",
        "--multirun",
        *command,
        *("model.router=switch,sparsemixer", f"hydra.sweep.dir={tmp_path}"),
        "hydra.sweep.subdir=${model.router}",  # by default named after all overrides: too long
        cwd=tmp_path,
    )
    switch, sparsemixer = (
        parameters(tmp_path / router / "checkpoint_last.pt") for router in ("switch", "sparsemixer")
    )
    assert_same(sparsemixer, parameters(by_hydra / "checkpoint_last.pt"))
    extra = [name for name in sparsemixer if name not in switch]
    assert len(extra) == len(LAYERS)
    assert all(name.endswith("router.output_scale") for name in extra)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.router=sparsmixer", "did you mean 'sparsemixer'"),
        ("+model.num_expert=8", "num_expert"),
    ],
)
def test_hydra_gives_one_clear_line_for_a_wrong_setting(override, message, toy_corpus, tmp_path):
    command = hydra_command(toy_corpus / "joined", tmp_path, override)
    (result,) = commands.finish(commands.start("fairseq_cli.hydra_train", *command, cwd=tmp_path))
    assert result.returncode != 0
    assert "Traceback" not in result.stderr
    # hydra repeats the overrides in a line of its own
    lines = [line for line in result.stderr.splitlines() if "Error executing" not in line]
    assert len([line for line in lines if message in line]) == 1


# --user-dir


def test_user_dir_of_an_installed_package(toy_corpus, trained, tmp_path):
    commands.run(
        "pip",
        *("install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"),
        *("--disable-pip-version-check", "--target", tmp_path),
        copy_of_the_checkout(tmp_path),
    )
    installed = tmp_path / PACKAGE.name
    with (installed / "__init__.py").open("a") as file:
        file.write('print("the installed package")\n')
    result = commands.run(
        "fairseq_cli.validate",
        toy_corpus / "joined",
        *flags(
            {
                **commands.RUN,
                "user-dir": installed,
                "task": "translation",
                "path": trained / "checkpoint_last.pt",
            }
        ),
        cwd=tmp_path,
    )
    assert "the installed package" in result.stdout
    (validation,) = commands.logged(result.stdout, "valid")
    assert validation["loss"] == log_of(trained, "valid")[-1]["loss"]


def copy_of_the_checkout(directory):
    """What pip needs, copied: a build in the checkout would leave files there."""
    source = directory / "source"
    shutil.copytree(PACKAGE, source / PACKAGE.name)
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(PACKAGE.parent / name, source)
    return source


@pytest.mark.gpu
def test_half_precision(toy_corpus, tmp_path):
    result = commands.train(
        toy_corpus / "joined",
        tmp_path,
        share_all_embeddings=True,
        cpu=None,
        fp16=True,
        fp16_init_scale=4,
        max_update=30,
    )
    updates = commands.logged(result.stdout, "train_inner")
    assert updates[-1]["nll_loss"] < updates[0]["nll_loss"]
    state = parameters(tmp_path / "checkpoint_last.pt")
    assert all(torch.isfinite(value).all() for value in state.values())
    assert state["encoder.layers.0.moe.experts.w1"].dtype == torch.float16
