"""RoBERTa and language models through fairseq's own command lines."""

import json
import re
import shutil

import pytest
import torch
from support import commands, one_text
from support.commands import SENTENCES, load, parameters
from support.one_text import CLASSES, MASKED, REPLACED, WORDS
from support.training import assert_same, last_line, train_on_workers

from fairseq_sparsemixer import cli
from fairseq_sparsemixer.models import (
    SwitchElectraModel,
    SwitchRobertaModel,
    SwitchTransformerLanguageModel,
)
from fairseq_sparsemixer.runs import points

CONFIGS = commands.PACKAGE.parent / "configs"
KINDS = {
    "masked": (MASKED, "input0"),
    "replaced": (REPLACED, "input0"),
    "classes": (CLASSES, "."),
    "words": (WORDS, "input0"),
}
FIRST_OF_KINDS = [
    "replaced",  # and so masked ones, too
    *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("masked", "classes", "words")),
]
LIKE_PRETRAINING = {"optimizer": {**commands.ADAM, "lr": 0.003}, "no_epoch_checkpoints": True}
UPDATES = 6


@pytest.fixture(scope="session")
def one_text_data(shared, server):
    return shared.directory("one_text", lambda folder: one_text.build(server, folder))


@pytest.fixture(scope="session")
def trained(shared, one_text_data, server):
    """Six updates of each kind, measured, with a moving average: ``log``, points, checkpoints."""

    def build(directory):
        for kind, (settings, data) in KINDS.items():
            folder = directory / kind
            settings = {**LIKE_PRETRAINING, **settings, "max_update": UPDATES, "store_ema": True}
            settings["task"] += "_with_routing"
            settings["points_file"] = folder / points.FILE
            text = one_text.train(server, one_text_data / data, folder, **settings)
            (folder / "log").write_text(text)

    return shared.directory("one_text_trained", build)


def valid(text):
    return commands.logged(text, "valid")[-1]


@pytest.mark.parametrize("kind", FIRST_OF_KINDS)
def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(
    kind, trained, one_text_data, tmp_path, server
):
    settings, data = KINDS[kind]
    settings = {**LIKE_PRETRAINING, **settings, "store_ema": True}
    for updates in (UPDATES // 2, UPDATES):
        one_text.train(server, one_text_data / data, tmp_path, max_update=updates, **settings)
    resumed, whole = (load(folder / "checkpoint_last.pt") for folder in (tmp_path, trained / kind))
    assert_same(resumed["model"], whole["model"])
    assert_same(resumed["extra_state"]["ema"], whole["extra_state"]["ema"])


@pytest.mark.parametrize("kind", FIRST_OF_KINDS)
def test_validation_finds_what_training_found(kind, trained, one_text_data, server):
    settings, data = KINDS[kind]
    own = {"num_classes": 2, **CLASSES["criterion"]} if kind == "classes" else {}
    text = one_text.read(
        server,
        "fairseq_cli.validate",
        one_text_data / data,
        trained / kind / "checkpoint_last.pt",
        task=settings["task"],
        **own,
    )
    expected = valid((trained / kind / "log").read_text())
    found = valid(text)
    measures = {
        # Of batches of another size the discriminator's loss has another weight beside the other.
        "replaced": ("discriminator_loss", "accuracy", "replaced", "precision", "recall"),
    }
    for name in ("nll_loss", "balance_loss", *measures.get(kind, ["loss"])):
        assert found[name] == pytest.approx(expected[name], abs=2e-3), name
    assert ("accuracy" in found) == (kind in ("classes", "replaced"))


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_finds_what_training_found(kind, trained, one_text_data, tmp_path):
    """`fairseq-sparsemixer evaluate`, on the validation set."""
    run, output = trained / kind, tmp_path / "valid.json"
    arguments = ["evaluate", str(run), "--checkpoint", "checkpoint_last.pt", "--subset", "valid"]
    assert cli.main([*arguments, "--output", str(output)]) == 0
    scores = {key: each["score"] for key, each in json.loads(output.read_text())["scores"].items()}
    (point,) = points.read_points(run / points.FILE)
    assert scores.pop("nll") == pytest.approx(point["nll_loss"], abs=1e-3)
    expected = {key: value for key, value in point.items() if key in points.METRICS}
    assert scores == pytest.approx(expected, rel=1e-3)


def test_what_is_not_of_such_models_is_told(trained, tmp_path, capsys):
    run = str(trained / "masked" / "checkpoint_last.pt")
    for more, message in (
        (["--tokenize", "char"], "--tokenize: such flags are for models that translate"),
        (["--int8"], "--int8: such flags are for models that translate"),
        (["--compound-split"], "--compound-split: such flags are for models that translate"),
        (["--beam", "4"], "--beam: such flags are for models that translate"),
        (["--source-lang", "en"], "--source-lang: such flags are for models that translate"),
        (["--data", "gone"], "there is no folder gone: name with --data what the model was"),
        (["--subset", "tset"], "tset.idx: name another set with --subset, or with --data"),
        (["--data", str(tmp_path)], f"cannot read the dictionary {tmp_path}/dict.txt"),
    ):
        assert cli.main(["evaluate", run, "--output", str(tmp_path / "x.json"), *more]) == 2
        assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_points_hold_what_the_task_measures(trained, one_text_data):
    """The figures of fairseq's log, and which experts the tokens of all sentences chose."""
    tokens = {}
    for kind, key in (("masked", None), ("classes", "accuracy"), ("words", "ppl")):
        logged = valid((trained / kind / "log").read_text())
        (point,) = points.read_points(trained / kind / points.FILE)
        assert point["updates"] == UPDATES
        for name in ("loss", "nll_loss", *([key] if key else [])):
            assert point[name] == pytest.approx(logged[name], abs=1e-3), name
        own = {"masked": set(), "classes": {key}, "words": {key, "bits_per_byte"}}
        assert point.keys() & set(points.METRICS) == own[kind]
        (name,) = point["layers"]
        assert max(point["layers"][name]["load"]) == pytest.approx(
            logged["max_expert_share"], abs=1e-4
        )
        choices = points.load_choices(trained / kind / points.FILE, UPDATES + 1)
        tokens[kind] = len(choices[name])
    lines = (one_text_data / "raw" / "valid").read_text().splitlines()
    words = sum(len(line.split()) for line in lines)
    # The end of a sentence counts everywhere, and its beginning where there is one.
    assert tokens == {
        "masked": words + 2 * len(lines),
        "classes": words + 2 * len(lines),
        "words": words + len(lines),
    }
    # Of a word each letter and the space, or the end of the line, after it.
    size = sum(len(f"{line}\n".encode()) for line in lines)
    bits = point["nll_loss"] * tokens["words"]
    assert point["bits_per_byte"] == pytest.approx(bits / size, rel=1e-6)


# No randomness, plain SGD, and routing losses as large as the rest: a step is a gradient.
GRADIENT = {
    "optimizer": {
        "optimizer": "sgd",
        "lr": 1.0,
        "lr-scheduler": "fixed",
        "dropout": 0.0,
        "attention-dropout": 0.0,
    },
    "balance_weight": 1.0,
    "z_loss_weight": 0.1,
    "train_subset": "test1",  # 12 sentences: of the second update half of the workers have none
    "disable_validation": True,
    "curriculum": 1,
    "max_tokens": None,
    "max_update": 2,
    "no_epoch_checkpoints": True,
}


@pytest.mark.parametrize(
    ("kind", "spread"),
    [
        ("replaced", 1),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("masked", 1), ("classes", 1), ("words", 1), ("replaced", 2), ("words", 2))
        ),
    ],
)
def test_two_workers_take_the_steps_of_one(kind, spread, one_text_data, tmp_path, server):
    """Each with all experts, or half of them."""
    settings, data = KINDS[kind]
    arch = {**settings["arch"], "router": "switch", "jitter-eps": 0}
    # Of a head's model the one for masked tokens has no gradient.
    backend = "legacy_ddp" if kind == "classes" else "pytorch_ddp"
    settings = {**GRADIENT, **settings}
    del settings["arch"]
    for name, several in (("one", ()), ("two", (backend, 2))):
        train_on_workers(
            server,
            one_text_data / data,
            tmp_path / name,
            *several,
            batch_size=4 if several else 8,
            arch={**arch, "expert-parallel-size": spread if several else 1},
            **settings,
        )
    one, two = (parameters(tmp_path / name / "checkpoint_last.pt") for name in ("one", "two"))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.slow
def test_two_workers_measure_what_one_does(one_text_data, tmp_path, server):
    """Where a validation's measure is none that could be added up."""
    data = shutil.copytree(one_text_data, tmp_path / "data")
    for split in SENTENCES:
        lines = (data / "raw" / split).read_text().splitlines()
        scores = [f"{int(line.split()[0][1:]) / 24}\n" for line in lines]
        (data / "label" / f"{split}.label").write_text("".join(scores))
    flags = {"regression-target": True, "report-pearson-and-spearman": True}
    settings = {
        **GRADIENT,
        **CLASSES,
        "num_classes": 1,
        "criterion": {**CLASSES["criterion"], **flags},
        "arch": {**CLASSES["arch"], "router": "switch", "jitter-eps": 0},
        "disable_validation": None,
    }
    found = []
    for several in ((), ("legacy_ddp", 2)):
        folder, batch = tmp_path / f"{len(several)}", 4 if several else 8
        text = train_on_workers(server, data, folder, *several, batch_size=batch, **settings)
        # fairseq's own log has the predictions as an empty list.
        (line,) = [line for line in text.splitlines() if "| valid |" in line]
        found.append(json.loads(line[line.index("{") :]))
    assert abs(float(found[0]["valid_pearson"])) > 1
    for name in ("valid_pearson", "valid_spearman", "valid_loss"):
        assert float(found[1][name]) == pytest.approx(float(found[0][name]), abs=0.11), name


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["masked", "replaced"])
def test_fine_tuning_goes_on_from_what_was_pre_trained(
    kind, trained, one_text_data, tmp_path, server
):
    """From a file whose head is another: all but the heads begins as it ended."""
    checkpoint = trained / kind / "checkpoint_last.pt"
    settings = {**LIKE_PRETRAINING, **CLASSES, "finetune_from_model": checkpoint}
    still = {**LIKE_PRETRAINING["optimizer"], "lr": 1e-12}
    one_text.train(
        server, one_text_data, tmp_path / "still", **{**settings, "optimizer": still}, max_update=1
    )
    before = parameters(checkpoint)
    after = parameters(tmp_path / "still" / "checkpoint_last.pt")
    heads = [name for name in after if name.startswith("classification_heads.")]
    assert len(heads) == 4
    if kind == "replaced":  # of which there is neither generator nor head
        before = {k: v for k, v in before.items() if k.startswith("encoder.sentence_encoder.")}
        heads += [name for name in after if name.startswith("encoder.lm_head.")]
    assert set(before) == set(after) - set(heads)
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, msg=name)
    text = one_text.train(server, one_text_data, tmp_path / "run", max_update=60, **settings)
    assert valid(text)["accuracy"] >= 90  # the class is that of the first word


@pytest.mark.slow
def test_the_configs_train_and_fine_tune(one_text_data, tmp_path):
    """Fine-tuning from the checkpoint that pre-training left."""
    first, second = tmp_path / "first", tmp_path / "second"
    common = [
        f"common.user_dir={commands.PACKAGE}",
        "optimization.max_update=2",
        "lr_scheduler.warmup_updates=1",
    ]
    for name, data, folder, more in (
        ("pretraining", one_text_data / "input0", first, []),
        (
            "finetuning",
            one_text_data,
            second,
            ["task.num_classes=2", f"checkpoint.finetune_from_model={first}/checkpoint_best.pt"],
        ),
    ):
        folder.mkdir()
        overrides = [*common, f"task.data={data}", f"hydra.run.dir={folder}", *more]
        words = ["--config-dir", CONFIGS, "--config-name", name, *overrides]
        # The server knows this extension before hydra does; a process of its own does not.
        commands.run("fairseq_cli.hydra_train", *words)
    before, after = (parameters(folder / "checkpoint_best.pt") for folder in (first, second))
    name = "encoder.sentence_encoder.embed_tokens.weight"
    assert (after[name] - before[name]).abs().max() < 0.01
    assert any(name.startswith("classification_heads.") for name in after)


def test_a_fine_tuned_model_predicts_in_python(trained, one_text_data):
    model = SwitchRobertaModel.from_pretrained(
        str(trained / "classes"), "checkpoint_last.pt", str(one_text_data), bpe=None
    ).eval()
    tokens = torch.tensor([0, *model.task.source_dictionary.encode_line("e1 e20 e3").tolist()])
    assert model.extract_features(tokens).shape == (1, len(tokens), 32)
    scores = model.predict("sentence_classification_head", tokens)
    assert scores.exp().sum().item() == pytest.approx(1)


def test_a_discriminator_judges_text_in_python(trained, one_text_data):
    model = SwitchElectraModel.from_pretrained(
        str(trained / "replaced"), "checkpoint_last.pt", str(one_text_data / "input0"), bpe=None
    ).eval()
    tokens = torch.tensor([0, *model.task.source_dictionary.encode_line("e1 e20 e3").tolist()])
    assert model.extract_features(tokens).shape == (1, len(tokens), 32)
    assert model.model(tokens[None])[0].shape == (1, len(tokens))


def test_a_language_model_scores_text_in_python(trained, one_text_data):
    model = SwitchTransformerLanguageModel.from_pretrained(
        str(trained / "words"), "checkpoint_last.pt", str(one_text_data / "input0")
    ).eval()
    assert model.score("e1 e20 e3")["positional_scores"].shape == (3,)


def test_eval_lm_finds_what_training_found_and_what_a_byte_costs(trained, one_text_data, server):
    checkpoint = trained / "words" / "checkpoint_last.pt"
    data = one_text_data / "input0"
    settings = {"gen_subset": "valid", "sample_break_mode": "eos"}
    text = one_text.read(server, "fairseq_cli.eval_lm", data, checkpoint, **settings)
    loss, perplexity = map(float, re.search(r"Loss \(base 2\): (.*), Perpl.*: (.*)", text).groups())
    assert loss == pytest.approx(valid((trained / "words" / "log").read_text())["nll_loss"], 1e-3)
    assert perplexity == pytest.approx(2**loss, rel=1e-3)
    raw = (one_text_data / "raw" / "valid").read_text()
    tokens = len(raw.split()) + raw.count("\n")
    bits = float(re.search(r"Bits per byte: (.*)", text)[1])
    assert bits == pytest.approx(loss * tokens / len(raw.encode()), rel=1e-3)


# What does not go together


def test_a_pre_trained_model_of_another_vocabulary(trained, one_text_data, tmp_path, server):
    other = shutil.copytree(one_text_data, tmp_path / "other")
    with (other / "input0" / "dict.txt").open("a") as file:
        file.writelines(f"new{number} 1\n" for number in range(8))
    settings = {**CLASSES, "restore_file": trained / "masked" / "checkpoint_last.pt"}
    text = one_text.train(server, other, tmp_path / "run", status=2, max_update=1, **settings)
    assert re.fullmatch(r"error: .*embed_tokens.* \(33, 32\) there .* --srcdict.*", last_line(text))


WRONG = {
    "task of pairs": (
        {**MASKED, "task": "language_modeling"},
        "error: --task language_modeling .* choose --task masked_lm or sentence_prediction",
    ),
    "encoder's task": (
        {**WORDS, "task": "masked_lm"},
        "error: --arch switch_transformer_lm_demo and --task masked_lm and .* do not go together",
    ),
    "criterion of labels": (
        {**MASKED, "criterion": CLASSES["criterion"]},
        "error: --criterion sentence_prediction_with_routing needs --task sentence_prediction",
    ),
    "generator's task": (
        {**CLASSES, "arch": REPLACED["arch"]},
        "error: --task sentence_prediction .* choose --task masked_lm .* as switch_roberta",
    ),
    "fairseq's criterion": (
        {**REPLACED, "criterion": {"criterion": "masked_lm"}},
        "error: --arch switch_electra predicts no masked .* --criterion electra_with_routing",
    ),
    "criterion of text": (
        {**MASKED, "criterion": WORDS["criterion"]},
        "error: the --criterion is for a model that writes text",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_task_or_criterion_of_another_model(case, one_text_data, tmp_path, server):
    settings, message = WRONG[case]
    data = one_text_data / ("." if "num_classes" in settings else "input0")
    text = one_text.train(server, data, tmp_path / "run", status=2, max_update=1, **settings)
    assert re.match(message, last_line(text)), text[-2000:]
    assert "Traceback" not in text
