"""Score a model that does not translate: its loss on a set, and what its task measures besides."""

import time
from pathlib import Path
from typing import Any, Dict, List, Optional

import torch
from fairseq import checkpoint_utils, tasks, utils
from fairseq.logging import metrics
from fairseq.tasks import TASK_REGISTRY
from omegaconf import open_dict
from tqdm import tqdm

from fairseq_sparsemixer.corpora.one_side import INPUT
from fairseq_sparsemixer.errors import UserError
from fairseq_sparsemixer.evaluation.options import ModelChoice
from fairseq_sparsemixer.evaluation.system import describe_checkpoints
from fairseq_sparsemixer.evaluation.translator import CheckpointInfo, chosen, find_checkpoints
from fairseq_sparsemixer.files import check_writable, sha256_of, write_json
from fairseq_sparsemixer.locks import in_turn
from fairseq_sparsemixer.runs.checkpoints import building, check_finite, load_state, num_updates
from fairseq_sparsemixer.runs.logs import nll_of
from fairseq_sparsemixer.runs.metrics import MAIN, NLL
from fairseq_sparsemixer.runs.record import versions
from fairseq_sparsemixer.tables import format_table


def evaluate_losses(model: ModelChoice, subset: str, output: Optional[Path]) -> None:
    """Measure, write and print.

    Args:
        model: what to score.
        subset: of the data of its task.
        output: JSON file; None for ``evaluation/SUBSET.CHECKPOINT.json`` in the run folder.

    Raises:
        UserError: there is no such model or set, or they do not fit.
    """
    started = time.perf_counter()
    paths = find_checkpoints(model.run, chosen(model))
    if len(paths) > 1:
        raise UserError("only models that translate are scored as an ensemble: name one checkpoint")
    (path,) = paths
    output = output or path.parent / "evaluation" / f"{subset}.{path.stem}.json"
    check_writable(output)
    state = load_state(path)
    check_finite(path, state)
    cfg = state["cfg"]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with building(path):
        task = _measured_task(cfg, model.data)
        network = checkpoint_utils.load_model_ensemble([str(path)], task=task, state=state)[0][0]
    stats = _validate(cfg, task, network.to(device).eval(), subset, device)
    figures = {NLL.key: nll_of(stats), **task.figures(subset, stats)}
    info = CheckpointInfo(path, num_updates(state), list(state.get("averaged_from", [])))
    file = _data_path(task, subset).with_suffix(".bin")
    data = {"name": subset}
    for side in ("source", "reference"):
        data.update({side: str(file), f"{side}_sha256": sha256_of(file)})
    evaluation = {
        "scores": {key: {"score": float(value)} for key, value in figures.items()},
        "checkpoints": describe_checkpoints([info]),
        "data": data,
        "generation": {"task": cfg.task._name, "device": device.type},
        "versions": versions(("fairseq_sparsemixer", "fairseq", "torch")),
        "seconds": {"total": time.perf_counter() - started},
    }
    with in_turn(output.with_suffix(""), beside=True):
        write_json(output, evaluation)
    print(f"{file}: {path.name} ({info.updates} updates)")
    shown = [metric for metric in MAIN if metric.key in figures]
    cells = [f"{figures[metric.key]:.{metric.decimals}f}" for metric in shown]
    print(format_table([["", *(metric.title for metric in shown)], ["model", *cells]]))
    print(f"written: {output}")


def _measured_task(cfg: Any, data: Optional[Path]) -> Any:
    """The task of a checkpoint, or that of this extension which measures it."""
    ending = "_with_routing"
    name = f"{cfg.task._name.replace(ending, '')}{ending}"
    if name not in TASK_REGISTRY:
        raise UserError(
            f"models of the task {cfg.task._name} are not scored here: use fairseq's own commands"
        )
    with open_dict(cfg):
        cfg.task._name = name
        if data is not None:
            cfg.task.data = str(data)
    folder = Path(utils.split_paths(cfg.task.data)[0])
    if not folder.is_dir():
        raise UserError(
            f"there is no folder {folder}: name with --data what the model was trained on, or work "
            "in the folder that it was trained in"
        )
    return tasks.setup_task(cfg.task)


def _data_path(task: Any, subset: str) -> Path:
    """Of the set's files, without their endings."""
    folder = Path(utils.split_paths(task.settings.data)[0])
    return (folder / INPUT if (folder / INPUT).is_dir() else folder) / subset


def _validate(
    cfg: Any, task: Any, network: Any, subset: str, device: torch.device
) -> Dict[str, float]:
    """What fairseq-validate finds on the whole set.

    Raises:
        UserError: there is no such set.
    """
    path = _data_path(task, subset)
    if not path.with_suffix(".idx").is_file():
        raise UserError(
            f"there is no {path}.idx: name another set with --subset, or with --data the folder "
            "that fairseq-preprocess wrote"
        )
    task.load_dataset(subset)
    criterion = task.build_criterion(cfg.criterion).to(device).eval()
    batches = task.get_batch_iterator(
        dataset=task.dataset(subset),
        max_tokens=cfg.dataset.max_tokens_valid or cfg.dataset.max_tokens,
        max_sentences=cfg.dataset.batch_size_valid or cfg.dataset.batch_size,
        max_positions=utils.resolve_max_positions(task.max_positions(), network.max_positions()),
        ignore_invalid_inputs=cfg.dataset.skip_invalid_size_inputs_valid_test,
        required_batch_size_multiple=1,  # fairseq drops the last incomplete batch otherwise
        disable_iterator_cache=True,
    ).next_epoch_itr(shuffle=False)
    logged: List[Dict[str, Any]] = []
    for sample in tqdm(batches, unit=" batches", disable=None):
        sample = utils.apply_to_sample(lambda tensor: tensor.to(device), sample)
        logged.append(task.valid_step(sample, network, criterion)[2])
    with metrics.aggregate(new_root=True) as found:
        task.reduce_metrics(logged, criterion)
    return {key: value for key, value in found.get_smoothed_values().items() if value is not None}
