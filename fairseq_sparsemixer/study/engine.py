"""The engine of studies and the demo: works runs off in stages, stoppable at any time."""

import sys
import time
from pathlib import Path
from typing import (
    Any,
    Callable,
    Dict,
    Generator,
    Iterable,
    List,
    Mapping,
    NamedTuple,
    Optional,
    Sequence,
)

from fairseq_sparsemixer.disk import FullDiskError
from fairseq_sparsemixer.errors import UserError
from fairseq_sparsemixer.files import read_json
from fairseq_sparsemixer.runs.arms import Variant
from fairseq_sparsemixer.runs.mending import mend_last
from fairseq_sparsemixer.training.process import POLL_SECONDS, Process, copy_model_files


class Stage(NamedTuple):
    """A process that a run waits for.

    Attributes:
        name: of the stage.
        command: of the process.
        log: added to, with all that it prints; None for the terminal.
        environment: of the process; None for that of this one.
    """

    name: str
    command: List[str]
    log: Optional[Path] = None
    environment: Optional[Mapping[str, str]] = None


class Job:
    """A run at work.

    Attributes:
        run: that is done.
        slot: its place among those at work, from 0.
        stage: name of the stage, ``start`` before the first.
        process: of the stage.
        work: the stages to come.
    """

    process: Process
    work: Generator[Stage, None, None]

    def __init__(self, run: Variant, slot: int) -> None:
        self.run = run
        self.slot = slot
        self.stage = "start"


class Engine:
    """Works runs off, with so many at work at a time.

    Args:
        work: yields the stages of a job, and does what is to be done before, between and after
            them; it is closed at the yield where a stage fails or all is stopped. May raise
            UserError.
        show: called again and again for a job at work. May raise UserError.
        fail: told of a job that failed, and of the reason, None where it is its process's.
        jobs: at work at a time.
        cwd: of the processes (default: here).
        keep_open: file descriptors that they inherit.
    """

    def __init__(
        self,
        work: Callable[[Job], Generator[Stage, None, None]],
        show: Callable[[Job], None],
        fail: Callable[[Job, Optional[str]], None],
        *,
        jobs: int = 1,
        cwd: Optional[Path] = None,
        keep_open: Sequence[int] = (),
    ) -> None:
        self._work = work
        self._show = show
        self._fail = fail
        self._jobs = jobs
        self._cwd = cwd
        self._keep_open = keep_open
        self._at_work: List[Job] = []

    def do(self, runs: Iterable[Variant], deadline: Optional[float] = None) -> None:
        """Work until all is done, or the time is up.

        Args:
            runs: in the order in which they are begun.
            deadline: of :func:`time.monotonic`.

        Raises:
            FullDiskError: there is no room for one of them, and so for none.
            BaseException: as it came, once all processes have ended.
        """
        waiting = list(runs)
        try:
            while (waiting or self._at_work) and not _is_past(deadline):
                while waiting and len(self._at_work) < self._jobs:
                    self._begin(waiting.pop(0))
                time.sleep(POLL_SECONDS if self._at_work else 0)
                for job in list(self._at_work):
                    self._look_after(job)
        finally:
            for job in self._at_work:
                job.process.stop()
            for job in self._at_work:
                job.process.wait()
                job.work.close()

    def _begin(self, run: Variant) -> None:
        job = Job(run, min({*range(self._jobs)} - {each.slot for each in self._at_work}))
        job.work = self._work(job)
        if self._go_on(job):
            self._at_work.append(job)

    def _go_on(self, job: Job) -> bool:
        """Begin the next stage; whether there is one."""
        try:
            stage = next(job.work, None)
        except FullDiskError:
            raise
        except UserError as error:
            self._fail(job, str(error))
            return False
        if stage is None:
            return False
        job.stage = stage.name
        job.process = Process(
            stage.command,
            stage.log,
            env=stage.environment,
            cwd=self._cwd,
            keep_open=self._keep_open,
            with_parent=True,
        )
        return True

    def _look_after(self, job: Job) -> None:
        """Show what is new of a job, and go on where its stage has ended."""
        status = job.process.ended()
        reason = None
        try:
            self._show(job)
        except UserError as error:
            job.process.stop()
            job.process.wait()
            status, reason = 1, str(error)
        if status is None or (status == 0 and self._go_on(job)):
            return
        self._at_work.remove(job)
        if status:
            job.work.close()
            if reason is None:
                job.process.check_disk()
            self._fail(job, reason)


def _is_past(deadline: Optional[float]) -> bool:
    return deadline is not None and time.monotonic() >= deadline


def prepare_folder(folder: Path, binary: Path) -> None:
    """Make a run's folder one that can be trained in and, later, translated from.

    Args:
        folder: of the run; its last checkpoint is mended.
        binary: the corpus, as fairseq reads it.

    Raises:
        UserError: all checkpoints are damaged.
    """
    folder.mkdir(parents=True, exist_ok=True)
    mend_last(folder)
    copy_model_files(binary, folder)


def scoring_command(run: object, checkpoint: str, output: object, *more: str) -> List[str]:
    """The command line that scores a run on the test set.

    Args:
        run: folder of the run.
        checkpoint: its file's name.
        output: the JSON file.
        more: further flags.
    """
    return [
        *(sys.executable, "-m", "fairseq_sparsemixer.cli", "evaluate"),
        *("--checkpoint", checkpoint, *more, f"--output={output}"),
        *("--", str(run)),  # whatever it is called
    ]


def read_state(path: Path, shape: Dict[str, Any]) -> Dict[str, Any]:
    """How far a run is and what it was made with; empty where there is no file.

    Raises:
        UserError: it is damaged, or has not the shape (:func:`.files.misfit`).
    """
    cure = "remove it and start the same command again, which goes on from the last checkpoint"
    return read_json(path, shape, cure) if path.is_file() else {}
