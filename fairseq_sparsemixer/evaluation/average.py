"""Average the parameters of several checkpoints of one run into a new checkpoint.

A mean over the last or the best checkpoints usually translates better than any one of them.
The result serves for translation and scoring, or to fine-tune from; it holds no optimiser state.

  fairseq-sparsemixer average --inputs RUN_DIR --last 5 --output RUN_DIR/averaged.pt
  fairseq-sparsemixer average --inputs RUN_DIR --best 5 --output RUN_DIR/averaged.pt
  fairseq-sparsemixer average --inputs A.pt B.pt --output averaged.pt
"""

import argparse
import re
from pathlib import Path
from typing import Any, Dict, List, Tuple

from fairseq_sparsemixer.errors import UserError
from fairseq_sparsemixer.files import atomic_path, check_writable

HELP = "average the last or best checkpoints of a run"

EPOCH_PATTERN = re.compile(r"checkpoint(\d+)\.pt")
UPDATE_PATTERN = re.compile(r"checkpoint_(\d+)_(\d+)\.pt")
# fairseq writes the value with three decimals and then one or two digits of its own, which
# keep equal values apart and are no part of the value.
BEST_PATTERN = re.compile(r"checkpoint\.best_(.+)_(-?\d+\.\d{3})\d*\.pt")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``fairseq-sparsemixer average``."""
    parser.add_argument(
        "--inputs",
        nargs="+",
        required=True,
        type=Path,
        metavar="PATH",
        help="a run folder (with --last or --best), or checkpoint files",
    )
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument(
        "--last",
        type=int,
        metavar="N",
        help="the newest N of checkpointE.pt and checkpoint_E_U.pt (epoch E, update U)",
    )
    choice.add_argument(
        "--best",
        type=int,
        metavar="N",
        help="the best N of those that fairseq's --keep-best-checkpoints wrote",
    )
    parser.add_argument("--output", required=True, type=Path, metavar="FILE", help="where to write")


def run(args: argparse.Namespace) -> None:
    """Choose, average and write checkpoints."""
    check_writable(args.output)
    paths = choose_checkpoints(args)
    average_checkpoints(paths, args.output)
    print(f"wrote {args.output}, the mean of:", *(f"  {path}" for path in paths), sep="\n")


def choose_checkpoints(args: argparse.Namespace) -> List[Path]:
    """The files that ``--inputs`` with ``--last`` or ``--best`` stand for.

    Raises:
        UserError: the flags do not fit together, or name too few checkpoints.
    """
    folders = [path for path in args.inputs if path.is_dir()]
    if not folders:
        if args.last is not None or args.best is not None:
            raise UserError("--last and --best choose from a run folder; give --inputs one folder")
        return list(args.inputs)
    if len(args.inputs) > 1:
        raise UserError("--inputs takes either one run folder or checkpoint files, not both")
    if args.last is not None:
        return last_checkpoints(folders[0], args.last)
    if args.best is not None:
        return best_checkpoints(folders[0], args.best)
    raise UserError(f"{folders[0]} is a folder; add --last N or --best N to choose from it")


def last_checkpoints(folder: Path, count: int) -> List[Path]:
    """The newest ``count`` epoch and update checkpoints of ``folder``, oldest first.

    Raises:
        UserError: there are fewer.
    """
    found: List[Tuple[Tuple[int, float], Path]] = []
    for path in folder.iterdir():
        epoch, update = EPOCH_PATTERN.fullmatch(path.name), UPDATE_PATTERN.fullmatch(path.name)
        if epoch:
            # checkpointE.pt ends epoch E: newer than each checkpoint_E_U.pt within it.
            found.append(((int(epoch[1]), float("inf")), path))
        elif update:
            found.append(((int(update[1]), int(update[2])), path))
    _check_count(len(found), count, "--last", f"checkpointE.pt or checkpoint_E_U.pt in {folder}")
    return [path for _, path in sorted(found)[-count:]]


def best_checkpoints(folder: Path, count: int) -> List[Path]:
    """The best ``count`` of the ``checkpoint.best_METRIC_VALUE.pt`` in ``folder``, best first.

    Whether higher is better is read from a checkpoint (``maximize_best_checkpoint_metric``).

    Raises:
        UserError: there are fewer, or they were chosen by different metrics.
    """
    matches = [(path, BEST_PATTERN.fullmatch(path.name)) for path in sorted(folder.iterdir())]
    found = [(float(match[2]), path) for path, match in matches if match]
    _check_count(len(found), count, "--best", f"checkpoint.best_METRIC_VALUE.pt in {folder}")
    metrics = sorted({match[1] for _, match in matches if match})
    if len(metrics) > 1:
        raise UserError(
            f"{folder} holds best checkpoints by {' and '.join(metrics)}; name the files of one "
            "metric with --inputs instead of --best"
        )
    checkpoint_cfg = load_state(found[0][1])["cfg"]["checkpoint"]
    sign = -1 if checkpoint_cfg["maximize_best_checkpoint_metric"] else 1
    return [path for _, path in sorted(found, key=lambda entry: sign * entry[0])[:count]]


def _check_count(found: int, wanted: int, flag: str, what: str) -> None:
    """Raise UserError unless 1 <= ``wanted`` <= ``found``."""
    if wanted < 1:
        raise UserError(f"{flag} {wanted} averages nothing; give 1 or more")
    if found < wanted:
        raise UserError(f"found {found} of {what} for {flag} {wanted}; lower {flag}")


def load_state(path: Path) -> Dict[str, Any]:
    """The content of a checkpoint, tensors on the CPU.

    Raises:
        UserError: the file is missing, damaged or not a fairseq checkpoint.
    """
    import pickle

    import torch

    try:
        state = torch.load(path, map_location="cpu")
    except FileNotFoundError as error:
        raise UserError(f"there is no checkpoint {path}; check --inputs") from error
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"cannot read the checkpoint {path} ({reason}); copy it again or leave it out of "
            "--inputs"
        ) from error
    if not isinstance(state, dict) or not isinstance(state.get("model"), dict):
        raise UserError(f"{path} is not a checkpoint of fairseq; leave it out of --inputs")
    return state


def average_checkpoints(paths: List[Path], output: Path) -> None:
    """Write the mean of ``paths`` to ``output``, atomically.

    Floating-point entries are averaged and keep their dtype. Everything else (integer buffers,
    config, counters) comes from the newest file, the one with the most updates. Optimiser state
    and the EMA copy of the weights, which belong to one file alone, are left out; the names of
    the inputs are kept under ``averaged_from``.

    Raises:
        UserError: a file cannot be read, or does not fit the first.
    """
    import torch

    newest: Dict[str, Any] = {}
    sums: Dict[str, torch.Tensor] = {}
    for path in paths:
        state = load_state(path)
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
        return load_state(output).get("averaged_from") == [path.name for path in paths]
    except UserError:
        # Damaged: to be made again.
        return False


def _accumulator_dtype(dtype: Any) -> Any:
    """A dtype wide enough that the sum of a few checkpoints loses nothing that counts."""
    import torch

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


def num_updates(state: Dict[str, Any]) -> int:
    """The number of optimiser updates after which a checkpoint was written (0 if unknown)."""
    history = state.get("optimizer_history") or [{}]
    return history[-1].get("num_updates", 0)


def _write_average(
    newest: Dict[str, Any], means: Dict[str, Any], paths: List[Path], output: Path
) -> None:
    """Put ``means`` into the newest state and save it to ``output``."""
    import torch

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
    newest.pop("last_optimizer_state", None)
    for key in ("ema", "ema_fp32_params"):
        newest.get("extra_state", {}).pop(key, None)
    newest["averaged_from"] = [path.name for path in paths]
    with atomic_path(output) as partial:
        torch.save(newest, partial)
