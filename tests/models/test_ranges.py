"""Numbers of a training that make no sense are refused before it begins."""

import argparse
import math

import pytest
from fairseq import utils
from fairseq.dataclass.configs import FairseqConfig
from fairseq.trainer import Trainer
from omegaconf import OmegaConf, open_dict

from fairseq_sparsemixer.errors import UserError
from fairseq_sparsemixer.models.config import ConfigError
from fairseq_sparsemixer.models.ranges import RANGES, check_numbers
from fairseq_sparsemixer.training.settings import CONFIGS, compose


def settings(key=None, value=None):
    """fairseq's own, and one more."""
    cfg = OmegaConf.create(OmegaConf.to_container(OmegaConf.structured(FairseqConfig())))
    if key is not None:
        with open_dict(cfg):
            OmegaConf.update(cfg, key, value, force_add=True)
    return cfg


def test_what_fairseq_has_by_default_makes_sense():
    check_numbers(settings())
    for config in ("wmt14", "demo", "study"):
        check_numbers(compose(CONFIGS, ["checkpoint.save_dir=."], config))


@pytest.mark.parametrize("key", RANGES)
def test_no_number_is_refused(key):
    for value in (math.nan, [math.nan]):
        with pytest.raises(ConfigError, match=rf"^{key} \(--.*\) must be .*, not nan$"):
            check_numbers(settings(key, value))


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("criterion.label_smoothing", 1.5, "0 to 1"),
        ("criterion.label_smoothing", -0.1, "0 to 1"),
        ("model.attention_dropout", 2, "0 to 1"),
        ("optimization.lr", [0.1, -1.0], "0 to 1000"),
        ("optimization.lr", [math.inf], "0 to 1000"),
        ("optimization.update_freq", [0], "at least 1"),
        ("optimizer.adam_betas", "(0.9, 1.5)", "0 to 1"),
        ("common.log_interval", 0, "at least 1"),
        ("common.seed", -1, "0 to 2.14748e"),
        ("ema.ema_decay", 1.1, "0 to 1"),
    ],
)
def test_numbers_out_of_their_range(key, value, allowed):
    flag = key.split(".")[1].replace("_", "-")
    with pytest.raises(ConfigError) as error:
        Trainer(settings(key, value), None, None, None)
    assert str(error.value).startswith(f"{key} (--{flag}) must be {allowed}")


@pytest.mark.parametrize("betas", ["(0.9, 0.98)", "(.9, .98)", "(9E-1, 9.8e-1)", "[0, 1e-3]"])
def test_numbers_in_a_text_are_read_as_python_does(betas):
    check_numbers(settings("optimizer.adam_betas", betas))


@pytest.mark.parametrize(
    ("metric", "most", "cure"),
    [
        ("bleu", False, "add --maximize-best-checkpoint-metric"),
        ("accuracy", False, "add --maximize-best-checkpoint-metric"),
        ("nll_loss", True, "leave it out"),
    ],
)
def test_the_worst_is_not_kept_as_the_best(metric, most, cure):
    cfg = settings("checkpoint.best_checkpoint_metric", metric)
    cfg.checkpoint.maximize_best_checkpoint_metric = most
    with pytest.raises(ConfigError, match=f"{metric} would keep the worst .*: {cure}$"):
        Trainer(cfg, None, None, None)


def test_a_seed_is_looked_at_before_it_is_used():
    """By fairseq-train and fairseq-generate, which hand it to numpy."""
    with pytest.raises(ConfigError, match=r"^common.seed \(--seed\) must be 0 to .*, not -1$"):
        utils.import_user_module(argparse.Namespace(user_dir=None, seed=-1))


def test_our_commands_find_out_before_they_start_anything():
    with pytest.raises(UserError, match=r"--label-smoothing\) must be 0 to 1, not nan"):
        compose(CONFIGS, ["checkpoint.save_dir=.", "criterion.label_smoothing=nan"], "study")
