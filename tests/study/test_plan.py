"""The YAML file of a study."""

import json
from datetime import date
from pathlib import Path

import pytest
from support.small_study import TINY, write_plan

from fairseq_sparsemixer import cli
from fairseq_sparsemixer.errors import UserError
from fairseq_sparsemixer.study.engine import scoring_command
from fairseq_sparsemixer.study.plan import read_plan
from fairseq_sparsemixer.training.settings import CONFIGS, compose

WRONG_PLANS = [
    ({"arms": None}, "arms is missing"),
    ({"updates": 70}, "updates must be a multiple of evaluate_every"),
    ({"updates": True}, "updates must be a whole number"),
    ({"seeds": 1}, "seeds must be a list"),
    ({"seeds": [1, 1]}, "a seed stands in seeds twice"),
    ({"score": "all"}, "score must be last or best"),
    ({"score": ["last"]}, "score must be last or best"),
    (
        {"arms": {"a": {"router": "switch", "experts": 2, "options": {"a": date(2020, 1, 1)}}}},
        "arm a: options are not JSON",
    ),
    ({"overrides": ["common.user_dir=mine"]}, "common.user_dir is not set here"),
    ({"jobs": 0}, "jobs must be a whole number of at least 1"),
    ({"epochs": 3}, "there is no key epochs; see docs/study.md"),
    ({"arms": ["dense"]}, "arms must be names"),
    ({"arms": {"a/b": {"router": "dense"}}}, "arm a/b: a name has letters"),
    ({"arms": {"a=b": {"router": "dense"}}}, "arm a=b: a name has letters"),
    ({"arms": {"a": {"router": ["switch"]}}}, "arm a needs router"),
    ({"arms": {1: {"router": "dense"}, "1": {"router": "dense"}}}, "1 stands there twice"),
    ({"config": "../x"}, "config must be the name of one of configs/"),
    ({"overrides": ["optimization.max_epoch=1"]}, "max_epoch is not set here: use updates"),
    ({"overrides": ["optimization.stop_time_hours=1"]}, "is not set here: use --minutes"),
    (
        {"overrides": ["+checkpoint={save_dir: x}"]},
        "checkpoint is not set as a whole, since checkpoint.finetune_from_model is decided by",
    ),
    ({"finetune_from": ""}, "finetune_from must be a name"),
    ({"arms": {"a": {"experts": 4}}}, "arm a needs router"),
    ({"arms": {"a": {"router": "switch"}}}, "arm a: experts must be a whole number"),
    ({"arms": {"a": {"router": "dense", "experts": 2}}}, "is left out for dense"),
    ({"arms": {"a": {"router": "swich", "experts": 2}}}, "did you mean 'switch'"),
    ({"arms": {"a": {"router": "dense", "options": {}}}}, "arm a: options must be those of its"),
    (
        {"arms": {"a": {"router": "switch", "experts": 2, "options": ["gate"]}}},
        "arm a: options must be those of its router, such as {gate: full}",
    ),
    (
        {
            "arms": {
                "a": {
                    "router": "sparsemixer",
                    "experts": 2,
                    "options": {"gate": "full"},
                    "overrides": ["model.router_options='{}'"],
                }
            }
        },
        "arm a: model.router_options is not set here: use options",
    ),
    ({"overrides": ["dropout"]}, "overrides must be a list of KEY=VALUE"),
    ({"overrides": ["experts=two"]}, "experts is not set here: use router and experts"),
    ({"overrides": ["common.seed=3"]}, "common.seed is not set here: use seeds"),
    ({"arms": {"a" * 201: {"router": "dense"}}}, "200 at most"),
    ({"arms": {"a": {"router": "switch", "experts": 10**30}}}, "at most 2147483647"),
    ({"updates": 10**30}, "at most 2147483647"),
    ({"seeds": [2**31]}, "at most 2147483647"),
]


@pytest.mark.parametrize(("change", "message"), WRONG_PLANS)
def test_wrong_plans_are_told(tmp_path, change, message):
    path = write_plan(tmp_path / "plan.yaml", "data", **change)
    with pytest.raises(UserError, match=r"plan\.yaml") as error:
        read_plan(path)
    assert message in str(error.value)


def test_a_plan_that_is_no_yaml_is_told(tmp_path):
    odd = ("a: " + "[" * 3000, "a: 2026-99-99", "a: !!timestamp x", "a: !!int []", "? [a]\n: 1")
    for text in ("arms: [", "just words", "", "data: 5", "arms: {a: 1, a: 2}", *odd):
        (tmp_path / "plan.yaml").write_text(text)
        with pytest.raises(UserError, match="plan"):
            read_plan(tmp_path / "plan.yaml")


def test_names_are_taken_as_they_are_written(tmp_path):
    """For YAML 1.1 some are truth values, nothing, or numbers of other bases."""
    path = write_plan(tmp_path / "plan.yaml", "data", arms={"only": {"router": "dense"}})
    for name in ("no", "Yes", "null", "010", "8", "1e3", "0x10", "2026-01-01", "-x", "1_0"):
        text = path.read_text().replace("only:", f"{name}:")
        (tmp_path / "named.yaml").write_text(text)
        assert list(read_plan(tmp_path / "named.yaml").arms) == [name]
    path.write_text(path.read_text().replace("only:", "12:30:"))
    with pytest.raises(UserError, match=r"arm 12:30: a name has letters"):
        read_plan(path)


def test_numbers_are_taken_as_they_are_written(tmp_path):
    path = write_plan(tmp_path / "plan.yaml", "data")
    good = path.read_text()
    assert "updates: 90" in good
    for number in ("0132", "0x5a", "1:30", "0b1011010", "9" * 5000):
        path.write_text(good.replace("updates: 90", f"updates: {number}"))
        with pytest.raises(UserError, match=r"cannot read the plan"):
            read_plan(path)
    path.write_text(good.replace("updates: 90", "updates: 9_0"))
    assert read_plan(path).updates == 90


def test_arms_may_share_parts(tmp_path):
    arms = "arms:\n  a: &a {router: switch, experts: 2}\n  b:\n    <<: *a\n    experts: 4\n"
    path = write_plan(tmp_path / "plan.yaml", "data", arms=None)
    path.write_text(path.read_text().replace("arms: null\n", arms))
    assert read_plan(path).arms["b"][-1] == "model.num_experts=4"


def test_a_run_of_any_name_is_scored():
    command = scoring_command("-x-seed1", "last.pt", "-x-seed1/test.json", "--data=-data")
    args = cli.build_parser().parse_args(command[3:])
    assert args.run_dir == "-x-seed1"
    assert (args.data, args.output) == (Path("-data"), Path("-x-seed1/test.json"))


def test_runs_go_seed_by_seed(tmp_path):
    plan = read_plan(write_plan(tmp_path / "plan.yaml", "data", seeds=[3, 5]))
    assert [run.name for run in plan.runs()] == [
        "switch-2-seed3",
        "dense-seed3",
        "switch-2-seed5",
        "dense-seed5",
    ]
    assert plan.runs()[0].overrides == [
        *TINY, "model.router=switch", "model.num_experts=2", "common.seed=3"
    ]  # fmt: skip


def test_options_of_an_arm_are_those_of_its_router(tmp_path):
    options = {
        "choice": "full-sample",
        "gate": "one",
        "omega": False,
        "first_order_on_argmax": True,
    }
    arms = {"a": {"router": "composed", "experts": 2, "options": options}}
    plan = read_plan(write_plan(tmp_path / "plan.yaml", "data", arms=arms))
    cfg = compose(CONFIGS, [*plan.arms["a"], "checkpoint.save_dir=."], plan.config)
    assert json.loads(cfg.model.router_options) == options


def test_the_plans_that_come_with_it_can_be_read():
    paths = list((CONFIGS / "studies").glob("*.yaml"))
    assert paths
    for path in paths:
        assert read_plan(path).arms
