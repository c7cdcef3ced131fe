"""The configs: what can be started, and each choice of each group of it."""

import runpy
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from fairseq_sparsemixer.corpora.glue import TASKS
from fairseq_sparsemixer.runs.settings import read_settings
from fairseq_sparsemixer.tasks.translation_with_routing import TranslationWithRoutingConfig
from fairseq_sparsemixer.training import resources, settings
from fairseq_sparsemixer.training.plan import make_task

CONFIGS = Path(__file__).parents[1] / "configs"
ENTRIES = ("demo", "study", "iwslt14", "wmt14")
ONE_TEXT = ("pretraining", "electra", "finetuning")
WORDS = "language_model"


def choices(entry):
    """(group, choice) of every group that an entry point names in its defaults."""
    defaults = yaml.safe_load((CONFIGS / f"{entry}.yaml").read_text())["defaults"]
    groups = [group for each in defaults if isinstance(each, dict) for group in each]
    return [(group, path.stem) for group in groups for path in (CONFIGS / group).glob("*.yaml")]


def compose(entry, *overrides):
    return settings.compose(CONFIGS, ["checkpoint.save_dir=unused", *overrides], entry)


def test_what_lies_at_the_top_can_be_started():
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == {*ENTRIES, *ONE_TEXT, WORDS}


def test_what_is_pre_trained_can_be_fine_tuned():
    masked, replaced, tuned = (compose(entry, "model.router=switch") for entry in ONE_TEXT)
    for dense in (compose(entry, "model.encoder_moe_layers=none") for entry in ONE_TEXT):
        assert "model.router" not in read_settings(OmegaConf.to_container(dense, enum_to_str=True))
    for cfg in (masked, replaced, tuned):
        assert not OmegaConf.missing_keys(cfg)
        OmegaConf.to_container(cfg, resolve=True)
    assert masked.model == tuned.model
    for cfg in (masked, replaced):
        assert cfg.task.tokens_per_sample == tuned.task.max_positions == tuned.model.max_positions
    assert (masked.criterion._name, replaced.criterion._name) == (
        "masked_lm_with_routing",
        "electra_with_routing",
    )
    differing = {"_name", "generator_embed_dim", "generator_layers"}
    for key in replaced.model.keys() | masked.model.keys():
        assert key in differing or replaced.model[key] == masked.model[key]


def test_every_task_of_glue_composes():
    """Each is scored by what its best checkpoint is chosen by."""
    assert {path.stem for path in (CONFIGS / "glue").glob("*.yaml")} == {
        task.lower() for task in TASKS
    }
    scored = runpy.run_path(str(CONFIGS.parent / "scripts" / "glue_scores.py"))["MEASURES"]
    for task, (best_by, measures) in scored.items():
        cfg = compose("finetuning", f"+glue={task.lower()}")
        assert not OmegaConf.missing_keys(cfg)
        OmegaConf.to_container(cfg, resolve=True)
        assert cfg.checkpoint.best_checkpoint_metric == best_by
        assert cfg.checkpoint.maximize_best_checkpoint_metric
        assert cfg.dataset.valid_subset.split(",") == list(
            dict.fromkeys(part for part, *_ in measures)
        )
        assert (
            cfg.task.shorten_method == "truncate" and cfg.dataset.required_batch_size_multiple == 1
        )


@pytest.mark.parametrize("entry", ENTRIES)
def test_every_choice_of_every_group_composes(entry):
    """All are meant: to settings that can be resolved, and models that can be built."""
    for group, choice in [("common.seed", "1"), *choices(entry)]:
        cfg = compose(entry, f"{group}={choice}")
        assert not OmegaConf.missing_keys(cfg), (group, choice)
        OmegaConf.to_container(cfg, resolve=True)
        if group in ("model", "experts"):
            resources.build_on_meta(cfg.model, make_task(cfg, 100))


@pytest.mark.parametrize("entry", ENTRIES)
def test_experts_are_given_alike_everywhere(entry):
    assert compose(entry).model.num_experts == 4
    eight = compose(entry, "experts=eight")
    assert eight.model.num_experts == 8
    assert eight == compose(entry, "model.num_experts=8")
    dense = OmegaConf.to_container(compose(entry, "experts=dense"), enum_to_str=True)
    assert "model.router" not in read_settings(dense)


@pytest.mark.parametrize("entry", ENTRIES)
def test_batches_are_those_of_their_epoch_after_a_restart_too(entry):
    cfg = compose(entry)
    assert cfg.dataset.update_epoch_batch_itr is True
    assert read_settings(OmegaConf.to_container(cfg))["dataset.update_epoch_batch_itr"] is True
    without = OmegaConf.to_container(compose(entry, "dataset.update_epoch_batch_itr=false"))
    assert "dataset.update_epoch_batch_itr" not in read_settings(without)


def test_translations_of_a_point_are_as_many_as_the_task_makes_by_itself():
    assert compose("study").task.points_sentences == TranslationWithRoutingConfig.points_sentences
    assert compose("demo").task.points_sentences == 0
