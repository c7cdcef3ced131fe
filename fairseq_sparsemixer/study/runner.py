"""Does the runs of a study that are left: trains and scores them, several at once if asked to."""

import json
import os
import shlex
import time
from pathlib import Path
from typing import Any, Dict, Generator, List, NamedTuple, Optional

import torch

from fairseq_sparsemixer.errors import UserError
from fairseq_sparsemixer.files import write_json
from fairseq_sparsemixer.locks import sole_user
from fairseq_sparsemixer.runs import points, record
from fairseq_sparsemixer.runs.arms import Variant
from fairseq_sparsemixer.runs.checkpoints import load_state, num_updates
from fairseq_sparsemixer.runs.folder import STUDY_STATE
from fairseq_sparsemixer.runs.mending import LAST, is_fairseqs
from fairseq_sparsemixer.runs.metrics import MAIN
from fairseq_sparsemixer.study.engine import (
    Engine,
    Job,
    Stage,
    prepare_folder,
    scoring_command,
)
from fairseq_sparsemixer.study.layout import (
    KEY,
    PLAN,
    PRETRAINED,
    lay_out,
    made_with,
    read_run_state,
    task_overrides,
)
from fairseq_sparsemixer.study.machine import Choice, choose
from fairseq_sparsemixer.study.plan import CHECKPOINTS, Plan
from fairseq_sparsemixer.training import process
from fairseq_sparsemixer.training.machine import find_machine
from fairseq_sparsemixer.training.resources import Parameters
from fairseq_sparsemixer.training.settings import CHECKOUT, PACKAGE, quoted, training_command

SCORES = Path("evaluation", "test.json")
# The same for all seeds of an arm, which are told apart by nothing else.
BEGINNING = (f"checkpoint.finetune_from_model='${{checkpoint.save_dir}}/{PRETRAINED}'",)


def run(
    plan: Path,
    output: Optional[Path] = None,
    *,
    jobs: Optional[int] = None,
    minutes: Optional[float] = None,
    prepare_only: bool = False,
) -> None:
    """Lay the study out and do what is left of it.

    Args:
        plan: the YAML file, or the folder of a study to go on with.
        output: folder of the study, where a plan is given.
        jobs: models trained at once (default: those of the plan).
        minutes: after which it stops.
        prepare_only: only lay it out.

    Raises:
        FullDiskError: there is no room on the disk; all that is finished is kept.
        UserError: the study cannot be laid out, or a run failed.
    """
    started = time.monotonic()
    folder, plan_file = (plan, plan / PLAN) if output is None else (output, plan)
    if output is None and not plan_file.is_file():
        raise UserError(f"{folder} holds no {PLAN}: give the folder of a study, or a plan")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output {folder} is not a folder")
    folder.mkdir(parents=True, exist_ok=True)
    with sole_user(folder, "--output") as lock:
        content, parameters = lay_out(plan_file, folder)
        if prepare_only:
            runs = len(content.runs())
            print(f"laid out: {folder}; {runs} runs to do with this folder as STUDY")
            return
        deadline = None if minutes is None else started + 60 * minutes
        records = _records(content, parameters)
        machine = find_machine(1)
        choice = choose(folder, content, machine)
        study = _Study(folder, content, choice, records, jobs or content.jobs, lock)
        for each in study.waiting:
            choice.check(each, folder, machine)
        study.do(deadline)


def _records(plan: Plan, parameters: Dict[str, Parameters]) -> Dict[str, Dict[str, Any]]:
    """What ``run.json`` says of each run that this machine trains."""
    shared = {
        "versions": record.versions(),
        "git": record.git_state(CHECKOUT),
        "gpus": find_machine(1).gpus[:1],
    }
    return {
        f"{name}-seed{seed}": {
            **shared,
            "parameters": {"total": counted.total, "active": counted.active},
        }
        for name, counted in parameters.items()
        for seed in plan.seeds
    }


class _Failure(NamedTuple):
    run: str
    stage: str
    reason: str


class _Study:
    """The runs that are left, with as many at work as there are jobs."""

    def __init__(
        self,
        folder: Path,
        plan: Plan,
        choice: Choice,
        records: Dict[str, Dict[str, Any]],
        jobs: int,
        lock: List[int],
    ) -> None:
        self.folder = folder
        self.plan = plan
        self.choice = choice
        self.records = records
        self.lock = lock
        self.task = task_overrides(folder, plan)
        self.waiting = [run for run in plan.runs() if not self._finished(run)]
        # Of all runs, not of those that are left: it decides the threads, and so how runs round.
        self.jobs = min(jobs, len(plan.runs()))
        self.done = len(plan.runs()) - len(self.waiting)
        self.shown: Dict[str, int] = {}
        self.failures: List[_Failure] = []
        self.gains = 0

    def do(self, deadline: Optional[float]) -> None:
        """Work until all is done, or the time is up.

        Raises:
            FullDiskError: there is no room on the disk.
            UserError: a run failed; the others were done.
            KeyboardInterrupt: as it came, once all processes have ended.
        """
        total = len(self.plan.runs())
        print(f"{total} runs, {self.done} of them finished before", flush=True)
        if self.waiting:
            print(self.choice.text, flush=True)
        engine = Engine(
            self._work,
            self._show_points,
            self._fail,
            jobs=self.jobs,
            cwd=self.folder,
            keep_open=self.lock,
        )
        engine.do(self.waiting, deadline)
        if self.failures:
            listed = "; ".join(
                f"{each.run} ({each.stage}: {each.reason})" for each in self.failures
            )
            raise UserError(f"{len(self.failures)} of {total} runs failed: {listed}")
        left = total - self.done
        if left:
            print(f"time is up: {left} of {total} runs are left; the same command goes on")
            if not self.gains:
                print("nothing was gained: give more --minutes, or a smaller evaluate_every")
        else:
            print(f"all {total} runs are finished: {self.folder}")
            folder = shlex.quote(str(self.folder))
            print(f"report     fairseq-sparsemixer report {folder} --output report.html")

    def _work(self, job: Job) -> Generator[Stage, None, None]:
        """Train a run, unless it is trained, then score it."""
        run, folder = job.run, self.folder / job.run.name
        self.shown[run.name] = len(points.read_points(folder / points.FILE))
        prepare_folder(folder, self.folder / "data" / "bin")
        # A process that finds nothing left to train takes its time to find that out.
        last = folder / LAST
        before = read_run_state(folder)
        trained = before.get("finished_updates", 0) >= self.plan.updates or (
            last.is_file() and num_updates(load_state(last)) >= self.plan.updates
        )
        state = {
            "finished_updates": 0,
            **before,
            **made_with(self.plan, run),
            KEY: self.choice.overrides,
        }
        if not trained:  # whoever goes on from it waits for the updates of a plan that has grown
            state["finished_updates"] = 0
        write_json(folder / STUDY_STATE, state)
        environment = self._environment(job.slot)
        if not trained:
            taken = [*self.choice.of(run), *run.overrides]
            about = {**self.records[run.name], "overrides": taken}
            if "common.cpu=true" in taken:
                about["gpus"] = []
            write_json(folder / record.RECORD, about)
            print(f"{run.name}: training", flush=True)
            command = self._training_command(run)
            yield Stage("train", command, folder / "train.log", environment)
        what = CHECKPOINTS[self.plan.score]
        # A corpus for its text; else what the task reads, which is what the run was trained on.
        more = () if self.plan.language else ("--data=data", "--beam", str(self.plan.beam))
        command = scoring_command(run.name, what, Path(run.name, SCORES), *more)
        yield Stage("evaluate", command, folder / "evaluate.log", environment)
        self._finish(run)

    def _environment(self, slot: int) -> Dict[str, str]:
        """That of a process, which shares the machine with those of the other slots."""
        environment = process.training_environment(os.environ)
        gpus = torch.cuda.device_count()
        if gpus:
            visible = os.environ.get("CUDA_VISIBLE_DEVICES")
            names = visible.split(",") if visible else list(map(str, range(gpus)))
            environment["CUDA_VISIBLE_DEVICES"] = names[slot % gpus]
        if self.jobs > 1:
            # Threads of several processes that wait for each other are slower than one.
            threads = max(1, (os.cpu_count() or 1) // self.jobs)
            environment = {"OMP_NUM_THREADS": str(threads), **environment}
        return environment

    def _training_command(self, run: Variant) -> List[str]:
        every = self.plan.evaluate_every
        overrides = [
            f"common.user_dir={quoted(PACKAGE)}",
            f"common.cpu={str(not torch.cuda.is_available()).lower()}",
            "distributed_training.distributed_world_size=1",
            *self.task,
            f"optimization.max_update={self.plan.updates}",
            f"dataset.validate_interval_updates={every}",
            f"checkpoint.save_interval_updates={every}",
            *(BEGINNING if self.plan.finetune_from else ()),
            *self.choice.of(run),
            *run.overrides,
        ]
        return training_command(Path("configs"), self.plan.config, Path(run.name), overrides)

    def _fail(self, job: Job, reason: Optional[str]) -> None:
        name, stage = job.run.name, job.stage
        log = f"see {self.folder / name / stage}.log"
        reason = reason or "; ".join(filter(None, [job.process.killed_by(), log]))
        print(f"{name}: {stage} failed: {reason}", flush=True)
        self.failures.append(_Failure(name, stage, reason))

    def _finish(self, run: Variant) -> None:
        folder = self.folder / run.name
        for path in folder.glob("checkpoint*.pt"):
            if is_fairseqs(path.name) and path.name != CHECKPOINTS[self.plan.score]:
                path.unlink()  # a study of many runs would fill the disk
        state = read_run_state(folder)
        write_json(folder / STUDY_STATE, {**state, "finished_updates": self.plan.updates})
        self.done += 1
        self.gains += 1
        scores = json.loads((folder / SCORES).read_text(encoding="utf-8"))["scores"]
        figures = [
            f"{metric.title} {scores[metric.key]['score']:.{metric.decimals}f}"
            for metric in MAIN
            if scores.get(metric.key)
        ]
        print(
            f"{run.name}: finished, {', '.join(figures)} "
            f"({self.done} of {len(self.plan.runs())} runs)",
            flush=True,
        )

    def _show_points(self, job: Job) -> None:
        name = job.run.name
        found = points.read_points(self.folder / name / points.FILE)
        for point in found[self.shown[name] :]:
            figures = [f"update {point['updates']} of {self.plan.updates}"]
            for key, text in (
                ("nll_loss", "validation nll {:.3f}"),
                ("bleu", "BLEU {:.2f}"),
                ("words_per_second", "{:.0f} words/s"),
            ):
                if point.get(key) is not None:
                    figures.append(text.format(point[key]))
            print(f"{name}: {', '.join(figures)}", flush=True)
            self.gains += 1
        self.shown[name] = len(found)

    def _finished(self, run: Variant) -> bool:
        folder = self.folder / run.name
        trained = read_run_state(folder).get("finished_updates", 0) >= self.plan.updates
        return trained and (folder / SCORES).is_file()
