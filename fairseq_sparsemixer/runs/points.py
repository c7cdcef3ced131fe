"""What is measured at each validation of a run: a point, one line of JSON.

====================  ==============================================================================
``updates``           of the parameters
``seconds``           of training alone: neither validation nor saving nor starting
``cpu_seconds``       of the training process's threads in that time
``words``             of the target that were trained on, by all workers
``words_per_second``  of training, ``words`` over ``seconds``
``loss``              of the whole validation set as the criterion reports it, bits a target token;
                      of pre-training bits a masked token, of classes bits a sentence
``nll_loss``          its negative log-likelihood, likewise
``bleu, chrf``        sacreBLEU of ``sentences`` sentences of it, with ``signatures``
``ppl``               of language models: perplexity of a token; ``bits_per_byte``
``discriminator_loss``  of ELECTRA: of words that may be replaced, bits a token
``accuracy``          of classes: percent; ``acc_and_f1``, ``mcc``, ``pearson_and_spearman`` where
                      the criterion reports them
``by_domain``         ``bleu``, ``chrf``, ``sentences``, ``nll_loss``, ``tokens`` of each domain
``layers``            for each layer with experts: ``load``, each expert's share of the choices;
                      ``load_by_domain``; ``entropy`` of a token's softmax over experts in nats;
                      ``drift``, the share of the choices that were not made at the point before
====================  ==============================================================================

What is not known is null: time and words where training went on from a checkpoint of elsewhere,
losses that are no numbers.
"""

import json
import math
from pathlib import Path
from typing import Any, Dict, List, Mapping, NamedTuple, Optional

import numpy as np

from fairseq_sparsemixer.errors import UserError
from fairseq_sparsemixer.files import atomic_path, misfit, read_json, write_json, write_lines
from fairseq_sparsemixer.runs.metrics import MAIN, NLL

FILE = "points.jsonl"
"""The file of the points in the folder of a run."""
METRICS = tuple(metric.key for metric in MAIN if metric is not NLL)
"""What a point holds of the whole validation set besides the losses, by its task."""
_CURE = "remove it, or train anew"
_NUMBER = (float, None)
_POINT = {
    "updates": int,
    **dict.fromkeys(("seconds", "loss", "nll_loss"), _NUMBER),
    **dict.fromkeys(("cpu_seconds?", "words?", "words_per_second?"), _NUMBER),
    **dict.fromkeys((f"{key}?" for key in METRICS), _NUMBER),
    "layers": {str: {"load?": [_NUMBER], "entropy?": _NUMBER, "drift?": _NUMBER}},
}
"""What is read of a point, with what it must be."""


# Files


def read_points(path: Path) -> List[Dict[str, Any]]:
    """The points of a run by ascending updates; none where there is no file.

    Raises:
        UserError: the file is damaged.
    """
    if not path.is_file():
        return []
    try:
        points = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {path} ({error}): {_CURE}") from error
    for line, point in enumerate(points, 1):
        wrong = misfit(point, _POINT)
        if wrong:
            raise UserError(f"cannot read {path} ({wrong} in line {line}): {_CURE}")
    return sorted(points, key=lambda point: point["updates"])


def add_point(path: Path, point: Mapping[str, Any]) -> None:
    """Add a line, in place of any of as many or more updates.

    What is no number is null. Killed at any time, the file is as it was before, or as it should be.
    """
    kept = [each for each in read_points(path) if each["updates"] < point["updates"]]
    write_lines(path, [json.dumps(_finite(each), allow_nan=False) for each in (*kept, point)])


def _finite(value: Any) -> Any:
    """The same with None for each number that JSON has not: a model may diverge."""
    if isinstance(value, float):
        return number(value)
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    return [_finite(each) for each in value] if isinstance(value, (list, tuple)) else value


def number(value: Any) -> Optional[float]:
    """A number that JSON has, else None."""
    return float(value) if value is not None and math.isfinite(value) else None


class Clock(NamedTuple):
    """What training took up to some update; None where that is not known."""

    seconds: Optional[float] = None
    cpu_seconds: Optional[float] = None
    words: Optional[float] = None


def read_clocks(path: Path) -> Dict[int, Clock]:
    """The clocks that :func:`add_clock` kept, by updates; none where there is no file.

    Raises:
        UserError: the file is damaged.
    """
    if not path.is_file():
        return {}
    cure = "remove it (the time of the training so far is then not known)"
    kept = read_json(path, {str: [_NUMBER]}, cure)
    if not all(key.isdecimal() and len(kept[key]) <= len(Clock._fields) for key in kept):
        raise UserError(f"cannot read {path} (it holds no clocks): {cure}")
    return {int(updates): Clock(*values) for updates, values in kept.items()}


def add_clock(path: Path, updates: int, clock: Clock) -> None:
    """Keep the clock of a checkpoint, for a training that goes on from it."""
    write_json(path, {**read_clocks(path), updates: clock})


def save_choices(path: Path, updates: int, choices: Mapping[str, np.ndarray]) -> None:
    """Keep :func:`flat_choices` for the point after, which may be measured after a restart.

    Args:
        path: of the points; a file beside it is written.
        updates: of the point.
        choices: of the point.
    """
    with atomic_path(_choices_path(path, updates)) as partial, partial.open("wb") as file:
        np.savez_compressed(file, **dict(choices))  # type: ignore[arg-type]


def load_choices(path: Path, updates: int) -> Dict[str, np.ndarray]:
    """What was saved for the last point before ``updates``; nothing where there is none.

    Raises:
        UserError: the file is damaged.
    """
    before = [kept for kept in _kept_choices(path) if kept < updates]
    if not before:
        return {}
    file = _choices_path(path, max(before))
    try:
        with np.load(file) as archive:
            choices = dict(archive)
        if any(each.ndim != 2 or each.dtype.kind not in "iu" for each in choices.values()):
            raise ValueError("it holds no choices of experts")
    except Exception as error:  # whatever its bytes lead to
        raise UserError(
            f"cannot read {file} ({error}): remove it (the drift of the next point is then not "
            "known)"
        ) from error
    return choices


def forget_choices(path: Path, updates: int) -> None:
    """Remove those of all points but the one at ``updates``, which is written by now."""
    for kept in _kept_choices(path):
        if kept != updates:
            _choices_path(path, kept).unlink()


def _choices_path(path: Path, updates: int) -> Path:
    return path.with_name(f"{path.stem}.{updates}.npz")


def _kept_choices(path: Path) -> List[int]:
    names = (each.name.split(".")[-2] for each in path.parent.glob(f"{path.stem}.*.npz"))
    return [int(name) for name in names if name.isdigit()]
