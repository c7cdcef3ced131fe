"""Average the parameters of several checkpoints of one run into a new checkpoint."""

from pathlib import Path
from typing import Any, Dict, List

import torch

from fairseq_sparsemixer.errors import UserError
from fairseq_sparsemixer.runs.checkpoints import (
    best_checkpoints,
    check_finite,
    last_checkpoints,
    load_state,
    num_updates,
    save_model,
)


def average_checkpoints(paths: List[Path], output: Path) -> None:
    """Write the mean of ``paths`` to ``output``, atomically.

    Floating-point entries are averaged and keep their dtype. Everything else (integer buffers,
    config, counters) comes from the newest file, the one with the most updates. Optimiser state
    and the EMA copy of the weights, which belong to one file alone, are left out; the names of
    the inputs are kept under ``averaged_from``.

    Raises:
        UserError: a file cannot be read, or does not fit the first.
    """
    newest: Dict[str, Any] = {}
    sums: Dict[str, torch.Tensor] = {}
    for path in paths:
        state = load_state(path, to_average=True)
        check_finite(path, state, to_average=True)
        if newest:
            _check_same_model(newest["model"], state["model"], paths[0], path)
        for key, tensor in state["model"].items():
            if torch.is_tensor(tensor) and tensor.is_floating_point():
                wide = tensor.to(_accumulator_dtype(tensor.dtype), copy=True)
                sums[key] = sums[key].add_(wide) if key in sums else wide
        if not newest or num_updates(state) >= num_updates(newest):
            newest = state
    means = {
        key: total.div_(len(paths)).to(newest["model"][key].dtype) for key, total in sums.items()
    }
    _write_average(newest, means, paths, output)


def average_in_run(folder: Path, choice: str, count: int) -> Path:
    """The mean of a run's ``"last"`` or ``"best"`` checkpoints, as a file of its folder.

    Made where it is missing, older than a checkpoint, or of other ones.

    Returns:
        ``checkpoint_average`` + ``count`` + ``choice`` + ``.pt`` in ``folder``.

    Raises:
        UserError: ``folder`` is none, or holds too few checkpoints.
    """
    if not folder.is_dir():
        raise UserError(
            f"--{choice} chooses from a run folder and {folder} is none; give the folder as "
            f"RUN_DIR, or leave --{choice} out"
        )
    choose = {"last": last_checkpoints, "best": best_checkpoints}[choice]
    paths = choose(folder, count)
    output = folder / f"checkpoint_average{count}{choice}.pt"
    if not _is_average_of(paths, output):
        average_checkpoints(paths, output)
    return output


def _is_average_of(paths: List[Path], output: Path) -> bool:
    """Whether ``output`` is there, newer than all ``paths``, and names them as its inputs."""
    newest = max(path.stat().st_mtime_ns for path in paths)
    if not output.is_file() or output.stat().st_mtime_ns <= newest:
        return False
    try:
        return load_state(output, to_average=True).get("averaged_from") == [
            path.name for path in paths
        ]
    except UserError:
        # Damaged: to be made again.
        return False


def _accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """A dtype wide enough that the sum of a few checkpoints loses nothing that counts."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else torch.float64


def _check_same_model(
    first: Dict[str, Any], other: Dict[str, Any], first_path: Path, other_path: Path
) -> None:
    """Raise UserError naming both files and the first key that only one has or that differs."""
    cure = "average checkpoints of one run only"
    for key in sorted(first.keys() ^ other.keys()):
        holder, lacker = (first_path, other_path) if key in first else (other_path, first_path)
        raise UserError(f"{holder} has the parameter {key} and {lacker} has not; {cure}")
    for key in first:
        shape, other_shape = (getattr(model[key], "shape", ()) for model in (first, other))
        if shape != other_shape:
            raise UserError(
                f"the parameter {key} has the shape {list(shape)} in {first_path} and "
                f"{list(other_shape)} in {other_path}; {cure}"
            )


def _write_average(
    newest: Dict[str, Any], means: Dict[str, Any], paths: List[Path], output: Path
) -> None:
    """Put ``means`` into the newest state and save it to ``output``."""
    model = newest["model"]
    shared: Dict[Any, str] = {}
    for key, tensor in list(model.items()):
        if key not in means:
            continue
        # Tied tensors (embeddings) stay one storage, or the file would hold each copy.
        place = (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.stride())
        first = shared.setdefault((place, tensor.shape), key)
        tied = first != key and torch.equal(means[first], means[key])
        model[key] = means[first] if tied else means[key]
    newest["averaged_from"] = [path.name for path in paths]
    save_model(newest, output)
