"""The checkpoints of a run: which there are, and what one holds."""

import contextlib
import re
from pathlib import Path
from typing import Any, Dict, Iterator, List, Tuple

import torch
from fairseq import checkpoint_utils

from fairseq_sparsemixer.errors import UserError
from fairseq_sparsemixer.files import atomic_path
from fairseq_sparsemixer.runs.archives import reason
from fairseq_sparsemixer.runs.reading import CheckpointError, read

EPOCH_PATTERN = re.compile(r"checkpoint(\d+)\.pt")
UPDATE_PATTERN = re.compile(r"checkpoint_(\d+)_(\d+)\.pt")
# fairseq writes the value with three decimals and then one or two digits of its own, which
# keep equal values apart and are no part of the value.
BEST_PATTERN = re.compile(r"checkpoint\.best_(.+)_(-?\d+\.\d{3})\d*\.pt")


def last_checkpoints(folder: Path, count: int) -> List[Path]:
    """The newest ``count`` epoch and update checkpoints of ``folder``, oldest first.

    Raises:
        UserError: there are fewer.
    """
    found = in_order(folder)
    what = f"checkpointE.pt or checkpoint_E_U.pt in {folder}"
    _check_count(len(found), count, "--last", what, "train with checkpoint.save_interval_updates")
    return found[-count:]


def in_order(folder: Path) -> List[Path]:
    """All epoch and update checkpoints of ``folder``, oldest first."""
    found: List[Tuple[Tuple[int, float], Path]] = []
    for path in folder.iterdir():
        epoch, update = EPOCH_PATTERN.fullmatch(path.name), UPDATE_PATTERN.fullmatch(path.name)
        if epoch:
            # checkpointE.pt ends epoch E: newer than each checkpoint_E_U.pt within it.
            found.append(((int(epoch[1]), float("inf")), path))
        elif update:
            found.append(((int(update[1]), int(update[2])), path))
    return [path for _, path in sorted(found)]


def best_checkpoints(folder: Path, count: int) -> List[Path]:
    """The best ``count`` of the ``checkpoint.best_METRIC_VALUE.pt`` in ``folder``, best first.

    Whether higher is better is read from a checkpoint (``maximize_best_checkpoint_metric``).

    Raises:
        UserError: there are fewer, or they were chosen by different metrics.
    """
    matches = [(path, BEST_PATTERN.fullmatch(path.name)) for path in sorted(folder.iterdir())]
    found = [(float(match[2]), path) for path, match in matches if match]
    what = f"checkpoint.best_METRIC_VALUE.pt in {folder}"
    keep = f"train with checkpoint.keep_best_checkpoints={count}"
    _check_count(len(found), count, "--best", what, keep)
    metrics = sorted({match[1] for _, match in matches if match})
    if len(metrics) > 1:
        raise UserError(
            f"{folder} holds best checkpoints by {' and '.join(metrics)}; name the files of one "
            "metric with --inputs instead of --best"
        )
    sign = -1 if _higher_is_better(load_state(found[0][1], to_average=True)) else 1
    return [path for _, path in sorted(found, key=lambda entry: sign * entry[0])[:count]]


def _higher_is_better(state: Dict[str, Any]) -> bool:
    """By the section of its settings, or by its flags, as fairseq wrote them before 0.10."""
    settings = (state.get("cfg") or {}).get("checkpoint")
    if state.get("args") is not None:
        settings = vars(state["args"])
    return isinstance(settings, dict) and bool(settings.get("maximize_best_checkpoint_metric"))


def _check_count(found: int, wanted: int, flag: str, what: str, to_have_them: str) -> None:
    """Raise UserError unless 1 <= ``wanted`` <= ``found``."""
    if wanted < 1:
        raise UserError(f"{flag} {wanted} averages nothing; give 1 or more")
    if not found:
        raise UserError(f"found no {what} for {flag} {wanted}: {to_have_them}")
    if found < wanted:
        raise UserError(f"found {found} of {what} for {flag} {wanted}; lower {flag}")


def load_state(path: Path, to_average: bool = False) -> Dict[str, Any]:
    """The content of a checkpoint, tensors on the CPU.

    Args:
        path: of the file.
        to_average: leave everything as it was written, since it is to be written again; errors
            name ``--inputs``. Else the content is what fairseq makes of it, with its config under
            ``cfg``, and errors name ``--checkpoint``.

    Raises:
        UserError: the file is missing, damaged or not a fairseq checkpoint.
    """
    flag = "--inputs" if to_average else "--checkpoint"
    cure = "leave it out of --inputs" if to_average else "choose another with --checkpoint"
    try:
        if to_average:
            return read(path, to_build=False)
        return checkpoint_utils.load_checkpoint_to_cpu(str(path))
    except FileNotFoundError as error:
        raise UserError(f"there is no checkpoint {path}; check {flag}") from error
    except CheckpointError as error:
        raise CheckpointError(path, error.refusal, cure) from error
    except Exception as error:  # of what fairseq makes of old and of foreign settings
        raise UserError(f"cannot read the checkpoint {path} ({reason(error)}); {cure}") from error


def check_finite(path: Path, state: Dict[str, Any], to_average: bool = False) -> None:
    """Refuse the weights of a training that diverged, which no search comes to an end with.

    Args:
        path: of the file.
        state: its content.
        to_average: as for :func:`load_state`.

    Raises:
        UserError: a parameter holds NaN or infinity; names it.
    """
    cure = "leave it out of --inputs" if to_average else "choose an earlier one with --checkpoint"
    for name, tensor in state["model"].items():
        if torch.is_tensor(tensor) and tensor.is_floating_point() and not tensor.isfinite().all():
            raise UserError(
                f"the checkpoint {path} is of a training that diverged ({name} is not finite); "
                f"{cure}"
            )


@contextlib.contextmanager
def building(path: Path) -> Iterator[None]:
    """A context in which the task and the model of a checkpoint are built.

    Raises:
        UserError: inside, where its settings fit no task or no model.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # fairseq checks few settings: they fail wherever they are used
        raise UserError(
            f"cannot build the model of the checkpoint {path} ({reason(error)}); choose another "
            "with --checkpoint"
        ) from error


def save_model(state: Dict[str, Any], output: Path) -> None:
    """Write a checkpoint whose model is not that of its training any more, whole or not at all.

    Optimiser state and the EMA copy of the weights, which belong to that training, are left out.

    Raises:
        FullDiskError: it does not fit on the disk.
    """
    state.pop("last_optimizer_state", None)
    for key in ("ema", "ema_fp32_params"):
        state.get("extra_state", {}).pop(key, None)
    # To an open file: of a path that is full torch does not tell why it could not be written.
    with atomic_path(output) as partial, partial.open("wb") as file:
        torch.save(state, file)


def num_updates(state: Dict[str, Any]) -> int:
    """The number of optimiser updates after which a checkpoint was written (0 if unknown)."""
    history = state.get("optimizer_history") or [{}]
    return history[-1].get("num_updates", 0)
