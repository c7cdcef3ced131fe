"""What a request to train comes to on a machine."""

import itertools
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Sequence

from fairseq.tasks.translation import TranslationTask

from fairseq_sparsemixer.errors import UserError
from fairseq_sparsemixer.models.building import dictionary_of
from fairseq_sparsemixer.runs.arms import Variant, build_variant
from fairseq_sparsemixer.runs.record import kept_overrides, read_record
from fairseq_sparsemixer.training import resources
from fairseq_sparsemixer.training.machine import (
    PRECISION,
    Machine,
    find_machine,
    joining_overrides,
    launcher,
    precision_of,
    precision_overrides,
)
from fairseq_sparsemixer.training.settings import (
    CONFIGS,
    PACKAGE,
    compose,
    overridden,
    quoted,
    refuse_decided,
    resolved,
    training_command,
)

CONFIG = "wmt14"
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
    "gpus": "CUDA_VISIBLE_DEVICES, --workers and --nodes",
    "distributed_training.distributed_world_size": "CUDA_VISIBLE_DEVICES, --workers and --nodes",
}
"""Settings that the command makes itself, and what decides them."""


class Request(NamedTuple):
    """What is to be trained.

    Attributes:
        router, experts: of the layers with experts; ``dense`` for none.
        model, recipe, schedule: choices of configs/.
        pipeline: ``sentencepiece`` or ``moses``, how the text was cut.
        seed: of ``common.seed``.
        runs: folder of the runs.
        nodes, workers, cpu: see :func:`.machine.find_machine`.
        max_tokens: of one batch of one worker; None for that of the recipe.
        overrides: further ones of hydra.
    """

    router: str
    experts: int
    model: str
    recipe: str
    schedule: str
    pipeline: str
    seed: int
    runs: Path
    nodes: int
    workers: Optional[int]
    cpu: bool
    max_tokens: Optional[int]
    overrides: List[str]


class Batch(NamedTuple):
    """How the tokens of an update are spread."""

    workers: int
    update_freq: int
    max_tokens: int

    @property
    def tokens_per_update(self) -> int:
        """The largest number of tokens, padding included, of each side."""
        return self.workers * self.update_freq * self.max_tokens


class Launch(NamedTuple):
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
        return precision_of(self.settings["common"])


def plan_launch(request: Request) -> Launch:
    """What a request comes to on this machine.

    Raises:
        UserError: it does not fit together, or not this machine.
    """
    if not (CONFIGS / f"{CONFIG}.yaml").is_file():
        raise UserError("training runs from a checkout of the repository: configs/ is missing")
    refuse_decided(request.overrides, _FLAGS)
    variant = build_variant(request.router, request.experts)
    machine = find_machine(request.nodes, request.workers, request.cpu)
    folder = request.runs / name_of(request, variant.name)
    overrides = _overrides(request, variant, machine, folder)
    one = compose(CONFIGS, overrides, CONFIG)
    wanted = request.max_tokens
    batch = spread(one.dataset.max_tokens, one.optimization.update_freq, machine, wanted)
    overrides += [
        f"distributed_training.distributed_world_size={batch.workers}",
        f"dataset.max_tokens={batch.max_tokens}",
        f"optimization.update_freq=[{batch.update_freq}]",
    ]
    cfg = compose(CONFIGS, overrides, CONFIG)
    entries = None if _dictionary(cfg).is_file() else resources.VOCABULARY
    model = resources.build_on_meta(cfg.model, make_task(cfg, entries))  # fills settings, too
    return Launch(
        folder=folder,
        command=training_command(
            CONFIGS, CONFIG, folder, [*overrides, *joining_overrides(machine)], launcher(machine)
        ),
        overrides=overrides,
        settings=resolved(cfg),
        machine=machine,
        batch=batch,
        model=model,
        assumed_entries=entries,
    )


def _overrides(request: Request, variant: Variant, machine: Machine, folder: Path) -> List[str]:
    given = overridden(request.overrides) & PRECISION
    return [
        f"model={request.model}",
        f"data={'wmt14_en_de_moses' if request.pipeline == 'moses' else 'wmt14_en_de'}",
        f"schedule={request.schedule}",
        f"recipe={request.recipe}",
        *variant.overrides,
        f"common.seed={request.seed}",
        *([] if given else precision_overrides(machine, request.recipe)),
        *kept_overrides(read_record(folder).get("settings", {})),
        *request.overrides,
        f"common.user_dir={quoted(PACKAGE)}",
        f"checkpoint.save_dir={quoted(folder)}",
    ]


def name_of(request: Request, variant: str) -> str:
    """The name of the run: what is trained, what is not the default, and the seed."""
    usual = {"model": "base", "recipe": "recommended", "schedule": "long"}
    usual["pipeline"] = "sentencepiece"
    values = request._asdict()
    parts = [values[flag] for flag in usual if values[flag] != usual[flag]]
    return "-".join([variant, *parts, f"seed{request.seed}"])


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
            f"{trouble}: train on {_either(possible)} {_workers_in_words(machine)}, --nodes)"
            if possible
            else f"{trouble}: give another --max-tokens"
        )
    sizes = range(min(each, tokens // workers), 0, -1)
    fitting = (size for size in sizes if tokens % (workers * size) == 0)
    possible = list(map(str, itertools.islice(fitting, 4)))
    raise UserError(f"{trouble}: give --max-tokens {_either(possible)}")


def _workers_in_words(machine: Machine) -> str:
    return "GPUs (CUDA_VISIBLE_DEVICES" if machine.gpus else "workers (--workers"


def _either(values: Sequence[str]) -> str:
    return " or ".join([", ".join(values[:-1]), values[-1]] if len(values) > 1 else values)


def _dictionary(cfg: Any) -> Path:
    return Path(cfg.task.data) / f"dict.{cfg.task.source_lang}.txt"


def make_task(cfg: Any, assumed_entries: Optional[int]) -> Any:
    """fairseq's task, with the dictionaries of its data or with assumed ones of so many entries."""
    if assumed_entries is None:
        return TranslationTask.setup_task(cfg.task)
    dictionary = dictionary_of(assumed_entries)
    return TranslationTask(cfg.task, dictionary, dictionary)
