"""Start or resume a run of WMT14 English-German, or say what it would need."""

import shlex
from pathlib import Path
from typing import Any, Dict

from fairseq_sparsemixer.errors import UserError
from fairseq_sparsemixer.files import sha256_of, write_json
from fairseq_sparsemixer.locks import sole_user
from fairseq_sparsemixer.runs import record
from fairseq_sparsemixer.runs.folder import LOG
from fairseq_sparsemixer.runs.logs import read_log
from fairseq_sparsemixer.runs.mending import LAST, mend_last
from fairseq_sparsemixer.training import process, resources
from fairseq_sparsemixer.training.dry_run import format_launch
from fairseq_sparsemixer.training.machine import environment_for
from fairseq_sparsemixer.training.plan import Launch, Request, plan_launch
from fairseq_sparsemixer.training.settings import CHECKOUT

OUTPUT = "train.log"
"""All that the training process printed, what ended it included."""


def run(request: Request, *, dry_run: bool = False) -> None:
    """Plan the run; print the plan, or start it.

    Raises:
        UserError: the request does not fit this machine or what was trained; training failed.
    """
    launch = plan_launch(request)
    if dry_run:
        print(format_launch(launch))
        return
    _check_data(launch)
    if launch.machine.rank == 0:
        _train(launch)
    else:
        _help_to_train(launch)


def _check_data(launch: Launch) -> None:
    if launch.assumed_entries is not None:
        moses = " --pipeline moses" if launch.data.parent.name.endswith("_moses") else ""
        raise UserError(
            f"there are no data in {launch.data}: run scripts/prepare_wmt14_en_de.sh{moses}, or "
            "name your own folder with task.data=FOLDER"
        )


def _train(launch: Launch) -> None:
    """Start or resume the run in its folder."""
    folder, batch = launch.folder, launch.batch
    print(f"== Training {folder.name}: {folder}", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    with sole_user(folder, "--runs") as lock:
        before = record.read_record(folder)
        start = _start(launch)
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
        process.copy_model_files(launch.data, folder)
        write_json(folder / record.RECORD, record.start_record(before, start))
        print(
            f"   {batch.workers} x {batch.update_freq} x {batch.max_tokens} tokens an update, "
            f"{launch.precision}, on {', '.join(sorted(set(launch.machine.gpus))) or 'the CPU'}"
        )
        process.run_with_progress(
            launch.command, folder / OUTPUT, env=environment_for(launch.machine), keep_open=lock
        )
    if not _finished(folder):
        print("   stopped before its end: start the same command again to go on")
    print(f"checkpoint {folder / LAST}")
    print(f"log        {folder / LOG}")
    print(f"settings   {folder / record.RECORD}")
    print(f"score      scripts/evaluate_wmt14.sh {shlex.quote(str(folder))}")


def _help_to_train(launch: Launch) -> None:
    """What the other nodes do: node 0 alone looks after the folder."""
    launch.folder.mkdir(parents=True, exist_ok=True)
    if not _finished(launch.folder):
        output = launch.folder / f"train-node{launch.machine.rank}.log"
        process.run_with_progress(launch.command, output, env=environment_for(launch.machine))


def _start(launch: Launch) -> Dict[str, Any]:
    """What ``run.json`` says of this start."""
    parameters = resources.count_parameters(launch.model)
    return {
        "name": launch.folder.name,
        "settings": launch.settings,
        "overrides": launch.overrides,
        "tokens_per_update": launch.batch.tokens_per_update,
        "data": {path.name: sha256_of(path) for path in process.model_files(launch.data)},
        "parameters": {"total": parameters.total, "active": parameters.active},
        "versions": record.versions(),
        "git": record.git_state(CHECKOUT),
        "gpus": launch.machine.gpus,
        "nodes": launch.machine.nodes,
        **launch.batch._asdict(),
    }


def _finished(folder: Path) -> bool:
    """Whether training came to its own end."""
    return (folder / LOG).is_file() and read_log(folder / LOG).ended
