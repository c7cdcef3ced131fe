"""fairseq-hydra-train, --user-dir and half precision."""

import shutil

import pytest
import torch
from support import commands
from support.commands import PACKAGE, SENTENCES, SIZE, flags, parameters
from support.training import LAYERS, assert_same, generate, log_of

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
        ("model.jitter_eps=-1", "--jitter-eps must be a number of at least 0, not -1.0"),
        ("task.data=missing", "missing"),
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
    # fairseq writes what it trained in half precision as float32.
    assert updates[-1]["loss_scale"] > 0
    assert {value.dtype for value in state.values() if value.is_floating_point()} == {torch.float32}
