"""The folder of a study: all that it depends on.

====================  ===========================================================================
``plan.yaml``         the plan, as it was last given
``configs/``          hydra's
``data/``             the corpus, and of one language what :mod:`.corpora.one_side` makes of it
``ARM-seedK/``        the runs; with ``finetune_from``, :data:`PRETRAINED` is what each begins with
====================  ===========================================================================
"""

import shutil
from pathlib import Path
from typing import Any, Dict, FrozenSet, List, Tuple

from fairseq import tasks
from fairseq.models import ARCH_MODEL_REGISTRY
from omegaconf import OmegaConf

from fairseq_sparsemixer.corpora.folder import CORPUS_RECORD, unchanged
from fairseq_sparsemixer.corpora.one_side import INPUT, LABEL, lay_out_side
from fairseq_sparsemixer.errors import UserError
from fairseq_sparsemixer.files import atomic_path, read_json, sha256_of
from fairseq_sparsemixer.models.config import SIDES
from fairseq_sparsemixer.runs.arms import Variant
from fairseq_sparsemixer.runs.folder import STUDY_STATE
from fairseq_sparsemixer.runs.record import refuse_other
from fairseq_sparsemixer.study.engine import read_state
from fairseq_sparsemixer.study.plan import CHECKPOINTS, Plan, read_plan
from fairseq_sparsemixer.training import resources
from fairseq_sparsemixer.training.resources import Parameters
from fairseq_sparsemixer.training.settings import CONFIGS, compose, overridden, quoted

PLAN = "plan.yaml"
PRETRAINED = "pretrained.pt"
KEY = "by_machine"
"""In the state of a run: what the machine chose that began it."""
_STATE = {
    "finished_updates?": int,
    "overrides?": [str],
    "config?": str,
    "language?": str,
    "evaluate_every?": int,
    "score?": str,
    "beam?": int,
    "finetune_from?": str,
    "updates?": int,
    f"{KEY}?": [str],
}


def lay_out(plan_file: Path, folder: Path) -> Tuple[Plan, Dict[str, Parameters]]:
    """Copy all that the study depends on into its folder.

    What is there stays: corpus and configs are those that the study began with. A plan may have
    grown by arms, seeds or updates; it is copied last, once nothing speaks against it.

    Returns:
        The plan, and the parameters of each arm.

    Raises:
        UserError: the plan is wrong or does not go with what was trained; there is no such corpus,
            or no such model to begin with.
    """
    plan = read_plan(plan_file)
    own = folder / "configs"
    configs = own if (own / f"{plan.config}.yaml").is_file() else CONFIGS
    cfg = _config(configs, plan, plan_file)
    plan = _without_missing_sides(plan, cfg)._replace(until_the_end=_until_the_end(cfg))
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
        _copy_corpus(plan, folder / "data", plan_file)
        _copy_configs(CONFIGS / f"{plan.config}.yaml", own)
    _copy_models(plan, folder, known=plan_file == folder / PLAN)
    parameters = _count_parameters(folder, plan)
    if plan_file != folder / PLAN:
        _copy(plan_file, folder / PLAN)
    return plan, parameters


def _config(configs: Path, plan: Plan, plan_file: Path) -> Any:
    """The config of all arms, filled in.

    Raises:
        UserError: there is none of that name, or its task does not go with ``language``.
    """
    if not (configs / f"{plan.config}.yaml").is_file():
        raise UserError(f"there is no {configs / plan.config}.yaml: check config in {plan_file}")
    cfg = compose(configs.resolve(), ["checkpoint.save_dir=."], plan.config)
    pairs = "source_lang" in cfg.task
    if pairs == (plan.language is not None):
        what = "pairs of sentences: leave language out" if pairs else "one text: say language"
        raise UserError(f"{plan_file}: the task of {plan.config}.yaml takes {what}")
    return cfg


def _without_missing_sides(plan: Plan, cfg: Any) -> Plan:
    """Arms without what says that a side has no experts which the model does not have."""
    sides = getattr(ARCH_MODEL_REGISTRY.get(cfg.model._name), "sides", SIDES)
    missing = {f"model.{side}_moe_layers=none" for side in SIDES if side not in sides}
    arms = {
        name: [each for each in overrides if each not in missing]
        for name, overrides in plan.arms.items()
    }
    return plan._replace(arms=arms)


def _until_the_end(cfg: Any) -> FrozenSet[str]:
    """The settings of the learning rate that a config ties to the last update."""
    schedule: Any = OmegaConf.to_container(cfg.lr_scheduler, resolve=False)
    tied = "${optimization.max_update}"
    return frozenset(f"lr_scheduler.{key}" for key, value in schedule.items() if value == tied)


def task_overrides(folder: Path, plan: Plan, seen: Path = Path()) -> List[str]:
    """What the task is told of the corpus.

    Args:
        folder: of the study.
        plan: of it.
        seen: the same folder, as seen from where the overrides are for.

    Raises:
        UserError: the config tells apart domains, and the corpus has none.
    """
    if plan.language is None:
        return [f"task.data={quoted(seen / 'data' / 'bin')}"]
    cfg = compose((folder / "configs").resolve(), ["checkpoint.save_dir=."], plan.config)
    side = Path("data", plan.language)
    if "num_classes" not in cfg.task:
        return [f"task.data={quoted(seen / side / INPUT)}"]
    dictionary = folder / side / LABEL / "dict.txt"
    if not dictionary.is_file():
        raise UserError(
            f"the pairs of {folder / 'data'} have no domains, which {plan.config}.yaml tells "
            "apart: change data to a corpus with raw/train.domain, such as debian"
        )
    classes = len(dictionary.read_text(encoding="utf-8").splitlines())
    return [f"task.data={quoted(seen / side)}", f"task.num_classes={classes}"]


def read_run_state(folder: Path) -> Dict[str, Any]:
    """What :data:`.STUDY_STATE` says in the folder of a run; see :func:`.engine.read_state`."""
    state = read_state(folder / STUDY_STATE, _STATE)
    return {"score": "last", **state} if state else {}  # all did, before there was a choice


def _copy_corpus(plan: Plan, target: Path, plan_file: Path) -> None:
    """What training and scoring read of it, its record last."""
    data = plan.data
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
        labels = data.glob("raw/train.domain") if plan.language else ()
        for path in [*data.glob("bin/*"), *held_out, *labels, *data.glob("copy/*")]:
            _copy(path, target / path.relative_to(data))
        record = source.read_bytes()
    if plan.language:
        lay_out_side(target, plan.language)
    with atomic_path(copy) as partial:
        partial.write_bytes(record)


def _copy_configs(config: Path, target: Path) -> None:
    """The config and all that it may be composed of; itself last, which says that all is there."""
    if (target / config.name).is_file():
        return
    others = [path for path in sorted(CONFIGS.rglob("*.yaml")) if path != config]
    for path in [*others, config]:
        if not (target / path.relative_to(CONFIGS)).is_file():
            _copy(path, target / path.relative_to(CONFIGS))


def _copy_models(plan: Plan, folder: Path, known: bool) -> None:
    """Those that the runs begin with, of the study that ``finetune_from`` names.

    What is there stays, and is only compared with that study's where the plan is not ``known``.

    Raises:
        UserError: a run of that study is not finished, or is not the one that this study began
            with.
    """
    before = plan.finetune_from
    if before is None:
        return
    for run in plan.runs():
        copy = folder / run.name / PRETRAINED
        if known and copy.is_file():
            continue
        state = read_run_state(before / run.name)
        source = before / run.name / CHECKPOINTS[state.get("score", "last")]
        if not state.get("finished_updates") or not source.is_file():
            if copy.is_file():
                continue
            raise UserError(
                f"finetune_from: {before / run.name} is not finished: finish the study {before} "
                "first, or leave the arm or seed out of this plan"
            )
        if not copy.is_file():
            _copy(source, copy)
        elif sha256_of(source) != sha256_of(copy):
            raise UserError(
                f"{source} is not the model that {folder} began with: name another folder with "
                "--output"
            )


def _copy(source: Path, target: Path) -> None:
    with atomic_path(target) as partial:
        shutil.copyfile(source, partial)


def made_with(plan: Plan, run: Variant) -> Dict[str, Any]:
    """What may not change once a run is trained."""
    given = overridden(run.overrides)
    tied = plan.until_the_end - given if "lr_scheduler" not in given else ()
    return {
        "overrides": run.overrides,
        **({"updates": plan.updates} if tied else {}),
        "config": plan.config,
        **({"language": plan.language} if plan.language else {}),
        "evaluate_every": plan.evaluate_every,
        "score": plan.score,
        "beam": plan.beam,
        "finetune_from": "a study" if plan.finetune_from else "nothing",
    }


def _count_parameters(folder: Path, plan: Plan) -> Dict[str, Parameters]:
    """Count those of each arm; building the models checks all settings.

    Raises:
        UserError: hydra or the model refuses an arm's settings.
    """
    data = task_overrides(folder, plan, folder.resolve())
    found: Dict[str, Parameters] = {}
    for name, overrides in plan.arms.items():
        try:
            settings = [*data, *overrides, "checkpoint.save_dir=."]
            cfg = compose((folder / "configs").resolve(), settings, plan.config)
            model = resources.build_on_meta(cfg.model, tasks.setup_task(cfg.task))
        except UserError as error:
            raise UserError(f"arm {name}: {error}") from error
        found[name] = resources.count_parameters(model)
    return found
