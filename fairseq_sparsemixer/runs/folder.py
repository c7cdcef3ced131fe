"""Runs of training: what their folders hold, and which differ by the seed alone.

A run folder is what ``fairseq-hydra-train`` and ``fairseq-sparsemixer evaluate`` write: hydra's
``.hydra/config.yaml``, ``hydra_train.log``, ``evaluation/*.json``, and ``run.json`` where
``fairseq-sparsemixer train`` started it.
"""

import argparse
import dataclasses
import json
import math
from pathlib import Path
from typing import Any, Dict, Iterable, List, NamedTuple, Optional, Sequence

from fairseq_sparsemixer.errors import UserError
from fairseq_sparsemixer.runs.logs import TrainingLog, Validation, read_log

CONFIG = Path(".hydra", "config.yaml")
LOG = "hydra_train.log"
ROUTING = Path("evaluation", "routing.json")
"""What ``fairseq-sparsemixer report`` keeps there: no evaluation."""


@dataclasses.dataclass
class Run:
    """What a run folder holds.

    Attributes:
        folder: of the run.
        settings: what was trained, as ``{"model.dropout": 0.1, ...}``; those of the experts are
            left out where the model is dense.
        seed, max_update: as configured.
        log: None without a log.
        scores_path: the evaluation's JSON file, if there is one.
        evaluation: its content, or empty.
        record: the content of ``run.json``, or empty.
        note: why the run does not count; empty if it does.
    """

    folder: Path
    settings: Dict[str, Any]
    seed: int
    max_update: int
    log: Optional[TrainingLog]
    scores_path: Optional[Path]
    evaluation: Dict[str, Any]
    record: Dict[str, Any]
    note: str

    @property
    def name(self) -> str:
        """Router and number of experts, or ``dense``."""
        if "model.router" not in self.settings:
            return "dense"
        return f"{self.settings['model.router']}-{self.settings['model.num_experts']}"

    @property
    def validations(self) -> List[Validation]:
        """All validations, by ascending updates."""
        return self.log.validations if self.log else []

    @property
    def scores(self) -> Dict[str, Any]:
        """The scores by metric, such as ``{"bleu": {"score": ..., "signature": ...}}``."""
        return self.evaluation.get("scores", {})

    @property
    def parameters(self) -> Dict[str, Optional[int]]:
        """The numbers of parameters, ``total`` and ``active`` for a token; None if not known."""
        if "parameters" in self.record:
            return {key: self.record["parameters"].get(key) for key in ("total", "active")}
        total = self.log.parameters if self.log else None
        return {"total": total, "active": total if self.name == "dense" else None}


class Arm(NamedTuple):
    """Runs that differ by the seed alone, by ascending seed."""

    name: str
    runs: List[Run]

    @property
    def counted(self) -> List[Run]:
        """Those that are finished and scored."""
        return [run for run in self.runs if not run.note]


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that :func:`read_arms` goes by: ``RUN...`` and ``--scores``."""
    parser.add_argument(
        "runs",
        nargs="+",
        type=Path,
        metavar="RUN",
        help="a run folder, or a folder that holds run folders",
    )
    parser.add_argument(
        "--scores",
        metavar="NAME",
        help="which evaluation to take where a run has several, such as test.checkpoint_best for "
        "RUN/evaluation/test.checkpoint_best.json",
    )


def read_arms(paths: Iterable[Path], scores: Optional[str]) -> List[Arm]:
    """The arms of all runs that ``paths`` are or hold.

    Raises:
        UserError: there is no run, none has the evaluation ``scores``, or a file is damaged.
    """
    runs = [read_run(folder, scores) for folder in find_runs(paths)]
    if scores is not None and not any(run.scores_path for run in runs):
        raise UserError(
            f"no run has an evaluation named {scores}; check --scores, or run "
            "`fairseq-sparsemixer evaluate` first"
        )
    return group_runs(runs)


def find_runs(paths: Iterable[Path]) -> List[Path]:
    """The run folders that ``paths`` are or hold, each once, in that order.

    Raises:
        UserError: a path is no folder, or holds no run.
    """
    folders: Dict[Path, Path] = {}
    for path in paths:
        if not path.is_dir():
            raise UserError(f"there is no folder {path}; give RUN a folder of runs")
        if (path / CONFIG).is_file():
            found = [path]
        else:
            found = sorted(config.parents[1] for config in path.rglob(str(CONFIG)))
        if not found:
            raise UserError(
                f"{path} holds no run of fairseq-hydra-train (a folder with {CONFIG}); give RUN "
                "the folder that training wrote to"
            )
        for folder in found:
            folders.setdefault(folder.resolve(), folder)
    return list(folders.values())


def read_run(folder: Path, scores: Optional[str] = None) -> Run:
    """Read one run folder; the evaluation is the one named ``scores``, or the only one.

    Raises:
        UserError: a file is damaged, or there are several evaluations to choose from.
    """
    config = _read_config(folder / CONFIG)
    subsets = (config.get("dataset") or {}).get("valid_subset", "valid")
    log = read_log(folder / LOG, subsets.split(",")[0]) if (folder / LOG).is_file() else None
    scores_path = find_scores(folder, scores)
    record = folder / "run.json"
    found = Run(
        folder=folder,
        settings=read_settings(config),
        seed=config["common"]["seed"],
        max_update=config["optimization"]["max_update"],
        log=log,
        scores_path=scores_path,
        evaluation=_read_json(scores_path) if scores_path else {},
        record=_read_json(record) if record.is_file() else {},
        note="",
    )
    found.note = _why_it_does_not_count(found, scores)
    return found


def _why_it_does_not_count(run: Run, scores: Optional[str]) -> str:
    if run.log is None:
        return f"there is no {LOG}"
    if not run.validations:
        return f"{LOG} holds no validation"
    last = run.validations[-1]
    if not (run.log.ended or last.updates >= run.max_update > 0):
        return f"unfinished, {last.updates} of {run.max_update or 'no set number of'} updates"
    if not math.isfinite(last.nll_loss):
        return f"its last validation nll is {last.nll_loss}"
    if not run.evaluation:
        named = "" if scores is None else f" as {scores}"
        return f"not scored{named}; `fairseq-sparsemixer evaluate {run.folder}` does it"
    for checkpoint in run.evaluation["checkpoints"]:
        # The one name that says how far training was.
        if checkpoint["name"] == "checkpoint_last.pt" and checkpoint["updates"] < last.updates:
            return f"scored at {checkpoint['updates']} of {last.updates} updates; evaluate it again"
    return ""


def _read_config(path: Path) -> Dict[str, Any]:
    import yaml
    from omegaconf import OmegaConf

    try:
        # Unresolved: hydra's own interpolations have no meaning here.
        config = OmegaConf.to_container(OmegaConf.load(path))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"cannot read {path} ({reason}); leave its folder out of RUN") from error
    sections = ("common", "optimization", "model")
    if not isinstance(config, dict) or any(not config.get(section) for section in sections):
        raise UserError(f"{path} is not a config of fairseq; leave its folder out of RUN")
    return {str(section): values for section, values in config.items()}


_WHOLE_SECTIONS = (
    "model",
    "criterion",
    "task",
    "optimizer",
    "lr_scheduler",
    "optimization",
    "ema",
)
_PARTS = {
    "dataset": (
        "train_subset",
        "valid_subset",
        "max_tokens",
        "batch_size",
        "required_batch_size_multiple",
        "curriculum",
    ),
    "common": ("fp16", "memory_efficient_fp16", "bf16", "memory_efficient_bf16", "amp"),
    "checkpoint": ("finetune_from_model",),
}
"""What else decides how a model trains. The rest says where files are, or what is logged."""
_WITHOUT_EFFECT = (
    "task.points_file",
    "task.points_text",
    "task.points_sentences",
    "task.points_beam",
    "optimization.stop_time_hours",
    "model.moe_backend",
    "model.moe_recompute",
    "model.moe_inference_dtype",
)


def read_settings(config: Dict[str, Any]) -> Dict[str, Any]:
    """What decides how a run trains, its seed aside, as ``{"model.dropout": 0.1, ...}``.

    Settings of the experts that the config does not mention have their defaults; a dense model
    has none. The batch of an update is a setting, how it is spread over workers is not: in place of
    ``update_freq`` and ``max_tokens`` stands ``optimization.tokens_per_update``.
    """
    sections = {name: dict(config.get(name) or {}) for name in _WHOLE_SECTIONS}
    for section, keys in _PARTS.items():
        values = config.get(section) or {}
        sections[section] = {key: values.get(key) for key in keys}
    workers = (config.get("distributed_training") or {}).get("distributed_world_size") or 1
    tokens = sections["dataset"].pop("max_tokens")
    frequencies = sections["optimization"].pop("update_freq", [1])
    size = "tokens_per_update" if tokens else "update_freq"  # batches of so many sentences
    sections["optimization"][size] = [workers * each * (tokens or 1) for each in frequencies]
    dense = _is_dense(sections["model"])
    for section, defaults in _expert_settings().items():
        values = sections[section]
        if dense:
            sections[section] = {key: values[key] for key in values if key not in defaults}
        elif section == "model" or "with_routing" in str(values.get("_name")):
            sections[section] = {**defaults, **values}
    flat = {
        f"{section}.{key}": value
        for section, values in sections.items()
        for key, value in values.items()
    }
    return {
        key: value
        for key, value in flat.items()
        if value is not None and key not in _WITHOUT_EFFECT
    }


def _is_dense(model: Dict[str, Any]) -> bool:
    """Whether the model has no experts, be it one of fairseq's own."""
    if "router" not in model and not str(model.get("_name")).startswith("switch_transformer"):
        return True
    return all(model.get(f"{side}_moe_layers") == "none" for side in ("encoder", "decoder"))


def _expert_settings() -> Dict[str, Dict[str, Any]]:
    """The settings of this package, by section, with their defaults."""
    from fairseq_sparsemixer.criterions.label_smoothed_cross_entropy_with_routing import (
        LabelSmoothedCrossEntropyWithRoutingConfig,
    )
    from fairseq_sparsemixer.models.config import SwitchTransformerConfig

    owners = {
        "model": SwitchTransformerConfig,
        "criterion": LabelSmoothedCrossEntropyWithRoutingConfig,
    }
    return {
        section: {
            field.name: field.default
            for field in dataclasses.fields(owner)
            if field.name in owner.__annotations__
        }
        for section, owner in owners.items()
    }


def find_scores(folder: Path, name: Optional[str]) -> Optional[Path]:
    """The evaluation of a run: the one called ``name`` (with or without ``.json``), or the only.

    Raises:
        UserError: there are several.
    """
    paths = sorted({*folder.glob("*.json"), *folder.glob("evaluation/*.json")} - {folder / ROUTING})
    if name is not None:
        paths = [
            path
            for path in paths
            if name in (path.stem, path.name, path.relative_to(folder).as_posix())
        ]
    found = [path for path in paths if _is_evaluation(_read_json(path))]
    if len(found) > 1:
        names = " and ".join(path.relative_to(folder).as_posix() for path in found)
        raise UserError(f"{folder} holds {names}; choose one with --scores")
    return found[0] if found else None


def _is_evaluation(content: Any) -> bool:
    needed = ("scores", "hypotheses", "data", "generation", "checkpoints")
    return isinstance(content, dict) and all(key in content for key in needed)


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot read {path} ({error}); remove it, or name another evaluation with --scores"
        ) from error


def group_runs(runs: Iterable[Run]) -> List[Arm]:
    """Arms of equal settings, by ascending number of experts.

    Raises:
        UserError: two runs differ in nothing, not even the seed.
    """
    groups: Dict[str, List[Run]] = {}
    for each in runs:
        groups.setdefault(json.dumps(each.settings, sort_keys=True), []).append(each)
    by_name: Dict[str, List[List[Run]]] = {}
    for group in groups.values():
        group.sort(key=lambda run: run.seed)
        by_name.setdefault(group[0].name, []).append(group)
    arms = [
        Arm(name + suffix, group)
        for name, same_name in by_name.items()
        for group, suffix in zip(same_name, _suffixes([group[0] for group in same_name]))
    ]
    for arm in arms:
        for one, other in zip(arm.runs, arm.runs[1:]):
            if one.seed == other.seed:
                raise UserError(
                    f"{one.folder} and {other.folder} are the same run ({arm.name}, seed "
                    f"{one.seed}); leave one of them out of RUN"
                )
    return sorted(arms, key=lambda arm: arm.runs[0].settings.get("model.num_experts", 0))


def _suffixes(runs: Sequence[Run]) -> List[str]:
    """For runs of one name, the settings in which they differ, as ``,top_k=2``."""
    keys = dict.fromkeys(key for run in runs for key in run.settings)
    differing = [key for key in keys if any(_differ(run, runs[0], key) for run in runs)]
    labels = {key: _label(key) for key in differing}
    if len(set(labels.values())) < len(labels):
        labels = {key: key for key in differing}
    return [
        "".join(f",{labels[key]}={_as_text(run.settings.get(key))}" for key in differing)
        for run in runs
    ]


def _differ(one: Run, other: Run, key: str) -> bool:
    return one.settings.get(key) != other.settings.get(key)


def further_differences(runs: Sequence[Run]) -> List[str]:
    """The settings, those of the model's experts aside, in which runs differ, with their values."""
    own = _expert_settings()
    texts = []
    for key in dict.fromkeys(key for run in runs for key in run.settings):
        section, _, name = key.partition(".")
        if section == "model" and name in own["model"]:
            continue
        # A dense model has no routing losses that could differ.
        of_experts = section == "criterion" and name in own["criterion"]
        holders = [run for run in runs if key in run.settings or not of_experts]
        values = list(dict.fromkeys(_as_text(run.settings.get(key)) for run in holders))
        if len(values) > 1:
            texts.append(f"{_label(key)} ({', '.join(values)})")
    return texts


def _label(key: str) -> str:
    """The short name of a setting: that of hydra without its group."""
    group, _, name = key.partition(".")
    return ("arch" if group == "model" else group) if name == "_name" else name


def _as_text(value: Any) -> str:
    if value is None:
        return "unset"
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
