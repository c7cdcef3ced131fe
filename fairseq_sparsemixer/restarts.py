"""Lets a training of fairseq be stopped at any time and started again as if it had never been.

Whoever loads the extension has it, ``fairseq-train --user-dir`` too: checkpoints that are whole or
missing under every name, a second start that makes the updates that one long run would have made,
nothing that one run of a sweep leaves to the next, and a folder for itself alone. fairseq's own
does otherwise (0.12.3 and its last main).
"""

import contextlib
import functools
import logging
import math
import shutil
import sys
import time
from pathlib import Path
from typing import Any, Dict

import torch
from fairseq import checkpoint_utils
from fairseq.distributed import utils as distributed_utils
from fairseq.file_io import PathManager
from fairseq.logging import meters, metrics, progress_bar
from fairseq.tasks import FairseqTask
from fairseq.trainer import Trainer
from omegaconf import OmegaConf

from fairseq_sparsemixer.disk import FullDiskError
from fairseq_sparsemixer.files import atomic_path
from fairseq_sparsemixer.locks import sole_user

logger = logging.getLogger(__name__)

PATIENCE = "early_stopping"
"""In the extra state of a checkpoint: the best validation, and how many since were no better."""
_TRIES = 3
_SECONDS_BETWEEN = 2.5
"""Of writing a checkpoint, as fairseq's own: a network's disk may come back."""


def apply() -> None:
    """Put this in the place of what fairseq does."""
    _save_whole()
    _copy_whole()
    _hand_to_all_workers()
    _keep_batches()
    _keep_patience()
    _resume_whole()
    _begin_alone()
    _save_alone()


# Checkpoints


def _save_whole() -> None:
    """Write a checkpoint whole or not at all.

    fairseq's tries after the first go on in the file that the first has begun.
    """
    original = checkpoint_utils.torch_persistent_save

    @functools.wraps(original)
    def torch_persistent_save(obj: Any, filename: str, async_write: bool = False) -> None:
        if async_write or not PathManager.supports_rename(filename):
            original(obj, filename, async_write)
            return
        for left in reversed(range(_TRIES)):
            try:
                with atomic_path(Path(filename)) as partial, partial.open("wb") as file:
                    torch.save(obj, file)
                return
            except FullDiskError:
                raise
            except Exception:
                if not left:
                    raise
                time.sleep(_SECONDS_BETWEEN)

    checkpoint_utils.torch_persistent_save = torch_persistent_save


def _copy_whole() -> None:
    """Copy a checkpoint to its other names whole or not at all; ``checkpoint_last.pt`` is one.

    No links: whoever wrote into one of them in place would change the others.
    """
    original = PathManager.copy

    @functools.wraps(original)
    def copy(src_path: str, dst_path: str, overwrite: bool = False) -> bool:
        if not overwrite or any(map(PathManager.path_requires_pathmanager, (src_path, dst_path))):
            return original(src_path, dst_path, overwrite)
        with atomic_path(Path(dst_path)) as partial:
            shutil.copyfile(src_path, partial)
        return True

    PathManager.copy = staticmethod(copy)


# The run that goes on


def _hand_to_all_workers() -> None:
    """Let the first worker hand a checkpoint to the others under torch >= 2.6.

    fairseq pickles it, and torch lets no more in than from a file: not fairseq's stand-in for a
    tensor, which is a number, nor the settings, of which every worker has its own.
    """
    torch.serialization.add_safe_globals([distributed_utils._TensorPlaceholder])
    original = distributed_utils.broadcast_object

    @functools.wraps(original)
    def broadcast_object(obj: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(obj, dict) and OmegaConf.is_config(obj.get("cfg")):
            obj = {**obj, "cfg": None}
        return original(obj, *args, **kwargs)

    distributed_utils.broadcast_object = broadcast_object


def _keep_batches() -> None:
    """Go on with the batches that the run was begun with.

    fairseq cuts them for its first epoch, seeded by that, and reuses them; a run that started again
    in another epoch would cut others.
    """
    original = FairseqTask.get_batch_iterator

    @functools.wraps(original)
    def get_batch_iterator(self: Any, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        epoch = kwargs.get("epoch", 1)
        reused = self.can_reuse_epoch_itr(dataset) and not any(
            kwargs.get(name) for name in ("disable_iterator_cache", "update_epoch_batch_itr")
        )
        if epoch == 1 or not reused or dataset in self.dataset_to_epoch_iter:
            return original(self, dataset, *args, **kwargs)
        iterator = original(self, dataset, *args, **{**kwargs, "epoch": 1})
        iterator.epoch = epoch
        dataset.set_epoch(epoch)
        return iterator

    FairseqTask.get_batch_iterator = get_batch_iterator


def _early_stopping() -> Dict[str, Any]:
    """What fairseq keeps at a function: ``best`` and ``num_runs``, or nothing."""
    for name in ("__main__", "fairseq_cli.train"):  # the first of python -m fairseq_cli.train
        function = getattr(sys.modules.get(name), "should_stop_early", None)
        if function is not None:
            return vars(function)
    return {}


def _keep_patience() -> None:
    """Write into a checkpoint how long ``--patience`` has waited."""
    original = Trainer.save_checkpoint

    @functools.wraps(original)
    def save_checkpoint(self: Any, filename: str, extra_state: Dict[str, Any]) -> Any:
        state = _early_stopping()
        if "best" in state:
            waited = {"best": float(state["best"]), "num_runs": int(state["num_runs"])}
            extra_state = {**extra_state, PATIENCE: waited}
        return original(self, filename, extra_state)

    Trainer.save_checkpoint = save_checkpoint


def _resume_whole() -> None:
    """Restore what fairseq writes and does not read, and let a finished run be finished."""
    original = checkpoint_utils.load_checkpoint

    @functools.wraps(original)
    def load_checkpoint(cfg: Any, trainer: Any, **kwargs: Any) -> Any:
        extra_state, iterator = original(cfg, trainer, **kwargs)
        # Without updates it is the model alone that was loaded, to begin from.
        if extra_state and trainer.get_num_updates() > 0 and not cfg.reset_meters:
            waited = extra_state.get(PATIENCE)
            if waited:
                _early_stopping().update(best=waited["best"], num_runs=waited["num_runs"])
            if not cfg.reset_dataloader and iterator.iterations_in_epoch == 0:
                _begin_epoch(trainer, iterator, extra_state)
        reason = _why_finished(cfg, trainer)
        if reason:
            logger.info("nothing is left to train: %s", reason)
            iterator = _NoEpoch()
        return extra_state, iterator

    checkpoint_utils.load_checkpoint = load_checkpoint


def _begin_epoch(trainer: Any, iterator: Any, extra_state: Dict[str, Any]) -> None:
    """Do what fairseq does between two epochs, before the second of which a run goes on.

    fairseq writes the checkpoint before it, and forgets all that was measured when it loads that.
    """
    if not trainer.cfg.checkpoint.reset_lr_scheduler:
        trainer.lr_step(iterator.epoch - 1)  # as in that epoch; fairseq has set the next
        trainer.lr_step(iterator.epoch - 1, extra_state.get("val_loss"))
    metrics.load_state_dict(extra_state.get("metrics", {}))
    metrics.reset_meters("train")
    for meter in metrics.get_meters("default").values():
        if isinstance(meter, meters.TimeMeter):
            meter.reset()  # its start was another process's


class _NoEpoch:
    """In place of the batches of a run that is finished: its next epoch comes after any."""

    next_epoch_idx = math.nan


def _why_finished(cfg: Any, trainer: Any) -> str:
    """Which limit is reached; empty if none. fairseq would look only after one more update."""
    limits = trainer.cfg.optimization
    updates, waited = trainer.get_num_updates(), _early_stopping().get("num_runs", 0)
    if not updates:
        return ""
    if 0 < limits.max_update <= updates:
        return f"{updates} of {limits.max_update} updates (--max-update) are made"
    if 0 < limits.stop_time_hours < trainer.cumulative_training_time() / 3600:
        return f"the {limits.stop_time_hours} hours (--stop-time-hours) are over"
    if 0 < cfg.patience <= waited:
        return f"the last {waited} validations (--patience) were no better than one before"
    return ""


# Runs that share a process


def _begin_alone() -> None:
    """Forget, where a run begins, the runs before it in this process, as those of ``--multirun``.

    fairseq keeps at functions and in modules: the best validation, without which a run that does
    not beat those before it gets no ``checkpoint_best.pt``; the patience; writers of TensorBoard,
    whose folder is that of the first run; files that are logged to; and the runs of Aim and of
    Weights & Biases.
    """
    original = metrics.reset
    services: Dict[str, Any] = {}

    @functools.wraps(original)
    def reset() -> None:
        for state in (vars(checkpoint_utils.save_checkpoint), _early_stopping()):
            for name in ("best", "num_runs"):
                state.pop(name, None)
        progress_bar._close_writers()
        progress_bar._tensorboard_writers.clear()
        for name in ("fairseq_cli.train", progress_bar.__name__):
            _close_log_files(logging.getLogger(name))
        if progress_bar.get_aim_run is not None:
            progress_bar.get_aim_run.cache_clear()
        if services.pop("wandb", None) is not None:
            progress_bar.wandb.finish()
        original()

    metrics.reset = reset
    begin_wandb = progress_bar.WandBProgressBarWrapper.__init__

    @functools.wraps(begin_wandb)
    def begin(self: Any, *args: Any, **kwargs: Any) -> None:
        wandb = progress_bar.wandb
        ours = wandb is not None and wandb.run is None  # else of whoever called fairseq
        begin_wandb(self, *args, **kwargs)
        if ours:
            services["wandb"] = wandb.run

    progress_bar.WandBProgressBarWrapper.__init__ = begin


def _close_log_files(owner: logging.Logger) -> None:
    for handler in list(owner.handlers):
        if isinstance(handler, logging.FileHandler):
            owner.removeHandler(handler)
            handler.close()


def _save_alone() -> None:
    """Refuse to train into a folder that another process trains into."""
    original = checkpoint_utils.load_checkpoint
    # Until the process ends, or its next run begins.
    held = contextlib.ExitStack()

    @functools.wraps(original)
    def load_checkpoint(cfg: Any, trainer: Any, **kwargs: Any) -> Any:
        held.close()
        if trainer.is_data_parallel_master and not cfg.no_save:
            folder = Path(cfg.save_dir)
            folder.mkdir(parents=True, exist_ok=True)
            # Not the lock of whoever started this process.
            alone = sole_user(folder, "--save-dir", name=".training.lock", heirs=False)
            held.enter_context(alone)
        return original(cfg, trainer, **kwargs)

    checkpoint_utils.load_checkpoint = load_checkpoint
