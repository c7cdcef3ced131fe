"""The YAML file of a study: which models, which seeds, how long, and when they are measured.

  data: data/debian          # a prepared corpus
  updates: 2000
  evaluate_every: 200        # validation, point and checkpoint
  seeds: [1, 2]
  arms:
    dense: {router: dense}
    switch-4: {router: switch, experts: 4}
    switch-4-released: {router: switch, experts: 4, overrides: [criterion.routing_loss=released]}
    full-gate-4: {router: sparsemixer, experts: 4, options: {gate: full}}  # --router-options

Further keys, with their defaults: ``config: study`` (of configs/, which says what the task is),
``language`` (of the corpus, for tasks of one text), ``finetune_from`` (a finished study: each run
begins with the model of its arm and seed there), ``jobs: 1`` (models trained at once), ``score:
last`` (or ``best``: the checkpoint that is scored on the test set), ``beam: 4`` (of its
translation), ``overrides: []`` (hydra's, of every arm).
"""

import json
import re
from pathlib import Path
from typing import Any, Dict, FrozenSet, List, Mapping, NamedTuple, Optional

import yaml

from fairseq_sparsemixer.errors import UserError
from fairseq_sparsemixer.evaluation.options import LARGEST
from fairseq_sparsemixer.runs.arms import DENSE, Variant, build_variant
from fairseq_sparsemixer.runs.mending import BEST, LAST
from fairseq_sparsemixer.training.settings import overridden, quoted, refuse_decided

_NAME = re.compile(r"[A-Za-z0-9_.-]{1,200}")  # a folder, and a value for hydra
_ARM_KEYS = {"router", "experts", "options", "overrides"}
CHECKPOINTS = {"last": LAST, "best": BEST}
"""What can be scored: the end, or the update with the lowest validation loss."""
_MOST = f", at most {LARGEST}"


class Plan(NamedTuple):
    """What :func:`read_plan` reads.

    Attributes:
        data: the prepared corpus.
        config: of ``configs/``.
        language: of the corpus; None where the task takes pairs.
        finetune_from: folder of a study, if any.
        updates, evaluate_every: of the parameters.
        seeds: of ``common.seed``.
        jobs: models trained at once.
        score: the checkpoint that is scored on the test set, one of :data:`CHECKPOINTS`.
        beam: of the final translation of the test set.
        arms: the overrides of each, common ones first.
        until_the_end: settings of the learning rate that the config ties to the last update, found
            when the study is laid out.
    """

    data: Path
    config: str
    language: Optional[str]
    finetune_from: Optional[Path]
    updates: int
    evaluate_every: int
    seeds: List[int]
    jobs: int
    score: str
    beam: int
    arms: Dict[str, List[str]]
    until_the_end: FrozenSet[str] = frozenset()

    def runs(self) -> List[Variant]:
        """All of them, seed by seed: however early a study is stopped, arms can be compared."""
        return [
            Variant(f"{arm}-seed{seed}", [*overrides, f"common.seed={seed}"])
            for seed in self.seeds
            for arm, overrides in self.arms.items()
        ]


class _Loader(yaml.SafeLoader):
    """Takes names and numbers as they are written, or not at all.

    For YAML 1.1 the keys ``no``, ``null``, ``010`` and ``12:30`` would be False, None, 8 and 750,
    the number 010 would be 8, and of a key that stands twice one would be dropped without a word.
    """

    def construct_mapping(self, node: Any, deep: bool = False) -> Dict[Any, Any]:
        if isinstance(node, yaml.MappingNode):
            keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            for key in keys:
                if keys.count(key) > 1:
                    raise yaml.YAMLError(f"{key} stands there twice")
            self.flatten_mapping(node)  # before "<<" becomes a name, too
            for key, _ in node.value:
                if isinstance(key, yaml.ScalarNode):
                    key.tag = "tag:yaml.org,2002:str"
        return super().construct_mapping(node, deep)

    def construct_plain_int(self, node: Any) -> int:
        """A number that is what it looks like."""
        if not re.fullmatch(r"[-+]?(0|[1-9][0-9_]*)", str(node.value)):
            raise yaml.YAMLError(f"{node.value} is no plain number: quote it, or write it decimal")
        return self.construct_yaml_int(node)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_plain_int)


def read_plan(path: Path) -> Plan:
    """Read and check a plan.

    Raises:
        UserError: it cannot be read, or a value is missing, unknown or out of range.
    """
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (OSError, ValueError, AttributeError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"cannot read the plan {path}: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is no plan of a study: it holds no keys such as arms and seeds")
    values = {
        **{"config": "study", "jobs": 1, "score": "last", "beam": 4, "overrides": []},
        **{"language": None, "finetune_from": None},
        **content,
    }
    for key in ("data", "updates", "evaluate_every", "seeds", "arms"):
        if not values.get(key):
            raise UserError(f"{path}: {key} is missing")
    unknown = sorted(values.keys() - ({*Plan._fields, "overrides"} - {"until_the_end"}))
    if unknown:
        raise UserError(f"{path}: there is no key {unknown[0]}; see docs/study.md")
    for key in ("updates", "evaluate_every", "jobs", "beam"):
        _check(_is_count(values[key]), path, f"{key} must be a whole number of at least 1{_MOST}")
    for key in ("data", "config", "language", "finetune_from"):
        optional = values[key] is None and key not in ("data", "config")
        named = isinstance(values[key], str) and values[key]
        _check(optional or named, path, f"{key} must be a name")
    _check(values["score"] in [*CHECKPOINTS], path, f"score must be {' or '.join(CHECKPOINTS)}")
    _check(_NAME.fullmatch(values["config"]), path, "config must be the name of one of configs/")
    language = values["language"]
    _check(language is None or _NAME.fullmatch(language), path, "language must be one of the data")
    _check(
        _is_list(values["seeds"]) and all(map(_is_count, values["seeds"])),
        path,
        f"seeds must be a list of whole numbers of at least 1, such as [1, 2]{_MOST}",
    )
    _check(len({*values["seeds"]}) == len(values["seeds"]), path, "a seed stands in seeds twice")
    _check(
        values["updates"] % values["evaluate_every"] == 0,
        path,
        "updates must be a multiple of evaluate_every",
    )
    common = _overrides(values.pop("overrides"), path, "overrides")
    _check(isinstance(values["arms"], dict), path, "arms must be names with what they are")
    arms = {name: [*common, *_arm(name, arm, path)] for name, arm in values["arms"].items()}
    before = values["finetune_from"]
    values.update(data=Path(values["data"]), finetune_from=before and Path(before), arms=arms)
    return Plan(**values)


def _arm(name: str, arm: Any, path: Path) -> List[str]:
    _check(
        _NAME.fullmatch(name),
        path,
        f"arm {name}: a name has letters A to Z, digits and any of _.-, 200 at most",
    )
    _check(
        isinstance(arm, dict) and isinstance(arm.get("router"), str) and arm.keys() <= _ARM_KEYS,
        path,
        f"arm {name} needs router, and may have experts, options and overrides",
    )
    router, experts = arm["router"], arm.get("experts")
    _check(
        experts is None if router == DENSE else _is_count(experts),
        path,
        f"arm {name}: experts must be a whole number of at least 1 (and is left out for dense)"
        f"{_MOST}",
    )
    try:
        built = build_variant(router, experts or 0)
    except UserError as error:
        raise UserError(f"{path}: arm {name}: {error}") from None
    overrides = _overrides(arm.get("overrides", []), path, f"arm {name}: overrides")
    return [*built.overrides, *_options(name, arm, overrides, path), *overrides]


def _options(name: str, arm: Dict[str, Any], overrides: List[str], path: Path) -> List[str]:
    """The override that the options of an arm's router are."""
    if "options" not in arm:
        return []
    options = arm["options"]
    _check(
        isinstance(options, dict) and arm["router"] != DENSE,
        path,
        f"arm {name}: options must be those of its router, such as {{gate: full}}",
    )
    _check(
        "model.router_options" not in overridden(overrides),
        path,
        f"arm {name}: model.router_options is not set here: use options",
    )
    try:
        text = json.dumps(options)
    except (TypeError, ValueError) as error:  # dates, and what refers to itself
        raise UserError(f"{path}: arm {name}: options are not JSON: {error}") from None
    return [f"model.router_options={quoted(text)}"]


def _overrides(values: Any, path: Path, what: str) -> List[str]:
    _check(
        _is_list(values) and all(isinstance(value, str) and "=" in value for value in values),
        path,
        f"{what} must be a list of KEY=VALUE, such as [model.jitter_eps=0.2]",
    )
    refuse_decided(values, _MADE_HERE, f"{path}: {what}: ")
    return list(values)


_MADE_HERE: Mapping[str, str] = {
    "common.seed": "seeds",
    "task.data": "data",
    "checkpoint.finetune_from_model": "finetune_from",
    "optimization.max_update": "updates",
    "optimization.max_epoch": "updates",
    "optimization.stop_time_hours": "--minutes",
    "distributed_training.distributed_world_size": "jobs: a run takes one GPU",
    "dataset.validate_interval_updates": "evaluate_every",
    "checkpoint.save_interval_updates": "evaluate_every",
    "checkpoint.save_dir": "--output",
    "hydra.run.dir": "--output",
    "model.router": "router",
    "model.num_experts": "experts",
    "experts": "router and experts",
}
"""Settings that the study makes itself, and what decides them."""


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= LARGEST


def _is_list(value: Any) -> bool:
    return isinstance(value, list)


def _check(holds: Any, path: Path, message: str) -> None:
    if not holds:
        raise UserError(f"{path}: {message}")
