"""Train and score several models alike: arms x seeds, as a YAML plan names them."""

import argparse
import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, TextIO, Tuple

import torch

from fairseq_sparsemixer.corpora.folder import CORPUS_RECORD
from fairseq_sparsemixer.errors import UserError
from fairseq_sparsemixer.files import atomic_path, report_full_disk, write_json
from fairseq_sparsemixer.runs import points
from fairseq_sparsemixer.runs.mending import LAST, mend_last
from fairseq_sparsemixer.study.plan import Plan, StudyRun, read_plan
from fairseq_sparsemixer.training import process

PACKAGE = Path(__file__).resolve().parents[1]
CONFIGS = PACKAGE.parent / "configs"
PLAN = "plan.yaml"
STATE = "study.json"
"""In the folder of a run: how it is made, and for how many updates it is finished."""
SCORES = Path("evaluation", "test.json")
LAYOUT_MEGABYTES = 200
"""Of disk for corpus and configs, and for the checkpoints of one small model."""
POLL_SECONDS = 0.2


def run(args: argparse.Namespace) -> None:
    """Lay the study out and do what is left of it."""
    started = time.monotonic()
    for flag, value in (("--jobs", args.jobs), ("--minutes", args.minutes)):
        if value is not None and not value > 0:
            raise UserError(f"{flag} {value} does nothing; give more than 0")
    folder, plan_file = _find(args)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output {folder} is not a folder")
    with report_full_disk(folder, LAYOUT_MEGABYTES):
        folder.mkdir(parents=True, exist_ok=True)
        with process.sole_user(folder, "--output") as lock:
            plan, parameters = lay_out(plan_file, folder)
            if args.prepare_only:
                runs = len(plan.runs())
                print(f"laid out: {folder}; {runs} runs to do with this folder as STUDY")
                return
            deadline = None if args.minutes is None else started + 60 * args.minutes
            records = _records(plan, parameters)
            _Study(folder, plan, records, args.jobs or plan.jobs, deadline, lock).do()


def _find(args: argparse.Namespace) -> Tuple[Path, Path]:
    """The study's folder, and the plan to take."""
    if args.plan.is_dir():
        if args.output is not None:
            raise UserError("--output goes with a plan; leave it out to go on with a study")
        if not (args.plan / PLAN).is_file():
            raise UserError(f"{args.plan} holds no {PLAN}: give the folder of a study, or a plan")
        return args.plan, args.plan / PLAN
    if args.output is None:
        raise UserError("say where to with --output STUDY")
    return args.output, args.plan


# The folder


def lay_out(plan_file: Path, folder: Path) -> Tuple[Plan, "Parameters"]:
    """Copy corpus, configs and plan into the study's folder, so that it depends on nothing else.

    What is there stays: corpus and configs are those that the study began with. A plan may have
    grown by arms, seeds or updates; it is copied last, once nothing speaks against it.

    Returns:
        The plan, and the parameters of each arm.

    Raises:
        UserError: the plan is wrong or does not go with what was trained; there is no such corpus.
    """
    plan = read_plan(plan_file)
    for run in plan.runs():
        _check_unchanged(folder / run.name, _made_with(plan, run))
    if plan_file != folder / PLAN:
        _copy_corpus(plan.data, folder / "data", plan_file)
        _copy_configs(CONFIGS / f"{plan.config}.yaml", folder / "configs", plan_file)
    parameters = _count_parameters(folder, plan)
    if plan_file != folder / PLAN:
        _copy(plan_file, folder / PLAN)
    return plan, parameters


def _copy_corpus(data: Path, target: Path, plan_file: Path) -> None:
    """What training and scoring read of it, its record last."""
    source, copy = data / CORPUS_RECORD, target / CORPUS_RECORD
    if copy.is_file():
        if source.is_file() and json.loads(source.read_text()) != json.loads(copy.read_text()):
            raise UserError(
                f"{data} is not the corpus that {target.parent} began with: name another folder "
                "with --output"
            )
        return
    held_out = [path for split in ("valid", "test") for path in data.glob(f"raw/{split}.*")]
    if not source.is_file() or not any(path.name.startswith("test.") for path in held_out):
        raise UserError(
            f"there is no prepared corpus with a test set in {data}: make it with "
            f"`fairseq-sparsemixer prepare`, or change data in {plan_file}"
        )
    for path in [*data.glob("bin/*"), *held_out, *data.glob("copy/*"), source]:
        _copy(path, target / path.relative_to(data))


def _copy_configs(config: Path, target: Path, plan_file: Path) -> None:
    """The config and all that it may be composed of; itself last, which says that all is there."""
    if (target / config.name).is_file():
        return
    if not config.is_file():
        raise UserError(f"there is no {config}: check config in {plan_file}")
    others = [path for path in sorted(CONFIGS.rglob("*.yaml")) if path != config]
    for path in [*others, config]:
        if not (target / path.relative_to(CONFIGS)).is_file():
            _copy(path, target / path.relative_to(CONFIGS))


def _copy(source: Path, target: Path) -> None:
    with atomic_path(target) as partial:
        shutil.copyfile(source, partial)


def _made_with(plan: Plan, run: StudyRun) -> Dict[str, Any]:
    """What may not change once a run is trained."""
    return {
        "overrides": run.overrides,
        "config": plan.config,
        "evaluate_every": plan.evaluate_every,
        "beam": plan.beam,
    }


def _check_unchanged(run: Path, made_with: Dict[str, Any]) -> None:
    state = _read_state(run)
    for key, value in made_with.items():
        before = state.get(key, value)
        if before != value:
            raise UserError(
                f"{run} was trained with other {key} ({_shown(before)}, not {_shown(value)}): give "
                "the arm another name in the plan, or name another folder with --output"
            )


def _shown(value: Any) -> str:
    return " ".join(value) if isinstance(value, list) else str(value)


def _read_state(run: Path) -> Dict[str, Any]:
    path = run / STATE
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


Parameters = Dict[str, Dict[str, int]]
"""By arm, ``total`` and ``active``."""


def _count_parameters(folder: Path, plan: Plan) -> Parameters:
    """Count those of each arm; building the models checks all settings.

    Raises:
        UserError: hydra or the model refuses an arm's settings.
    """
    from fairseq.data import Dictionary
    from fairseq.tasks.translation import TranslationTask

    from fairseq_sparsemixer.evaluation.translator import find_languages
    from fairseq_sparsemixer.training import resources
    from fairseq_sparsemixer.training.settings import compose

    binary = folder / "data" / "bin"
    found: Parameters = {}
    for name, overrides in plan.arms.items():
        try:
            settings = [*overrides, "checkpoint.save_dir=."]
            cfg = compose((folder / "configs").resolve(), settings, plan.config)
            languages = find_languages(cfg.task.source_lang, cfg.task.target_lang, [binary])
            dictionaries = [Dictionary.load(str(binary / f"dict.{each}.txt")) for each in languages]
            model = resources.build_on_meta(cfg.model, TranslationTask(cfg.task, *dictionaries))
        except UserError as error:
            raise UserError(f"arm {name}: {error}") from error
        counted = resources.count_parameters(model)
        found[name] = {"total": counted.total, "active": counted.active}
    return found


def _records(plan: Plan, parameters: Parameters) -> Dict[str, Dict[str, Any]]:
    """What ``run.json`` says of each run that this machine trains."""
    from fairseq_sparsemixer.runs import record

    shared = {
        "versions": record.versions(),
        "git": record.git_state(PACKAGE.parent),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())][:1],
    }
    return {
        f"{name}-seed{seed}": {**shared, "parameters": parameters[name]}
        for name in plan.arms
        for seed in plan.seeds
    }


# Doing it


class _Job:
    """A run at work: its training, then its scoring."""

    def __init__(
        self,
        run: StudyRun,
        folder: Path,
        slot: int,
        environment: Dict[str, str],
        lock: List[int],
    ):
        self.run = run
        self.slot = slot
        self.folder = folder / run.name
        self.stage = ""
        self.shown = len(points.read_points(self.folder / points.FILE))
        self._study = folder
        self._environment = environment
        self._lock = lock
        self._process: Optional[subprocess.Popen] = None
        self._log: Optional[TextIO] = None

    def start(self, stage: str, command: List[str]) -> None:
        """Begin a stage; its output is added to RUN/STAGE.log."""
        self.stage = stage
        self._log = (self.folder / f"{stage}.log").open("a", encoding="utf-8")
        self._process = subprocess.Popen(
            command,
            cwd=self._study,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=self._environment,
            pass_fds=tuple(self._lock),
            preexec_fn=_end_with_parent,
        )

    def ended(self) -> Optional[int]:
        """The exit status of the stage; None while it works."""
        assert self._process is not None and self._log is not None
        status = self._process.poll()
        if status is not None:
            self._log.close()
        return status

    def stop(self) -> None:
        """Ask the process to end."""
        assert self._process is not None
        self._process.terminate()

    def wait(self) -> None:
        """Until the process has ended, which is killed where it takes too long."""
        assert self._process is not None
        try:
            self._process.wait(process.STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _end_with_parent() -> None:
    """In the child: be killed with the study, whose restart would else find it still at work."""
    if sys.platform == "linux":
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)


class _Failure(NamedTuple):
    run: str
    stage: str
    reason: str


def _updates(checkpoint: Path) -> int:
    from fairseq_sparsemixer.runs.checkpoints import load_state, num_updates

    return num_updates(load_state(checkpoint))


class _Study:
    """The runs that are left, with as many at work as there are jobs."""

    def __init__(
        self,
        folder: Path,
        plan: Plan,
        records: Dict[str, Dict[str, Any]],
        jobs: int,
        deadline: Optional[float],
        lock: List[int],
    ) -> None:
        self.folder = folder
        self.plan = plan
        self.records = records
        self.deadline = deadline
        self.lock = lock
        self.waiting = [run for run in plan.runs() if not self._finished(run)]
        self.jobs = min(jobs, max(1, len(self.waiting)))
        self.done = len(plan.runs()) - len(self.waiting)
        self.at_work: List[_Job] = []
        self.failures: List[_Failure] = []
        self.gains = 0

    def do(self) -> None:
        """Work until all is done, or the time is up.

        Raises:
            UserError: a run failed; the others were done.
            KeyboardInterrupt: as it came, once all processes have ended.
        """
        total = len(self.plan.runs())
        print(f"{total} runs, {self.done} of them finished before", flush=True)
        try:
            while (self.waiting or self.at_work) and not self._time_is_up():
                while self.waiting and len(self.at_work) < self.jobs:
                    self._begin(self.waiting.pop(0))
                time.sleep(POLL_SECONDS)
                for job in list(self.at_work):
                    self._look_after(job)
        finally:
            for job in self.at_work:
                job.stop()
            for job in self.at_work:
                job.wait()
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
            print(f"report     fairseq-sparsemixer report {self.folder} --output report.html")

    def _time_is_up(self) -> bool:
        return self.deadline is not None and time.monotonic() >= self.deadline

    def _begin(self, run: StudyRun) -> None:
        folder = self.folder / run.name
        folder.mkdir(exist_ok=True)
        try:
            mend_last(folder)
            slot = min(set(range(self.jobs)) - {job.slot for job in self.at_work})
            job = _Job(run, self.folder, slot, self._environment(slot), self.lock)
            trained = (folder / LAST).is_file() and _updates(folder / LAST) >= self.plan.updates
        except UserError as error:
            self._fail(run.name, "start", str(error))
            return
        process.copy_model_files(self.folder / "data" / "bin", folder)
        write_json(folder / "run.json", self.records[run.name])
        state = {"finished_updates": 0, **_read_state(folder), **_made_with(self.plan, run)}
        write_json(folder / STATE, state)
        if trained:
            # fairseq looks at max_update after an update: it would train one more.
            job.start("evaluate", self._scoring_command(run))
        else:
            print(f"{run.name}: training", flush=True)
            job.start("train", self._training_command(run))
        self.at_work.append(job)

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

    def _training_command(self, run: StudyRun) -> List[str]:
        from fairseq_sparsemixer.training.settings import quoted

        every = self.plan.evaluate_every
        return [
            *(sys.executable, "-m", "fairseq_cli.hydra_train"),
            *("--config-dir", "configs", "--config-name", self.plan.config),
            f"hydra.run.dir={run.name}",
            f"common.user_dir={quoted(PACKAGE)}",
            f"common.cpu={str(not torch.cuda.is_available()).lower()}",
            "distributed_training.distributed_world_size=1",
            "task.data=data/bin",
            f"optimization.max_update={self.plan.updates}",
            f"dataset.validate_interval_updates={every}",
            f"checkpoint.save_interval_updates={every}",
            *run.overrides,
        ]

    def _scoring_command(self, run: StudyRun) -> List[str]:
        return [
            *(sys.executable, "-m", "fairseq_sparsemixer.cli", "evaluate", run.name),
            *("--checkpoint", LAST, "--data", "data"),
            *("--beam", str(self.plan.beam), "--output", str(Path(run.name, SCORES))),
        ]

    def _look_after(self, job: _Job) -> None:
        """Show what is new of a job, and begin what comes after a stage that has ended."""
        status = job.ended()
        try:
            self._show_points(job)
        except UserError as error:
            job.stop()
            job.wait()
            self.at_work.remove(job)
            self._fail(job.run.name, job.stage, str(error))
            return
        if status is None:
            return
        if status == 0 and job.stage == "train":
            job.start("evaluate", self._scoring_command(job.run))
            return
        self.at_work.remove(job)
        if status == 0:
            self._finish(job)
        else:
            self._fail(job.run.name, job.stage, f"see {job.folder / job.stage}.log")

    def _fail(self, run: str, stage: str, reason: str) -> None:
        print(f"{run}: {stage} failed: {reason}", flush=True)
        self.failures.append(_Failure(run, stage, reason))

    def _finish(self, job: _Job) -> None:
        for path in job.folder.glob("checkpoint*.pt"):
            if path.name != LAST:
                path.unlink()  # a study of many runs would fill the disk
        state = _read_state(job.folder)
        write_json(job.folder / STATE, {**state, "finished_updates": self.plan.updates})
        self.done += 1
        self.gains += 1
        scores = json.loads((job.folder / SCORES).read_text(encoding="utf-8"))["scores"]
        print(
            f"{job.run.name}: finished, BLEU {scores['bleu']['score']:.2f}, chrF2 "
            f"{scores['chrf']['score']:.2f} ({self.done} of {len(self.plan.runs())} runs)",
            flush=True,
        )

    def _show_points(self, job: _Job) -> None:
        found = points.read_points(job.folder / points.FILE)
        for point in found[job.shown :]:
            figures = [f"update {point['updates']} of {self.plan.updates}"]
            for key, text in (
                ("nll_loss", "validation nll {:.3f}"),
                ("bleu", "BLEU {:.2f}"),
                ("words_per_second", "{:.0f} words/s"),
            ):
                if point.get(key) is not None:
                    figures.append(text.format(point[key]))
            print(f"{job.run.name}: {', '.join(figures)}", flush=True)
            self.gains += 1
        job.shown = len(found)

    def _finished(self, run: StudyRun) -> bool:
        return _read_state(self.folder / run.name).get("finished_updates", 0) >= self.plan.updates
