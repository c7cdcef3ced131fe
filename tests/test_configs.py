"""The configs: what can be started, and each choice of each group of it."""

from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from fairseq_sparsemixer.runs.settings import read_settings
from fairseq_sparsemixer.tasks.translation_with_routing import TranslationWithRoutingConfig
from fairseq_sparsemixer.training import resources, settings
from fairseq_sparsemixer.training.plan import make_task

CONFIGS = Path(__file__).parents[1] / "configs"
ENTRIES = ("demo", "study", "iwslt14", "wmt14")
ONE_TEXT = ("pretraining", "finetuning")
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
    before, after = (compose(entry, "model.router=switch") for entry in ONE_TEXT)
    for dense in (compose(entry, "model.encoder_moe_layers=none") for entry in ONE_TEXT):
        assert "model.router" not in read_settings(OmegaConf.to_container(dense, enum_to_str=True))
    for cfg in (before, after):
        assert not OmegaConf.missing_keys(cfg)
        OmegaConf.to_container(cfg, resolve=True)
    assert before.model == after.model
    assert before.task.tokens_per_sample == after.task.max_positions == after.model.max_positions


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
