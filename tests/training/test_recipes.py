"""The configs of WMT14."""

import pytest
from support.routers import OF_ANY_TEXT
from support.wmt14 import CONFIGS, TINY_MODEL, compose

from fairseq_sparsemixer.moe.feed_forward import moe_layers
from fairseq_sparsemixer.runs.arms import build_variant
from fairseq_sparsemixer.training import plan, resources
from fairseq_sparsemixer.training.plan import Batch


def test_released_recipe_is_that_of_the_example():
    """The flags of example/run_moe.sh in github.com/microsoft/SparseMixer."""
    cfg = compose("recipe=released", "data=wmt14_en_de_moses")
    resources.build_on_meta(cfg.model, plan.make_task(cfg, 100))
    expected = {
        "dataset": {
            "num_workers": 8,
            "max_tokens": 8192,
            "skip_invalid_size_inputs_valid_test": True,
            "required_batch_size_multiple": 8,
        },
        "distributed_training": {"ddp_backend": "legacy_ddp"},
        "criterion": {"label_smoothing": 0.1, "balance_weight": 0.01},
        "model": {
            "share_all_embeddings": True,
            "encoder_layers": 6,
            "decoder_layers": 6,
            "encoder_embed_dim": 512,
            "decoder_ffn_embed_dim": 2048,
            "encoder_normalize_before": False,
            "decoder_normalize_before": False,
            "dropout": 0.1,
            "activation_dropout": 0.1,
            "attention_dropout": 0.1,
            "jitter_eps": 0.1,
            "moe_every": 2,
            "moe_offset": 0,
        },
        "optimizer": {"adam_betas": [0.9, 0.98], "weight_decay": 0.0},
        "lr_scheduler": {"warmup_updates": 8000, "warmup_init_lr": 1e-7},
        "optimization": {
            "max_update": 400_000,
            "lr": [0.0007],
            "update_freq": [16],
            "clip_norm": 0.0,
        },
        "common": {"fp16": True, "fp16_init_scale": 4, "fp16_scale_window": 256, "seed": 1},
        "checkpoint": {"best_checkpoint_metric": "loss", "save_interval": 10},
    }
    for section, values in expected.items():
        assert {key: cfg[section][key] for key in values} == values
    assert cfg.optimizer._name == "adam" and cfg.lr_scheduler._name == "inverse_sqrt"
    assert str(cfg.criterion.routing_loss) == "released"


def test_recommended_recipe_differs_where_it_says():
    recommended, released = compose(), compose("recipe=released")
    assert str(recommended.criterion.routing_loss) == "corrected"
    assert recommended.checkpoint.best_checkpoint_metric == "nll_loss"
    for section in ("model", "optimizer", "lr_scheduler", "optimization", "task"):
        assert recommended[section] == released[section]
    short = compose("schedule=short")
    assert short.lr_scheduler == recommended.lr_scheduler
    assert short.optimization.max_update == 100_000


@pytest.mark.parametrize("router", OF_ANY_TEXT)
def test_every_router_composes(router):
    tiny = [f"+model.{key}={value}" for key, value in TINY_MODEL.items()]
    cfg = compose(*build_variant(router, 6).overrides, *tiny)
    layers = list(moe_layers(resources.build_on_meta(cfg.model, plan.make_task(cfg, 100))))
    assert {layer.experts.num_experts for layer in layers} == {6}


def test_gpus_share_the_tokens_of_an_update():
    for number in ("one", "two", "four", "eight"):
        cfg = compose(f"gpus={number}")
        workers = cfg.distributed_training.distributed_world_size
        batch = Batch(workers, cfg.optimization.update_freq[0], cfg.dataset.max_tokens)
        assert batch.tokens_per_update == 16 * 8192
    assert workers == 8


@pytest.mark.filterwarnings("ignore")  # of hydra, about fairseq's way of naming its schema
def test_slurm_gives_a_job_the_gpus_of_the_run():
    import hydra
    from fairseq.dataclass.initialize import hydra_init

    hydra_init("wmt14")
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.1"):
        overrides = ["hydra/launcher=slurm", "gpus=four", "hydra.launcher.partition=p"]
        cfg = hydra.compose("wmt14", overrides, return_hydra_config=True)
    launcher = cfg.hydra.launcher
    assert launcher._target_.endswith("SlurmLauncher")
    assert (launcher.gpus_per_node, launcher.tasks_per_node, launcher.nodes) == (4, 1, 1)
    assert launcher.partition == "p"
    assert launcher.additional_parameters.requeue and launcher.max_num_timeout > 0
