"""Runs that differ by the seed alone, and what others differ in."""

import json
from pathlib import Path
from typing import Any, Dict, Iterable, List, NamedTuple, Optional, Sequence

from fairseq_sparsemixer.errors import UserError
from fairseq_sparsemixer.runs.folder import Run, find_runs, read_run
from fairseq_sparsemixer.runs.settings import as_text, expert_fields, label

OPTIONS = "router_options"
"""The setting that holds others, as JSON."""


class Arm(NamedTuple):
    """Runs that differ by the seed alone, by ascending seed."""

    name: str
    runs: List[Run]

    @property
    def counted(self) -> List[Run]:
        """Those that are finished and scored."""
        return [run for run in self.runs if not run.note]


def read_arms(paths: Iterable[Path], scores: Optional[str]) -> List[Arm]:
    """The arms of all runs that ``paths`` are or hold, which are of one task.

    Raises:
        UserError: as :func:`read_tasks`, or there are several tasks.
    """
    found = read_tasks(paths, scores)
    if len(found) > 1:
        raise UserError(
            f"these runs are of the tasks {' and '.join(found)}: give RUN those of one, or compare "
            "them with `fairseq-sparsemixer table`"
        )
    return next(iter(found.values()))


def read_tasks(paths: Iterable[Path], scores: Optional[str]) -> Dict[str, List[Arm]]:
    """The arms of all runs that ``paths`` are or hold, by fairseq's name of their task.

    Raises:
        UserError: there is no run, none has the evaluation ``scores``, or a file is damaged.
    """
    runs = [read_run(folder, scores) for folder in find_runs(paths)]
    if scores is not None and not any(run.scores_path for run in runs):
        raise UserError(
            f"no run has an evaluation named {scores}; check --scores, or run "
            "`fairseq-sparsemixer evaluate` first"
        )
    by_task: Dict[str, List[Run]] = {}
    for run in runs:
        name = str(run.settings.get("task._name", "")).replace("_with_routing", "")
        by_task.setdefault(name, []).append(run)
    return {task: group_runs(own) for task, own in by_task.items()}


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
    """For runs of one name, the settings in which they differ, as ``,top_k=2``.

    Options of a router stand by themselves, where they are given, unless that tells too little.
    """
    settings = [run.settings for run in runs]
    suffixes = _differences([_with_options(each) for each in settings])
    return suffixes if len({*suffixes}) == len(suffixes) else _differences(settings)


def _differences(settings: Sequence[Dict[str, Any]]) -> List[str]:
    keys = dict.fromkeys(key for each in settings for key in each)
    differing = [k for k in keys if any(each.get(k) != settings[0].get(k) for each in settings)]
    labels = {key: label(key).replace(f"{OPTIONS}.", "") for key in differing}
    if len(set(labels.values())) < len(labels):
        labels = {key: key for key in differing}
    return [
        "".join(
            f",{labels[key]}={as_text(each.get(key))}"
            for key in differing
            if key in each or OPTIONS not in key
        )
        for each in settings
    ]


def _with_options(settings: Dict[str, Any]) -> Dict[str, Any]:
    """Settings with each option of the router as one, where they can be read."""
    try:
        options = json.loads(settings.get(f"model.{OPTIONS}", ""))
    except (ValueError, TypeError, RecursionError):
        return settings
    if not isinstance(options, dict):
        return settings
    others = {key: value for key, value in settings.items() if key != f"model.{OPTIONS}"}
    return {**others, **{f"model.{OPTIONS}.{name}": value for name, value in options.items()}}


def further_differences(runs: Sequence[Run]) -> List[str]:
    """The settings, those of the model's experts aside, in which runs differ, with their values."""
    own = expert_fields()
    texts = []
    for key in dict.fromkeys(key for run in runs for key in run.settings):
        section, _, name = key.partition(".")
        if section == "model" and name in own["model"]:
            continue
        # A dense model has no routing losses that could differ.
        of_experts = section == "criterion" and name in own["criterion"]
        holders = [run for run in runs if key in run.settings or not of_experts]
        values = list(dict.fromkeys(as_text(run.settings.get(key)) for run in holders))
        if len(values) > 1:
            texts.append(f"{label(key)} ({', '.join(values)})")
    return texts
