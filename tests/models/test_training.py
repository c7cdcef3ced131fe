"""Training and resuming through fairseq's own command line."""

import math
import shutil

import pytest
import torch
from support import commands
from support.commands import SENTENCES, SIZE, parameters
from support.training import LAYERS, assert_one_clear_line, assert_same, generate, log_of

PLAIN_CRITERION = {"criterion": "label_smoothed_cross_entropy", "label-smoothing": 0.1}


ROUTING_METRICS = ("balance_loss", "z_loss", "router_entropy", "max_expert_share")


# Wrong settings. First in the file: they need no training run, so that one worker of xdist can
# work on them while the other trains.

WRONG_FLAGS = {
    "unknown router": ({"router": "sparsmixer"}, "--router", "did you mean 'sparsemixer'"),
    "no expert": ({"num-experts": 0}, "--num-experts", "at least 1 and below 2**31, not 0"),
    "more experts for a token than there are": ({"top-k": 5}, "--top-k", "(4), not 5"),
    "negative jitter": ({"jitter-eps": -1}, "--jitter-eps", "at least 0, not -1"),
    "jitter that changes the sign": (
        {"router": "switch", "jitter-eps": 1.5},
        "--router switch",
        "--jitter-eps must be at least 0 and below 1",
    ),
    "no jitter, and so nothing to choose from": (
        {"jitter-eps": 0},
        "--router sparsemixer",
        "--jitter-eps must be at least 1e-06",
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
