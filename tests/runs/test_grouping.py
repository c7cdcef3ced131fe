"""Which runs are one arm, and what it is called."""

from pathlib import Path

from omegaconf import OmegaConf
from support.run_folders import config

from fairseq_sparsemixer.runs import grouping, settings
from fairseq_sparsemixer.runs.folder import Run


def names(*configs):
    """The names of arms of runs with these settings, and how many runs each has."""
    found = [
        Run(
            folder=Path(str(number)),
            settings=settings.read_settings(OmegaConf.to_container(each)),
            seed=each.common.seed,
            max_update=each.optimization.max_update,
            log=None,
            scores_path=None,
            evaluation={},
            record={},
            note="",
        )
        for number, each in enumerate(configs)
    ]
    return {arm.name: len(arm.runs) for arm in grouping.group_runs(found)}


def test_names_of_arms():
    assert names(config("dense"), config("switch", 8), config("switch", 8, seed=2)) == {
        "dense": 1,
        "switch-8": 2,
    }
    jitter = {"model.jitter_eps": 0.2}
    assert names(config(), config(seed=2), config(**jitter), config("hash", **jitter)) == {
        "switch-4,jitter_eps=0.1": 2,
        "switch-4,jitter_eps=0.2": 1,
        "hash-4": 1,
    }
    released = {"criterion.routing_loss": "released", "optimization.lr": [0.001]}
    assert names(config(), config(**released)) == {
        "switch-4,routing_loss=corrected,lr=[0.002]": 1,
        "switch-4,routing_loss=released,lr=[0.001]": 1,
    }
    # Two settings of one short name, and one that only one run has.
    both = {"model.weight_decay": 0.1, "optimizer.weight_decay": 0.2, "model._name": "other"}
    assert list(names(config("dense"), config("dense", **both))) == [
        "dense,model._name=switch_transformer_demo,model.weight_decay=unset,"
        "optimizer.weight_decay=unset",
        "dense,model._name=other,model.weight_decay=0.1,optimizer.weight_decay=0.2",
    ]
    assert list(names(config("dense"), config("dense", **{"model._name": "transformer"}))) == [
        "dense,arch=switch_transformer_demo",
        "dense,arch=transformer",
    ]


def test_what_makes_no_arm_of_its_own():
    """Defaults, what a dense model does not use, where files are, how a batch is spread."""
    old, new = config(), config(seed=2, **{"model.balance_bias_rate": 0.0, "model.top_k": 1})
    assert names(old, new) == {"switch-4": 2}
    unused = {"model.jitter_eps": 0.3, "criterion.balance_weight": 0.5, "model.num_experts": 16}
    assert names(config("dense"), config("dense", seed=2, **unused)) == {"dense": 2}
    elsewhere = {
        **{"checkpoint.save_dir": "x", "common.user_dir": "y", "common.log_interval": 3},
        **{"model.moe_backend": "loop", "optimization.stop_time_hours": 2.0},
    }
    assert names(config(), config(seed=2, **elsewhere)) == {"switch-4": 2}
    four = {"optimization.update_freq": [4]}
    spread = {"distributed_training.distributed_world_size": 2, "dataset.max_tokens": 1600}
    assert names(config(**four), config(seed=2, **spread)) == {"switch-4": 2}
    assert names(config(**four), config(seed=2, **{"optimization.update_freq": [2]})) == {
        "switch-4,tokens_per_update=[3200]": 1,
        "switch-4,tokens_per_update=[1600]": 1,
    }
    by_sentences = {"dataset.max_tokens": None, "dataset.batch_size": 32}
    two = {"distributed_training.distributed_world_size": 2, "optimization.update_freq": [2]}
    made = [config(seed=n, **by_sentences, **each) for n, each in enumerate((four, two, {}))]
    assert names(*made) == {"switch-4,update_freq=[4]": 2, "switch-4,update_freq=[1]": 1}


def test_a_plain_transformer_of_fairseq_is_dense(place):
    folder = place.run("d", router="dense")
    made = OmegaConf.load(folder / ".hydra" / "config.yaml")
    made.model = {"_name": "transformer_wmt_en_de", "dropout": 0.1}
    made.criterion = {"_name": "label_smoothed_cross_entropy"}
    OmegaConf.save(made, folder / ".hydra" / "config.yaml")
    _, rows, _ = place.table(baseline="dense")
    assert rows["dense"]["router"] is None


def test_models_of_one_side_without_experts_are_dense():
    for name, side in (("switch_roberta_tiny", "encoder"), ("switch_transformer_lm", "decoder")):
        model = {"_name": name, "router": "switch", "num_experts": 4}
        with_experts = settings.read_settings({"model": model})
        assert with_experts["model.router"] == "switch"
        dense = settings.read_settings({"model": {**model, f"{side}_moe_layers": "none"}})
        assert "model.router" not in dense


def test_experts_ascend(place):
    for experts in (16, 2, 8):
        place.run(f"s{experts}", experts=experts)
    _, rows, _ = place.table(baseline="switch-2")
    assert list(rows) == ["switch-2", "switch-8", "switch-16"]
