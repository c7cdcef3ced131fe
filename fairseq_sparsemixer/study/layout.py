"""The folder of a study: plan, configs and corpus, so that it depends on nothing else."""

import shutil
from pathlib import Path
from typing import Any, Dict, Tuple

from fairseq.data import Dictionary
from fairseq.tasks.translation import TranslationTask

from fairseq_sparsemixer.corpora.folder import CORPUS_RECORD, unchanged
from fairseq_sparsemixer.errors import UserError
from fairseq_sparsemixer.evaluation.translator import find_languages
from fairseq_sparsemixer.files import atomic_path, read_json
from fairseq_sparsemixer.runs.arms import Variant
from fairseq_sparsemixer.runs.record import refuse_other
from fairseq_sparsemixer.study.engine import read_state
from fairseq_sparsemixer.study.plan import Plan, read_plan
from fairseq_sparsemixer.training import resources
from fairseq_sparsemixer.training.resources import Parameters
from fairseq_sparsemixer.training.settings import CONFIGS, compose

PLAN = "plan.yaml"
STATE = "study.json"
"""In the folder of a run: how it is made, and for how many updates it is finished."""
KEY = "by_machine"
"""In the state of a run: what the machine chose that began it."""
_STATE = {
    "finished_updates?": int,
    "overrides?": [str],
    "config?": str,
    "evaluate_every?": int,
    "score?": str,
    "beam?": int,
    f"{KEY}?": [str],
}


def lay_out(plan_file: Path, folder: Path) -> Tuple[Plan, Dict[str, Parameters]]:
    """Copy corpus, configs and plan into the study's folder, so that it depends on nothing else.

    What is there stays: corpus and configs are those that the study began with. A plan may have
    grown by arms, seeds or updates; it is copied last, once nothing speaks against it.

    Returns:
        The plan, and the parameters of each arm.

    Raises:
        UserError: the plan is wrong or does not go with what was trained; there is no such corpus.
    """
    plan = read_plan(plan_file)
    for run in plan.runs():
        refuse_other(
            folder / run.name,
            read_run_state(folder / run.name),
            made_with(plan, run),
            "{folder} was trained with other {key} ({before}, not {now}): give the arm another "
            "name in the plan, or name another folder with --output",
            shown=lambda value: " ".join(value) if isinstance(value, list) else str(value),
        )
    if plan_file != folder / PLAN:
        _copy_corpus(plan.data, folder / "data", plan_file)
        _copy_configs(CONFIGS / f"{plan.config}.yaml", folder / "configs", plan_file)
    parameters = _count_parameters(folder, plan)
    if plan_file != folder / PLAN:
        _copy(plan_file, folder / PLAN)
    return plan, parameters


def read_run_state(folder: Path) -> Dict[str, Any]:
    """What :data:`STATE` says in the folder of a run; see :func:`.engine.read_state`."""
    state = read_state(folder / STATE, _STATE)
    return {"score": "last", **state} if state else {}  # all did, before there was a choice


def _copy_corpus(data: Path, target: Path, plan_file: Path) -> None:
    """What training and scoring read of it, its record last."""
    source, copy = data / CORPUS_RECORD, target / CORPUS_RECORD
    if copy.is_file():
        cure = "make the corpus anew with `fairseq-sparsemixer prepare`"
        mine = read_json(copy, dict, "name another folder with --output")
        if source.is_file() and read_json(source, dict, cure) != mine:
            raise UserError(
                f"{data} is not the corpus that {target.parent} began with: name another folder "
                "with --output"
            )
        return
    held_out = [path for split in ("valid", "test") for path in data.glob(f"raw/{split}.*")]
    if not source.is_file() or not any(path.name.startswith("test.") for path in held_out):
        raise UserError(
            f"there is no prepared corpus with a test set in {data}: make it with "
            f"`fairseq-sparsemixer prepare`, or change data in {plan_file}"
        )
    with unchanged(data):
        for path in [*data.glob("bin/*"), *held_out, *data.glob("copy/*")]:
            _copy(path, target / path.relative_to(data))
        record = source.read_bytes()
    with atomic_path(copy) as partial:
        partial.write_bytes(record)


def _copy_configs(config: Path, target: Path, plan_file: Path) -> None:
    """The config and all that it may be composed of; itself last, which says that all is there."""
    if (target / config.name).is_file():
        return
    if not config.is_file():
        raise UserError(f"there is no {config}: check config in {plan_file}")
    others = [path for path in sorted(CONFIGS.rglob("*.yaml")) if path != config]
    for path in [*others, config]:
        if not (target / path.relative_to(CONFIGS)).is_file():
            _copy(path, target / path.relative_to(CONFIGS))


def _copy(source: Path, target: Path) -> None:
    with atomic_path(target) as partial:
        shutil.copyfile(source, partial)


def made_with(plan: Plan, run: Variant) -> Dict[str, Any]:
    """What may not change once a run is trained."""
    return {
        "overrides": run.overrides,
        "config": plan.config,
        "evaluate_every": plan.evaluate_every,
        "score": plan.score,
        "beam": plan.beam,
    }


def _count_parameters(folder: Path, plan: Plan) -> Dict[str, Parameters]:
    """Count those of each arm; building the models checks all settings.

    Raises:
        UserError: hydra or the model refuses an arm's settings.
    """
    binary = folder / "data" / "bin"
    found: Dict[str, Parameters] = {}
    for name, overrides in plan.arms.items():
        try:
            settings = [*overrides, "checkpoint.save_dir=."]
            cfg = compose((folder / "configs").resolve(), settings, plan.config)
            languages = find_languages(cfg.task.source_lang, cfg.task.target_lang, [binary])
            dictionaries = [Dictionary.load(str(binary / f"dict.{each}.txt")) for each in languages]
            model = resources.build_on_meta(cfg.model, TranslationTask(cfg.task, *dictionaries))
        except UserError as error:
            raise UserError(f"arm {name}: {error}") from error
        found[name] = resources.count_parameters(model)
    return found
