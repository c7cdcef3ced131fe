"""Runs of training, read back from their folders.

A run folder is what ``fairseq-hydra-train`` and ``fairseq-sparsemixer evaluate`` write: hydra's
``.hydra/config.yaml``, ``hydra_train.log``, ``evaluation/*.json``, and ``run.json`` where
``fairseq-sparsemixer train`` started it.
"""

import dataclasses
import math
import os
import shlex
from pathlib import Path
from typing import Any, Dict, Iterable, List, Optional

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fairseq_sparsemixer.errors import UserError
from fairseq_sparsemixer.files import misfit, read_json
from fairseq_sparsemixer.runs.logs import TrainingLog, Validation, read_log
from fairseq_sparsemixer.runs.record import RECORD
from fairseq_sparsemixer.runs.settings import SECTIONS, read_settings

CONFIG = Path(".hydra", "config.yaml")
LOG = "hydra_train.log"
STUDY_STATE = "study.json"
"""In the folder of a run of a study: how it is made, and for how many updates it is finished."""
ROUTING = Path("evaluation", "routing.json")
"""Kept by ``fairseq-sparsemixer report`` beside evaluations; it is none."""
_CONFIG = {
    **{f"{section}?": (dict, None) for section in SECTIONS},
    "common": {"seed": int},
    "optimization": {"max_update": int, "update_freq?": [int]},
    "model": dict,
    "dataset?": ({"valid_subset?": str, "max_tokens?": (int, None)}, None),
    "distributed_training?": ({"distributed_world_size?": int}, None),
}
_SCORE = {"score": float}
_EVALUATION = {
    "scores": {"bleu?": {**_SCORE, "signature?": str}, str: (_SCORE, None)},
    "hypotheses?": str,
    "checkpoints": [
        {"name": str, "sha256": str, "updates": int, "path?": str, "averaged_from?": ([str], None)}
    ],
    "data": {
        **dict.fromkeys(("source_sha256", "reference", "reference_sha256"), str),
        "source?": str,
        **dict.fromkeys(("source_lang?", "target_lang?", "sacrebleu?"), (str, None)),
    },
    "generation": dict,
    "versions?": dict,
    "copy?": ({"scores": {str: (_SCORE, None)}}, None),
    "pairs?": {
        str: {"counts": {"hypothesis_lines": int}, "scores": {"bleu": {**_SCORE, "tokeniser": str}}}
    },
}
_RECORD = {
    "parameters?": {"total?": (int, None), "active?": (int, None)},
    "versions?": (dict, None),
    "git?": ({"revision": str, "dirty": bool}, None),
    "gpus?": ([str], None),
}
"""What is read of the files, with what it must be."""


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
    def scored(self) -> Validation:
        """The last validation up to the updates that were scored, or of all."""
        checkpoints = self.evaluation.get("checkpoints", [])
        last = max((each["updates"] for each in checkpoints), default=math.inf)
        until = [each for each in self.validations if each.updates <= last]
        return (until or self.validations)[-1]

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


def find_runs(paths: Iterable[Path]) -> List[Path]:
    """The run folders that ``paths`` are or hold, each once, in that order.

    Raises:
        UserError: a path is no folder, or holds no run.
    """
    folders: Dict[Path, Path] = {}
    for path in paths:
        if not path.is_dir():
            raise UserError(f"there is no folder {path}; give RUN a folder of runs")
        found = _runs_below(path)
        if not found:
            raise UserError(
                f"{path} holds no run of fairseq-hydra-train (a folder with {CONFIG}); give RUN "
                "the folder that training wrote to"
            )
        for folder in found:
            folders.setdefault(folder.resolve(), folder)
    return list(folders.values())


def _runs_below(path: Path) -> List[Path]:
    """With the folder itself, those below it, and those that links lead to."""
    found, seen = [], set()
    for name, below, _ in os.walk(path, followlinks=True):
        folder = Path(name)
        if folder.resolve() in seen:  # a link back
            below.clear()
            continue
        seen.add(folder.resolve())
        if (folder / CONFIG).is_file():
            found.append(folder)
    return sorted(found)


def read_run(folder: Path, scores: Optional[str] = None) -> Run:
    """Read one run folder; the evaluation is the one named ``scores``, or the only one.

    Raises:
        UserError: a file is damaged, or there are several evaluations to choose from.
    """
    config = _read_config(folder / CONFIG)
    subsets = (config.get("dataset") or {}).get("valid_subset", "valid")
    log = read_log(folder / LOG, subsets.split(",")[0]) if (folder / LOG).is_file() else None
    scores_path = find_scores(folder, scores)
    record = folder / RECORD
    found = Run(
        folder=folder,
        settings=read_settings(config),
        seed=config["common"]["seed"],
        max_update=config["optimization"]["max_update"],
        log=log,
        scores_path=scores_path,
        evaluation=_read_json(scores_path, _EVALUATION) if scores_path else {},
        record=_read_json(record, _RECORD) if record.is_file() else {},
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
    if not math.isfinite(run.scored.nll_loss):
        return f"its validation nll is {run.scored.nll_loss}"
    if not run.evaluation:
        named = "" if scores is None else f" as {scores}"
        of_study = scores is None and (run.folder / STUDY_STATE).is_file()
        what = "study" if of_study else "evaluate"
        where = shlex.quote(str(run.folder.parent if of_study else run.folder))
        return f"not scored{named}; fairseq-sparsemixer {what} {where} does it"
    for checkpoint in run.evaluation["checkpoints"]:
        # The one name that says how far training was.
        if checkpoint["name"] == "checkpoint_last.pt" and checkpoint["updates"] < last.updates:
            return f"scored at {checkpoint['updates']} of {last.updates} updates; evaluate it again"
    return ""


def _read_config(path: Path) -> Dict[str, Any]:
    try:
        # Unresolved: hydra's own interpolations have no meaning here.
        config = OmegaConf.to_container(OmegaConf.load(path))
    except (OSError, ValueError, RecursionError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"cannot read {path} ({error}); leave its folder out of RUN") from error
    wrong = misfit(config, _CONFIG)
    if wrong:
        raise UserError(f"{path} is not a config of fairseq ({wrong}); leave its folder out of RUN")
    assert isinstance(config, dict)
    return {str(section): values for section, values in config.items()}


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
    found = [path for path in paths if _is_evaluation(_read_json(path, object))]
    if len(found) > 1:
        names = " and ".join(path.relative_to(folder).as_posix() for path in found)
        raise UserError(f"{folder} holds {names}; choose one with --scores")
    return found[0] if found else None


def _is_evaluation(content: Any) -> bool:
    needed = ("scores", "data", "generation", "checkpoints")
    return isinstance(content, dict) and all(key in content for key in needed)


def _read_json(path: Path, shape: Any) -> Any:
    return read_json(path, shape, "remove it, or name another evaluation with --scores")
