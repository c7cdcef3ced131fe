"""Train a Switch Transformer on WMT14 English-German with the recipes in configs/wmt14.yaml.

  scripts/train_wmt14.sh --router sparsemixer --experts 8 --dry-run
  scripts/train_wmt14.sh --router dense --schedule short --seed 2
  scripts/train_wmt14.sh --recipe released --pipeline moses model.dropout=0.2

An update has the same 16 x 8192 tokens on any number of GPUs. Each run lands in its own folder
below --runs and is resumed where it stopped: press Ctrl-C at any time and start the same command
again. run.json there holds every setting, and a start with others is refused. On several nodes,
start the command on each with --nodes, and with MASTER_ADDR and NODE_RANK in the environment, as
scripts/train_wmt14.sbatch does.
"""

import argparse
import logging
import os
import re
import sys
import warnings
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Sequence

from fairseq_sparsemixer.errors import UserError
from fairseq_sparsemixer.files import sha256_of, write_json

HELP = "train on WMT14 English-German, on whatever GPUs there are"
PACKAGE = Path(__file__).resolve().parents[1]
CHECKOUT = PACKAGE.parent
CONFIG_NAME = "wmt14"
LOG = "hydra_train.log"
"""fairseq's log, which hydra writes."""
OUTPUT = "train.log"
"""All that the training process printed, what ended it included."""
DEFAULT_PORT = "29500"

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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of the sub-command."""
    parser.add_argument(
        "--router",
        default="sparsemixer",
        metavar="NAME",
        help="one of docs/routers.md, or dense for the model without experts (default: "
        "%(default)s)",
    )
    parser.add_argument(
        "--experts", type=int, default=4, metavar="N", help="in each layer (default: %(default)s)"
    )
    parser.add_argument(
        "--model", choices=["base", "big"], default="base", help="default: %(default)s"
    )
    parser.add_argument(
        "--recipe",
        choices=["recommended", "released"],
        default="recommended",
        help="released: that of the SparseMixer paper's example (default: %(default)s)",
    )
    parser.add_argument(
        "--schedule",
        choices=["long", "short"],
        default="long",
        help="400,000 or 100,000 updates (default: %(default)s)",
    )
    parser.add_argument(
        "--pipeline",
        choices=["sentencepiece", "moses"],
        default="sentencepiece",
        help="how the text was cut; the released recipe took moses (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=1, help="default: %(default)s")
    parser.add_argument(
        "--runs",
        type=Path,
        default=Path("runs/wmt14"),
        metavar="DIR",
        help="folder of the runs (default: %(default)s)",
    )
    parser.add_argument(
        "--nodes",
        type=int,
        default=1,
        metavar="N",
        help="with as many GPUs each as this one (default: %(default)s)",
    )
    parser.add_argument(
        "--max-tokens",
        type=int,
        metavar="T",
        help="of one batch on one GPU, for its memory; an update keeps its tokens (default: that "
        "of the recipe)",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="only print the command, the parameters, and estimates of memory and time",
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="KEY=VALUE",
        help="further settings of configs/wmt14.yaml, such as model.jitter_eps=0.2",
    )


def run(args: argparse.Namespace) -> None:
    """Plan the run; print the plan, or start it."""
    from fairseq_sparsemixer.evaluation.options import quiet_libraries

    quiet_libraries()
    logging.getLogger("hydra").setLevel(logging.WARNING)
    plan = make_plan(args)
    if args.dry_run:
        from fairseq_sparsemixer.training.dry_run import format_plan

        print(format_plan(plan))
        return
    _check_data(plan)
    if plan.machine.rank == 0:
        _train(plan)
    else:
        _help_to_train(plan)


# What to do


class Machine(NamedTuple):
    """The GPUs to train on.

    Attributes:
        gpus: their names, on this node; empty where it has none and its CPU is one worker.
        bf16: whether all of them compute in bf16.
        nodes: as large as this one, itself included.
        rank: of this node, from 0.
        master: address and port of node 0.
    """

    gpus: List[str]
    bf16: bool
    nodes: int = 1
    rank: int = 0
    master: Sequence[str] = ("localhost", DEFAULT_PORT)

    @property
    def workers(self) -> int:
        """Processes that train together."""
        return self.nodes * max(1, len(self.gpus))


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
        *([] if given & _PRECISION else _precision(machine, args.recipe)),
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
            *_launcher(machine),
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


def quoted(path: Path) -> str:
    """A path as a value that hydra takes as it is."""
    if re.fullmatch(r"[\w./-]+", str(path)):
        return str(path)
    text = str(path).replace("'", "\\'")
    return f"'{text}'"


def find_machine(nodes: int) -> Machine:
    """The GPUs that CUDA shows (``CUDA_VISIBLE_DEVICES``), and this node's place among others.

    Raises:
        UserError: several nodes without a GPU, or without the environment that joins them.
    """
    import torch

    if nodes < 1:
        raise UserError(f"--nodes must be at least 1, not {nodes}")
    devices = range(torch.cuda.device_count())
    gpus = [torch.cuda.get_device_name(device) for device in devices]
    bf16 = all(torch.cuda.get_device_capability(device) >= (8, 0) for device in devices)
    machine = Machine(gpus, bool(gpus) and bf16)
    if nodes == 1:
        return machine
    if not gpus:
        raise UserError(f"--nodes {nodes} needs GPUs, and there is none: leave out --nodes")
    rank = os.environ.get("NODE_RANK", os.environ.get("SLURM_NODEID"))
    address = os.environ.get("MASTER_ADDR")
    if rank is None or not rank.isdigit() or int(rank) >= nodes or not address:
        raise UserError(
            f"--nodes {nodes} needs MASTER_ADDR (the host of node 0) and NODE_RANK (0 to "
            f"{nodes - 1}) in the environment"
        )
    port = os.environ.get("MASTER_PORT", DEFAULT_PORT)
    return machine._replace(nodes=nodes, rank=int(rank), master=(address, port))


def _precision(machine: Machine, recipe: str) -> List[str]:
    """Overrides: bf16 where the GPU has it, fp16 elsewhere and in the released recipe."""
    if not machine.gpus:
        return ["common.cpu=true", "common.fp16=false"]
    if machine.bf16 and recipe != "released":
        return ["common.bf16=true", "common.fp16=false"]
    return []


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


def compose(configs: Path, overrides: List[str], name: str = CONFIG_NAME) -> Any:
    """The settings that ``fairseq-hydra-train`` would train with, defaults filled in.

    Args:
        configs: folder of the configs, absolute.
        overrides: of hydra.
        name: of the config.

    Raises:
        UserError: hydra refuses an override.
    """
    import hydra
    from fairseq.dataclass.configs import FairseqConfig
    from fairseq.dataclass.initialize import add_defaults, hydra_init
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    import fairseq_sparsemixer  # noqa: F401  (registers the model)

    hydra_init(name)
    try:
        with warnings.catch_warnings():
            # fairseq's schema has the name of the config, which hydra 1.1 still allowed.
            warnings.simplefilter("ignore")
            with hydra.initialize_config_dir(str(configs), version_base="1.1"):
                cfg = hydra.compose(name, overrides)
            add_defaults(cfg)
    except UserError:
        raise
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise UserError(f"hydra: {' '.join(str(error).split())}") from error
    for key in sorted(cfg.keys() - FairseqConfig.__dataclass_fields__.keys()):
        raise UserError(f"{key}: fairseq has no such group of settings")
    return cfg


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


def _launcher(machine: Machine) -> List[str]:
    """What starts the module: on one node fairseq makes a process for each GPU by itself."""
    if machine.nodes == 1:
        return [sys.executable, "-m"]
    return [
        *(sys.executable, "-m", "torch.distributed.run"),
        *(f"--nnodes={machine.nodes}", f"--nproc_per_node={len(machine.gpus)}"),
        *(f"--node_rank={machine.rank}", f"--master_addr={machine.master[0]}"),
        *(f"--master_port={machine.master[1]}", "-m"),
    ]


# Doing it


def _check_data(plan: Plan) -> None:
    if plan.assumed_entries is not None:
        moses = " --pipeline moses" if plan.data.parent.name.endswith("_moses") else ""
        raise UserError(
            f"there are no data in {plan.data}: run scripts/prepare_wmt14_en_de.sh{moses}, or name "
            "your own folder with task.data=FOLDER"
        )


def _train(plan: Plan) -> None:
    """Start or resume the run in its folder."""
    from fairseq_sparsemixer.runs import record
    from fairseq_sparsemixer.runs.mending import LAST, mend_last
    from fairseq_sparsemixer.training import process

    folder, batch = plan.folder, plan.batch
    print(f"== Training {folder.name}: {folder}", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    with process.sole_user(folder) as lock:
        before = record.read_record(folder)
        start = _start(plan)
        if before:
            record.check_same(folder, before, start)
        elif any(folder.glob("checkpoint*.pt")):
            raise UserError(
                f"{folder} holds checkpoints, but no {record.RECORD} that says what they are: name "
                "another folder with --runs"
            )
        if _finished(folder):
            print("   finished before")
            return
        mended = mend_last(folder)
        if mended or (folder / LAST).is_file():
            print(f"   goes on from {mended.name if mended else LAST}")
        process.copy_model_files(plan.data, folder)
        write_json(folder / record.RECORD, record.start_record(before, start))
        print(
            f"   {batch.workers} x {batch.update_freq} x {batch.max_tokens} tokens an update, "
            f"{plan.precision}, on {', '.join(sorted(set(plan.machine.gpus))) or 'the CPU'}"
        )
        process.run_with_progress(
            plan.command, folder / OUTPUT, env=_environment(plan.machine), keep_open=lock
        )
    if not _finished(folder):
        print("   stopped before its end: start the same command again to go on")
    print(f"checkpoint {folder / LAST}")
    print(f"log        {folder / LOG}")
    print(f"settings   {folder / record.RECORD}")
    print(f"score      scripts/evaluate_wmt14.sh {folder}")


def _help_to_train(plan: Plan) -> None:
    """What the other nodes do: node 0 alone looks after the folder."""
    from fairseq_sparsemixer.training import process

    plan.folder.mkdir(parents=True, exist_ok=True)
    if not _finished(plan.folder):
        output = plan.folder / f"train-node{plan.machine.rank}.log"
        process.run_with_progress(plan.command, output, env=_environment(plan.machine))


def _start(plan: Plan) -> Dict[str, Any]:
    """What ``run.json`` says of this start."""
    from fairseq_sparsemixer.runs import record
    from fairseq_sparsemixer.training import process, resources

    parameters = resources.count_parameters(plan.model)
    return {
        "name": plan.folder.name,
        "settings": plan.settings,
        "overrides": plan.overrides,
        "tokens_per_update": plan.batch.tokens_per_update,
        "data": {path.name: sha256_of(path) for path in process.model_files(plan.data)},
        "parameters": {"total": parameters.total, "active": parameters.active},
        "versions": record.versions(),
        "git": record.git_state(CHECKOUT),
        "gpus": plan.machine.gpus,
        "nodes": plan.machine.nodes,
        **plan.batch._asdict(),
    }


def _finished(folder: Path) -> bool:
    """Whether training came to its own end."""
    from fairseq_sparsemixer.runs.logs import read_log

    return (folder / LOG).is_file() and read_log(folder / LOG).ended


def _environment(machine: Machine) -> Dict[str, str]:
    """The environment of the training process.

    On one node fairseq must join no others, though a launcher or Slurm tells it of some.
    """
    environment = dict(os.environ)
    if machine.nodes == 1:
        for name in _OTHER_WORKERS:
            environment.pop(name, None)
    return environment


_OTHER_WORKERS = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "SLURM_JOB_NODELIST",
    "SLURM_STEP_NODELIST",
)
"""Variables by which fairseq finds processes that it did not start."""
