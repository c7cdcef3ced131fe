"""Settings of a run that hydra refuses, or that no model can be built of."""

import pytest

from fairseq_sparsemixer.errors import UserError
from fairseq_sparsemixer.training import resources
from fairseq_sparsemixer.training.plan import make_task
from fairseq_sparsemixer.training.settings import CONFIGS, compose

WHERE = "checkpoint.save_dir=."


@pytest.mark.parametrize(
    "override",
    ["common.fp16=${nope}", "common.fp16=${common.fp16}", "common.seed=${oc.env:NOPE_NOPE}", "=",
     "~common", "optimization.lr=abc", "common.fp16=${", "model=[1,2]"],
)  # fmt: skip
def test_what_refers_to_nothing_is_told(override):
    with pytest.raises(UserError, match=r"^hydra: "):
        compose(CONFIGS, [WHERE, override], "wmt14")


def test_a_model_that_cannot_be_built_is_told():
    for override in (f"+model.encoder_embed_dim={10**30}", "+model.max_source_positions=-5"):
        cfg = compose(CONFIGS, [WHERE, "model=base", override], "wmt14")
        with pytest.raises(UserError, match=r"cannot build a model|must be"):
            resources.build_on_meta(cfg.model, make_task(cfg, 100))
