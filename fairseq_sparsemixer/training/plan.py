"""What the flags of ``fairseq-sparsemixer train`` come to on a machine."""

import argparse
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Sequence

from fairseq_sparsemixer.errors import UserError
from fairseq_sparsemixer.training.machine import (
    Machine,
    find_machine,
    launcher,
    precision_overrides,
)
from fairseq_sparsemixer.training.settings import CHECKOUT, CONFIG_NAME, PACKAGE, compose, quoted

_FLAGS = {
    "model": "--model",
    "model.router": "--router",
    "model.num_experts": "--experts",
    "experts": "--experts, or --router dense",
    "recipe": "--recipe",
    "schedule": "--schedule",
    "data": "--pipeline, or task.data=FOLDER",
    "common.seed": "--seed",
    "checkpoint.save_dir": "--runs",
    "hydra.run.dir": "--runs",
    "gpus": "CUDA_VISIBLE_DEVICES and --nodes",
    "distributed_training.distributed_world_size": "CUDA_VISIBLE_DEVICES and --nodes",
}
"""Settings that the command makes itself, and what decides them."""
_PRECISION = {"common.fp16", "common.bf16", "common.amp", "common.cpu"}
"""Settings that are chosen by the machine, unless one of them is given."""


class Batch(NamedTuple):
    """How the tokens of an update are spread."""

    workers: int
    update_freq: int
    max_tokens: int

    @property
    def tokens_per_update(self) -> int:
        """The largest number of tokens, padding included, of each side."""
        return self.workers * self.update_freq * self.max_tokens


class Plan(NamedTuple):
    """A run as it will be started.

    Attributes:
        folder: of the run.
        command: that trains.
        overrides: of hydra, in ``command``.
        settings: every setting of fairseq, resolved.
        machine, batch: on what, and how much at a time.
        model: without storage.
        assumed_entries: of the dictionary, where there are no data yet; else None.
    """

    folder: Path
    command: List[str]
    overrides: List[str]
    settings: Dict[str, Any]
    machine: Machine
    batch: Batch
    model: Any
    assumed_entries: Optional[int]

    @property
    def data(self) -> Path:
        """What fairseq reads."""
        return Path(self.settings["task"]["data"])

    @property
    def precision(self) -> str:
        """``fp16``, ``bf16`` or ``fp32``."""
        common = self.settings["common"]
        return "fp16" if common["fp16"] else "bf16" if common["bf16"] else "fp32"


def make_plan(args: argparse.Namespace) -> Plan:
    """What the flags come to on this machine.

    Raises:
        UserError: they do not fit together, or not this machine.
    """
    from fairseq_sparsemixer.runs.arms import build_arm
    from fairseq_sparsemixer.training import resources

    configs = CHECKOUT / "configs"
    if not (configs / f"{CONFIG_NAME}.yaml").is_file():
        raise UserError("training runs from a checkout of the repository: configs/ is missing")
    given = {override.lstrip("+~").partition("=")[0] for override in args.overrides}
    for key in sorted(given & _FLAGS.keys()):
        raise UserError(f"{key}=... is not set here: use {_FLAGS[key]}")
    arm = build_arm(args.router, args.experts)
    machine = find_machine(args.nodes)
    folder = args.runs / _name(args, arm.name)
    overrides = [
        f"model={args.model}",
        f"data={'wmt14_en_de_moses' if args.pipeline == 'moses' else 'wmt14_en_de'}",
        f"schedule={args.schedule}",
        f"recipe={args.recipe}",
        *arm.overrides,
        f"common.seed={args.seed}",
        *([] if given & _PRECISION else precision_overrides(machine, args.recipe)),
        *args.overrides,
        f"common.user_dir={quoted(PACKAGE)}",
        f"checkpoint.save_dir={quoted(folder)}",
    ]
    one = compose(configs, overrides)
    batch = spread(one.dataset.max_tokens, one.optimization.update_freq, machine, args.max_tokens)
    overrides += [
        f"distributed_training.distributed_world_size={batch.workers}",
        f"dataset.max_tokens={batch.max_tokens}",
        f"optimization.update_freq=[{batch.update_freq}]",
    ]
    cfg = compose(configs, overrides)
    entries = None if _dictionary(cfg).is_file() else resources.VOCABULARY
    model = resources.build_on_meta(cfg.model, make_task(cfg, entries))
    return Plan(
        folder=folder,
        command=[
            *launcher(machine),
            *("fairseq_cli.hydra_train", "--config-dir", str(configs)),
            *("--config-name", CONFIG_NAME, f"hydra.run.dir={quoted(folder)}", *overrides),
        ],
        overrides=overrides,
        settings=_resolved(cfg),
        machine=machine,
        batch=batch,
        model=model,
        assumed_entries=entries,
    )


def _name(args: argparse.Namespace, arm: str) -> str:
    """The name of the run: the arm, what is not the default, and the seed."""
    usual = {"model": "base", "recipe": "recommended", "schedule": "long"}
    usual["pipeline"] = "sentencepiece"
    parts = [getattr(args, flag) for flag in usual if getattr(args, flag) != usual[flag]]
    return "-".join([arm, *parts, f"seed{args.seed}"])


def spread(
    max_tokens: Optional[int], update_freq: Sequence[int], machine: Machine, wanted: Optional[int]
) -> Batch:
    """Spread an update over the workers, with the tokens that one worker alone would give it.

    Args:
        max_tokens, update_freq: as configured, for one worker.
        machine: that trains.
        wanted: ``--max-tokens``; None for ``max_tokens``.

    Raises:
        UserError: it does not come out even; names what does.
    """
    if not max_tokens or len(update_freq) != 1:
        raise UserError("the batch must be given by dataset.max_tokens and one update_freq")
    tokens = max_tokens * update_freq[0]
    workers, each = machine.workers, max_tokens if wanted is None else wanted
    if each < 1:
        raise UserError(f"--max-tokens must be at least 1, not {each}")
    if tokens % (workers * each) == 0:
        return Batch(workers, tokens // (workers * each), each)
    trouble = f"{workers} x --max-tokens {each} does not divide the {tokens} tokens of an update"
    if tokens % workers:
        possible = [str(n) for n in range(1, tokens // each + 1) if tokens % (n * each) == 0]
        raise UserError(
            f"{trouble}: train on {_either(possible)} GPUs (CUDA_VISIBLE_DEVICES, --nodes)"
            if possible
            else f"{trouble}: give another --max-tokens"
        )
    smaller = [tokens // (workers * n) for n in range(1, 1025) if tokens % (workers * n) == 0]
    possible = [str(size) for size in smaller if size < each][:4]
    raise UserError(f"{trouble}: give --max-tokens {_either(possible)}")


def _either(values: Sequence[str]) -> str:
    return " or ".join([", ".join(values[:-1]), values[-1]] if len(values) > 1 else values)


def _resolved(cfg: Any) -> Dict[str, Any]:
    from omegaconf import OmegaConf

    values = OmegaConf.to_container(cfg, resolve=True, enum_to_str=True)
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def _dictionary(cfg: Any) -> Path:
    return Path(cfg.task.data) / f"dict.{cfg.task.source_lang}.txt"


def make_task(cfg: Any, assumed_entries: Optional[int]) -> Any:
    """fairseq's task, with the dictionaries of its data or with assumed ones of so many entries."""
    from fairseq.tasks.translation import TranslationTask

    from fairseq_sparsemixer.training.resources import assumed_dictionary

    if assumed_entries is None:
        return TranslationTask.setup_task(cfg.task)
    dictionary = assumed_dictionary(assumed_entries)
    return TranslationTask(cfg.task, dictionary, dictionary)
