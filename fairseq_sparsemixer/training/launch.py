"""Train a Switch Transformer on WMT14 English-German with the recipes in configs/wmt14.yaml."""

import argparse
from pathlib import Path
from typing import Any, Dict

from fairseq_sparsemixer.errors import UserError
from fairseq_sparsemixer.files import sha256_of, write_json
from fairseq_sparsemixer.training.machine import environment_for
from fairseq_sparsemixer.training.plan import Plan, make_plan
from fairseq_sparsemixer.training.settings import CHECKOUT

LOG = "hydra_train.log"
"""fairseq's log, which hydra writes."""
OUTPUT = "train.log"
"""All that the training process printed, what ended it included."""


def run(args: argparse.Namespace) -> None:
    """Plan the run; print the plan, or start it."""
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
            plan.command, folder / OUTPUT, env=environment_for(plan.machine), keep_open=lock
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
        process.run_with_progress(plan.command, output, env=environment_for(plan.machine))


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
