"""The only file that knows how fairseq and torch versions differ.

It applies itself when it is imported.
"""

import argparse
import contextlib
import copy
import functools
import logging
import os
import shlex
import tarfile
from collections import OrderedDict
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from fairseq import checkpoint_utils, file_utils, models, utils
from fairseq.criterions import CRITERION_REGISTRY
from fairseq.data import (
    Dictionary,
    data_utils,
    fasta_dataset,
    indexed_dataset,
    language_pair_dataset,
    token_block_dataset,
)
from fairseq.dataclass import utils as dataclass_utils
from fairseq.distributed import utils as distributed_utils
from fairseq.logging import meters
from fairseq.optim.amp_optimizer import AMPOptimizer
from fairseq.tasks.translation import TranslationTask
from fairseq.trainer import Trainer
from hydra._internal import utils as hydra_utils
from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError, InterpolationKeyError

from fairseq_sparsemixer import (
    bits_per_byte,
    determinism,
    expert_parallelism,
    host_memory,
    restarts,
    watchdogs,
    workers,
)
from fairseq_sparsemixer.errors import UserError, end_with_one_line
from fairseq_sparsemixer.models import beam_search
from fairseq_sparsemixer.models.config import ConfigError
from fairseq_sparsemixer.models.ranges import check_numbers
from fairseq_sparsemixer.moe.dispatch import OBSTACLES
from fairseq_sparsemixer.moe.feed_forward import moe_layers
from fairseq_sparsemixer.runs import reading

logger = logging.getLogger(__name__)


def apply() -> None:
    """Cure what can be cured, and name what cannot."""
    if not torch.cuda.is_available():
        host_memory.keep()
    workers.apply()
    restarts.apply()
    expert_parallelism.apply()
    _check_checkpoints()  # after it: what is written whole must be plain
    _quote_fasta_files()
    _take_any_names()
    _keep_archives_in_their_folder()
    _give_numpy_its_long()
    _warn_of_dropped_sentences()
    _unscale_once()
    _end_updates()
    watchdogs.apply()
    _train_deterministically()
    _refuse_senseless_settings()
    _draw_differently_by_worker()
    _report_unknown_keys()
    _name_parts_that_do_not_fit()
    _name_damaged_dictionaries()
    _compare_data_and_dictionaries()
    _print_user_errors_alone()
    _measure_bleu_of_nothing()
    _name_missing_measures()
    bits_per_byte.apply()
    beam_search.apply()


class _TorchOfCheckpoints:
    """torch as fairseq's module of checkpoints sees it: with a ``load`` that checks."""

    load = staticmethod(lambda file, map_location=None: reading.read(file))

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def _check_checkpoints() -> None:
    """Let no checkpoint run code, in fairseq's commands and ``from_pretrained`` (:mod:`.reading`).

    And let it hold no values of numpy, as metrics of --eval-bleu do: torch reads plain ones only.
    Nor does it ask for a backend that only the machine has that it was trained on.
    """
    # Flags are kept as a Namespace, a plain record; fairseq sends them from worker to worker.
    torch.serialization.add_safe_globals([argparse.Namespace])
    checkpoint_utils.torch = _TorchOfCheckpoints()
    build, save = models.build_model, checkpoint_utils.torch_persistent_save

    @functools.wraps(build)
    def build_model(cfg: Any, task: Any, from_checkpoint: bool = False) -> Any:
        if from_checkpoint and getattr(cfg, "expert_parallel_size", None):
            cfg = copy.copy(cfg)
            cfg.expert_parallel_size = 1  # whoever reads a model has all of it
        with reading.bounded() if from_checkpoint else contextlib.nullcontext():
            model = build(cfg, task, from_checkpoint)
        for layer in moe_layers(model) if from_checkpoint else ():
            if layer.backend in OBSTACLES:  # a GPU's, which "auto" takes where there is one
                layer.backend = "auto"
        return model

    @functools.wraps(save)
    def torch_persistent_save(obj: Any, *args: Any, **kwargs: Any) -> Any:
        return save(reading.plain(obj), *args, **kwargs)

    models.build_model = build_model
    checkpoint_utils.torch_persistent_save = torch_persistent_save


def _quote_fasta_files() -> None:
    """Let no name of a file run code: fairseq hands that of a FASTA file to a shell as it is.

    It takes any file with this ending for one, and languages from the names in a data folder.
    """
    original = fasta_dataset.FastaDataset._build_index

    @functools.wraps(original)
    def _build_index(self: Any, path: str) -> Any:
        name = fasta_dataset.fasta_file_path(path)
        if shlex.quote(name) != name:
            raise UserError(
                f"fairseq cannot read the file {name!r}: give it a name of plain letters"
            )
        return original(self, path)

    fasta_dataset.FastaDataset._build_index = _build_index


def _take_any_names() -> None:
    """Languages with a hyphen, such as pt-br, and folders with a colon in their names.

    fairseq takes dict.pt-br.txt for data of pt and br, does not see the languages of
    train.en-pt-br.en.idx, and makes two folders of one with a colon.
    """
    infer, split = data_utils.infer_language_pair, utils.split_paths

    @functools.wraps(infer)
    def infer_language_pair(path: str) -> Any:
        names = [name.split(".") for name in os.listdir(path)]
        held = {(parts[1], parts[2]) for parts in names if len(parts) == 4}
        for pair, source in sorted(held):
            target = pair[len(source) + 1 :]
            if pair == f"{source}-{target}" and (pair, target) in held:
                return [source, target]
        return infer(path)

    @functools.wraps(split)
    def split_paths(paths: str, *args: Any, **kwargs: Any) -> Any:
        return [paths] if os.path.exists(paths) else split(paths, *args, **kwargs)

    data_utils.infer_language_pair, utils.split_paths = infer_language_pair, split_paths


class _TarfileOfModels:
    """tarfile as fairseq's module of files sees it: with an ``open`` that checks.

    fairseq moves what the names have in common to where the archive was: a name that leaves the
    folder would let a file be written, or moved, anywhere.
    """

    @staticmethod
    def open(name: str, mode: Any) -> tarfile.TarFile:
        """An archive whose members stay where they are unpacked."""
        archive = tarfile.open(name, mode)  # noqa: SIM115 - the caller closes it
        if hasattr(tarfile, "data_filter"):  # since 3.11.4: owners and modes are the user's
            archive.extraction_filter = tarfile.data_filter
        for member in archive.getmembers():
            leaves = os.path.isabs(member.name) or ".." in member.name.split("/")
            if leaves or not (member.isfile() or member.isdir()):
                raise UserError(f"{name} would write outside of its folder ({member.name!r})")
        return archive

    def __getattr__(self, name: str) -> Any:
        return getattr(tarfile, name)


def _keep_archives_in_their_folder() -> None:
    """``from_pretrained`` unpacks archives."""
    file_utils.tarfile = _TarfileOfModels()


class _NumpyOfData:
    """numpy as two of fairseq's data sets see it: with a name that numpy 2 has no more."""

    compat = SimpleNamespace(long=int)

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)


def _give_numpy_its_long() -> None:
    """Text cut into sentences (--sample-break-mode eos), and sources cut into buckets."""
    if not hasattr(np, "compat"):
        token_block_dataset.np = language_pair_dataset.np = _NumpyOfData()


def _warn_of_dropped_sentences() -> None:
    """Say so when fairseq leaves out sentences.

    fairseq's last versions drop the last batch of a data set, silently, unless its size is a
    multiple of --required-batch-size-multiple (8 by default).
    """
    original = data_utils.batch_by_size

    @functools.wraps(original)
    def batch_by_size(indices: Any, *args: Any, **kwargs: Any) -> Any:
        if not hasattr(indices, "__len__"):
            indices = list(indices)  # fairseq takes any iterable, once
        batches = original(indices, *args, **kwargs)
        dropped = len(indices) - sum(len(batch) for batch in batches)
        if dropped > 0:
            logger.warning(
                "fairseq leaves out %d of %d sentences; pass --required-batch-size-multiple 1 "
                "when you validate or generate",
                dropped,
                len(indices),
            )
        return batches

    data_utils.batch_by_size = batch_by_size


def _unscale_once() -> None:
    """Let --amp divide the gradient by the loss scale once.

    fairseq names two optimisers to torch's scaler, the wrapped one where it clips and the wrapper
    where it steps, which each have their turn.
    """

    def step(self: Any) -> None:
        self.scaler.step(self.optimizer)
        self.scaler.update()

    AMPOptimizer.step = step


def _end_updates() -> None:
    """Let experts learn what they learn without a gradient, as a part of each update.

    What they collect goes the way of the gradients: it is dropped with them, and used when fairseq
    counts the update, which it does not where a gradient overflowed. On all workers alike, outside
    of forward and backward, before the moving average is taken and a checkpoint written.
    """
    train_step, count, zero_grad = Trainer.train_step, Trainer.set_num_updates, Trainer.zero_grad

    def all_reduce(value: torch.Tensor) -> None:
        group = distributed_utils.get_data_parallel_group()
        distributed_utils.all_reduce(value, group=group)

    @functools.wraps(train_step)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not getattr(self.get_criterion(), "uses_routing_statistics", False):
            name = f"{self.cfg.criterion._name}_with_routing"
            if name not in CRITERION_REGISTRY:
                name = "label_smoothed_cross_entropy_with_routing"
            unbalanced = any(
                layer.router.needs_balance and layer.router.balance_bias is None
                for layer in moe_layers(self.model)
            )
            _warn_of_missing_balance(unbalanced, name)
        self.in_train_step = True
        try:
            return train_step(self, *args, **kwargs)
        finally:
            self.in_train_step = False

    @functools.wraps(count)
    def set_num_updates(self: Any, num_updates: int) -> None:
        if getattr(self, "in_train_step", False):  # not when a checkpoint is loaded
            several = distributed_utils.get_data_parallel_world_size() > 1
            for layer in moe_layers(self.model):
                layer.end_update(all_reduce if several else None)
        count(self, num_updates)

    @functools.wraps(zero_grad)
    def drop_gradients(self: Any) -> None:
        zero_grad(self)
        for layer in moe_layers(self.model):
            layer.drop_update()

    Trainer.train_step, Trainer.set_num_updates = step, set_num_updates
    Trainer.zero_grad = drop_gradients


def _train_deterministically() -> None:
    """Where the model's settings say so (:mod:`.determinism`); those of fairseq's own do not."""
    original = Trainer.__init__

    @functools.wraps(original)
    def __init__(self: Any, cfg: Any, *args: Any, **kwargs: Any) -> None:
        determinism.follow(bool(getattr(cfg.model, "deterministic", False)))
        original(self, cfg, *args, **kwargs)

    Trainer.__init__ = __init__
    for name in ("train_step", "valid_step"):
        setattr(Trainer, name, determinism.naming_the_flag(getattr(Trainer, name)))


def _refuse_senseless_settings() -> None:
    """Before the first update: numbers (:mod:`.models.ranges`), and odd measures of what is best.

    The seed is used before there is a trainer: by all commands, soon after they load extensions.
    """
    original, load = Trainer.__init__, utils.import_user_module

    @functools.wraps(original)
    def __init__(self: Any, cfg: Any, task: Any, *args: Any, **kwargs: Any) -> None:
        check_numbers(cfg)
        _check_best(cfg.checkpoint, task)
        original(self, cfg, task, *args, **kwargs)

    @functools.wraps(load)
    def import_user_module(args: Any) -> None:
        check_numbers(argparse.Namespace(common=args))
        load(args)

    Trainer.__init__, utils.import_user_module = __init__, import_user_module


def _check_best(cfg: Any, task: Any) -> None:
    """Raise ConfigError for a measure that nobody takes, or that is taken the wrong way round."""
    metric, most = cfg.best_checkpoint_metric, cfg.maximize_best_checkpoint_metric
    if metric == "bleu" and isinstance(task, TranslationTask) and not task.cfg.eval_bleu:
        raise ConfigError("--best-checkpoint-metric bleu needs --eval-bleu")
    wrong = f"{metric} would keep the worst checkpoint as the best"
    if metric in _BEST_IS_MOST and not most:
        raise ConfigError(
            f"--best-checkpoint-metric {wrong}: add --maximize-best-checkpoint-metric"
        )
    if metric in _BEST_IS_LEAST and most:
        raise ConfigError(
            f"--maximize-best-checkpoint-metric with --best-checkpoint-metric {wrong}: leave it out"
        )


_BEST_IS_MOST = ("bleu", "chrf", "accuracy")
_BEST_IS_LEAST = ("loss", "nll_loss", "ppl")
"""What validations measure; of others nothing is said."""


@functools.cache
def _warn_of_missing_balance(unbalanced: bool, criterion: str) -> None:
    """Once: a criterion that does not know of experts leaves them without a balance loss."""
    if unbalanced:
        logger.warning(
            "the criterion ignores the routing losses, so nothing balances the experts; "
            "use --criterion %s",
            criterion,
        )


WORKER_SEEDS = 1_000_003
"""Between the seeds of two workers: more than a run has updates, which are added as well."""


def _draw_differently_by_worker() -> None:
    """Give each worker router noise (and dropout) of its own.

    fairseq seeds all workers alike before each update, so that the first token of each, the second
    and so on draw the same noise. On a GPU, LayerDrop draws on the CPU and goes on leaving out the
    same layers everywhere. What is drawn follows from seed, update and worker, so a run that
    is resumed goes on as it would have.
    """
    original = Trainer._set_seed

    @functools.wraps(original)
    def _set_seed(self: Any) -> None:
        original(self)
        rank = self.data_parallel_rank
        if rank > 0 and _is_ours(self.model):
            seed = self.cfg.common.seed + self.get_num_updates() + WORKER_SEEDS * rank
            if self.cuda:
                torch.cuda.manual_seed(seed)
            else:
                torch.manual_seed(seed)

    Trainer._set_seed = _set_seed


def _is_ours(model: torch.nn.Module) -> bool:
    """Whether a model, wrapped or not, is of this package (a dense one too) or holds a part of it.

    By name: a model is not there yet when this file is imported behind fairseq.
    """
    package = f"{__name__.split('.')[0]}."
    return any(type(module).__module__.startswith(package) for module in model.modules())


def _report_unknown_keys() -> None:
    """Name an unknown key of a hydra configuration in one line.

    fairseq merges the settings with our dataclasses before the model sees them.
    """
    original = dataclass_utils.merge_with_parent

    @functools.wraps(original)
    def merge_with_parent(dc: Any, cfg: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return original(dc, cfg, *args, **kwargs)
        except ConfigKeyError as error:
            module = (dc if isinstance(dc, type) else type(dc)).__module__
            if not module.startswith("fairseq_sparsemixer."):
                raise
            part = module.split(".")[1].rstrip("s")  # model, criterion
            raise ConfigError(f"{part} settings: {str(error).splitlines()[0]}") from None

    dataclass_utils.merge_with_parent = merge_with_parent


class _OmegaConfOfFlags:
    """OmegaConf as fairseq's module of settings sees it: with an error that says what to do."""

    @staticmethod
    def to_container(cfg: Any, *args: Any, **kwargs: Any) -> Any:
        """Settings, of which some are what another part has."""
        try:
            return OmegaConf.to_container(cfg, *args, **kwargs)
        except InterpolationKeyError as error:
            parts = {"arch": cfg.get("model"), "task": cfg.get("task")}
            parts["criterion"] = cfg.get("criterion")
            flags = [f"--{flag} {part._name}" for flag, part in parts.items() if part]
            reason = str(error).splitlines()[0]
            raise ConfigError(
                f"{' and '.join(flags)} do not go together ({error.full_key}: {reason}): choose "
                "another"
            ) from None

    def __getattr__(self, name: str) -> Any:
        return getattr(OmegaConf, name)


def _name_parts_that_do_not_fit() -> None:
    """Say it in one line where a part asks another for a setting that this does not have."""
    dataclass_utils.OmegaConf = _OmegaConfOfFlags()


def _name_damaged_dictionaries() -> None:
    """Name a dictionary that is missing, cut off, doubled or no text in one line."""
    original = Dictionary.add_from_file

    @functools.wraps(original)
    def add_from_file(self: Any, f: Any) -> None:
        try:
            original(self, f)
        except Exception as error:
            if not isinstance(f, str):  # fairseq calls this again with the file that it opened
                raise
            reason = getattr(error, "strerror", None) or f"{error}".partition(". ")[0]
            raise UserError(
                f"cannot read the dictionary {f} ({reason}): copy it again, or make the corpus anew"
            ) from error

    Dictionary.add_from_file = add_from_file


def _compare_data_and_dictionaries() -> None:
    """Name data with other tokens than a dictionary has, which may be cut at the end of a line.

    A model would meet them in its first epoch, or much later. fairseq has just read all of the
    file, so that it costs little.
    """
    original = data_utils.load_indexed_dataset

    @functools.wraps(original)
    def load_indexed_dataset(path: str, dictionary: Any = None, *args: Any, **kwargs: Any) -> Any:
        found = original(path, dictionary, *args, **kwargs)
        for data in getattr(found, "datasets", [found]) if dictionary is not None else ():
            if isinstance(data, indexed_dataset.MMapIndexedDataset):
                last = np.frombuffer(data._bin_buffer, dtype=data._index.dtype).max(initial=0)
                if last >= len(dictionary):
                    raise UserError(
                        f"the data {path} have tokens up to number {last}, and their dictionary "
                        f"only {len(dictionary)} entries: one of the two is cut or of another "
                        "corpus; copy the folder again, or make the corpus anew"
                    )
        return found

    data_utils.load_indexed_dataset = load_indexed_dataset


def _print_user_errors_alone() -> None:
    """Print a :class:`UserError` that ends the program as one line, and end with status 2.

    hydra, which prints what ends its jobs itself, has a class of errors that explain themselves.
    """

    def reason(error: BaseException) -> BaseException:
        hidden = error.__context__ if _is_of_trainer(error) else None
        return hidden if isinstance(hidden, UserError) else error

    end_with_one_line(reason)
    alone = (hydra_utils.CompactHydraException, UserError)
    hydra_utils.CompactHydraException = alone  # type: ignore[misc, assignment]


def _is_of_trainer(error: BaseException) -> bool:
    """Whether this is fairseq's word for whatever goes wrong while a checkpoint is loaded."""
    traceback = error.__traceback__
    if traceback is None or type(error) is not Exception or error.__suppress_context__:
        return False
    while traceback.tb_next is not None:
        traceback = traceback.tb_next
    return traceback.tb_frame.f_globals.get("__name__") == "fairseq.trainer"


def _measure_bleu_of_nothing() -> None:
    """Let ``--eval-bleu`` find 0 where a model at its beginning says nothing.

    fairseq then logs no BLEU at all, and ends where that is the measure of the best checkpoint.
    """
    original = TranslationTask.reduce_metrics

    @functools.wraps(original)
    def reduce_metrics(self: Any, logging_outputs: Any, criterion: Any) -> None:
        found = [output for output in logging_outputs if "_bleu_sys_len" in output]
        if found and not any(output.get("_bleu_totals_0", 0) > 0 for output in found):
            # More than none, so that fairseq logs it, and less than makes a difference.
            rest = [output for output in logging_outputs if output is not found[0]]
            logging_outputs = [{**found[0], "_bleu_totals_0": 1e-9}, *rest]
        original(self, logging_outputs, criterion)

    TranslationTask.reduce_metrics = reduce_metrics


class _Measured(OrderedDict):
    """What was measured, by name."""

    def __missing__(self, name: str) -> Any:
        raise ConfigError(
            f"--best-checkpoint-metric {name}: validation measures no such thing; choose from "
            f"{', '.join(key for key in self if not key.startswith('_'))}"
        )


def _name_missing_measures() -> None:
    """Say what ``--best-checkpoint-metric`` may be."""
    smoothed = meters.MetersDict.get_smoothed_values

    @functools.wraps(smoothed)
    def get_smoothed_values(self: Any) -> Any:
        return _Measured(smoothed(self))

    meters.MetersDict.get_smoothed_values = get_smoothed_values


apply()
