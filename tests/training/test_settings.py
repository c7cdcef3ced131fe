"""Settings of a run that hydra refuses, or that no model can be built of."""

import pytest

from fairseq_sparsemixer.errors import UserError
from fairseq_sparsemixer.training import resources
from fairseq_sparsemixer.training.plan import make_task
from fairseq_sparsemixer.training.settings import CONFIGS, compose, quoted

WHERE = "checkpoint.save_dir=."


@pytest.mark.parametrize(
    "override",
    ["common.fp16=${nope}", "common.fp16=${common.fp16}", "common.seed=${oc.env:NOPE_NOPE}", "=",
     "~common", "optimization.lr=abc", "common.fp16=${", "model=[1,2]"],
)  # fmt: skip
def test_what_refers_to_nothing_is_told(override):
    with pytest.raises(UserError, match=r"^hydra: "):
        compose(CONFIGS, [WHERE, override], "wmt14")


@pytest.mark.parametrize(
    "text", ["runs/x-1.pt", "jürgen/日本", "a b,c=(d)", "it's", "back\\", "a\\'b", "a\\b", '"x"']
)
def test_a_path_is_taken_as_it_is(text):
    assert (
        compose(CONFIGS, [f"checkpoint.save_dir={quoted(text)}"], "demo").checkpoint.save_dir
        == text
    )


@pytest.mark.parametrize(("one", "other"), [("fp16", "bf16"), ("fp16", "amp"), ("bf16", "amp")])
def test_two_precisions_at_once_are_refused(one, other):
    """fairseq would take fp16 without a loss scale, end at an assertion, and leave out amp."""
    message = rf"common\.{one} \(--{one}\) and common\.{other} \(--{other}\) are both set"
    with pytest.raises(UserError, match=message):
        compose(CONFIGS, [WHERE, f"common.{one}=true", f"common.{other}=true"], "demo")


@pytest.mark.parametrize("name", ["demo", "finetuning", "iwslt14", "language_model", "pretraining"])
def test_one_process_trains_unless_more_are_asked_for(name, monkeypatch):
    """fairseq would start one for each GPU, with cpu: true as well."""
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert compose(CONFIGS, [WHERE], name).distributed_training.distributed_world_size == 1


def test_a_model_that_cannot_be_built_is_told():
    for override in (f"+model.encoder_embed_dim={10**30}", "+model.max_source_positions=-5"):
        cfg = compose(CONFIGS, [WHERE, "model=base", override], "wmt14")
        with pytest.raises(UserError, match=r"cannot build a model|must be"):
            resources.build_on_meta(cfg.model, make_task(cfg, 100))
