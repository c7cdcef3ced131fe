"""``run.json``: what a run was started with, so that it is only resumed with the same."""

import datetime
import importlib.metadata
import json
import platform
import subprocess
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Mapping, Optional, Sequence, Tuple

import fairseq
import hydra
import torch

from fairseq_sparsemixer.errors import UserError
from fairseq_sparsemixer.files import read_json
from fairseq_sparsemixer.runs.settings import BY_MACHINE
from fairseq_sparsemixer.version import __version__

RECORD = "run.json"
_MAY_CHANGE = (
    "bmuf.distributed_world_size",  # fairseq's copy of that of distributed_training
    "checkpoint.save_dir",
    "common.user_dir",
    *BY_MACHINE,
    "dataset.max_tokens",
    "dataset.max_tokens_valid",
    "distributed_training.",
    "optimization.stop_time_hours",
    "optimization.update_freq",
)
"""Settings (or, with a dot, groups of them) that say where, how and on how many GPUs a run is
trained, for how long, and what is warned of; the tokens of an update are compared apart."""
_KEPT = "dataset.update_epoch_batch_itr"
"""A setting that earlier configs did not make: a run goes on with the value that it has."""
_STARTED = {
    "settings": {"dataset?": dict},
    "tokens_per_update": int,
    "data": dict,
    "starts?": [dict],
}
TAKE_PART = (
    "fairseq_sparsemixer",
    "python",
    "torch",
    "cuda",
    "fairseq",
    "hydra",
    "sacrebleu",
    "sentencepiece",
)
"""In training and its scores."""


def read_record(folder: Path) -> Dict[str, Any]:
    """The content of ``run.json``; empty where there is none.

    Raises:
        UserError: it is damaged, or of a run that ``fairseq-sparsemixer train`` did not start.
    """
    path = folder / RECORD
    if not path.exists():
        return {}
    return read_json(path, _STARTED, "name another folder with --runs")


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def check_same(folder: Path, record: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse to go on with other settings.

    Args:
        folder: of the run.
        record: the content of its ``run.json``.
        now: of this start; ``settings``, ``tokens_per_update`` and ``data`` are compared.

    Raises:
        UserError: one differs; names it.
    """
    before, after = (
        {
            **dict(_flatten(each["settings"])),
            "tokens_per_update": each["tokens_per_update"],
            **each["data"],
        }
        for each in (record, now)
    )
    refuse_other(
        folder,
        before,
        {key: after[key] for key in sorted(after) if not _may_change(key)},
        "{folder} was trained with {key}={before}, not {now}: start it as its run.json says, or "
        "name another folder with --runs",
    )


def kept_overrides(before: Mapping[str, Any]) -> List[str]:
    """The overrides of hydra by which a run goes on as it was begun, though configs have changed.

    Args:
        before: its settings by group; empty for a run that is new.
    """
    group, _, name = _KEPT.partition(".")
    value = before.get(group, {}).get(name)
    return [] if value is None else [f"{_KEPT}={json.dumps(value)}"]


def refuse_other(
    folder: Path,
    before: Mapping[str, Any],
    now: Mapping[str, Any],
    text: str,
    shown: Callable[[Any], str] = _shown,
) -> None:
    """Refuse to go on with a run where a value is not what it was.

    Args:
        folder: of the run.
        before: what it was begun with; what is missing may be anything.
        now: compared in this order.
        text: of the error, with ``{folder}``, ``{key}``, ``{before}`` and ``{now}``.
        shown: how values look in it.

    Raises:
        UserError: one differs.
    """
    for key, value in now.items():
        if key in before and before[key] != value:
            raise UserError(
                text.format(folder=folder, key=key, before=shown(before[key]), now=shown(value))
            )


def _flatten(settings: Mapping[str, Any], prefix: str = "") -> Iterator[Tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _may_change(key: str) -> bool:
    return any(key == each or (each[-1] == "." and key.startswith(each)) for each in _MAY_CHANGE)


def start_record(record: Mapping[str, Any], start: Mapping[str, Any]) -> Dict[str, Any]:
    """``run.json`` for a start: what holds now, and the list of all starts with their times.

    Args:
        record: of the starts before, possibly empty.
        start: of this one; what may differ between starts is listed with its time.
    """
    listed = ("workers", "update_freq", "max_tokens", "gpus", "git")
    time = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    entry = {"time": time, **{key: start[key] for key in listed}}
    return {**start, "starts": [*record.get("starts", []), entry]}


def versions(names: Sequence[str] = TAKE_PART) -> Dict[str, Optional[str]]:
    """The versions of ``python``, ``cuda`` (None without) and packages, by name."""
    known = {
        "fairseq_sparsemixer": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "fairseq": fairseq.__version__,
        "hydra": hydra.__version__,
    }
    return {
        name: known[name] if name in known else importlib.metadata.version(name) for name in names
    }


def git_state(checkout: Path) -> Optional[Dict[str, Any]]:
    """The revision of a checkout, and whether files differ from it; None outside of git.

    And in a repository that another folder is the top of: one that the package is installed in.
    """
    try:
        top, revision, changes = (
            subprocess.run(
                ["git", "-C", str(checkout), *command],
                check=True,
                capture_output=True,
                text=True,
            ).stdout.strip()
            for command in (
                ["rev-parse", "--show-toplevel"],
                ["rev-parse", "HEAD"],
                ["status", "--porcelain"],
            )
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    if Path(top).resolve() != checkout.resolve():
        return None
    return {"revision": revision, "dirty": bool(changes)}
