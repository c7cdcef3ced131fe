"""Works the steps off within the time given, and keeps what they have found at every moment."""

import json
import os
import tempfile
import time
from pathlib import Path
from typing import Callable, Dict, List, Mapping, Optional, Sequence

from benchmarks.gpu import results as kept
from benchmarks.gpu.results import Results
from benchmarks.gpu.steps import Step, stages
from benchmarks.measuring import Record
from fairseq_sparsemixer.training.process import Process

POLL_SECONDS = 0.1
MOST_OF_ESTIMATE = 3
"""So many times as long as it is thought to take may a step take, and LEAST_SECONDS in any case."""
LEAST_SECONDS = 60
WORTH_BEGINNING = 0.5
"""The share of its time that must be left for a step to begin: what it finds by then is kept."""
TO_END = 3
"""Seconds that are left for ending processes and for the summary."""
TO_END_A_STUDY = 25
"""Those for a study, which starts its trainings and ends them when its minutes are over."""
SHOWN_OF_LOG = 2000
"""Characters of a log that are kept as the error of a step."""

Headline = Callable[[str, Record], str]
"""(step, its result) -> the few words that its line has."""


class _Running:
    """A step at work."""

    def __init__(
        self, step: Step, folder: Path, deadline: float, environment: Mapping[str, str]
    ) -> None:
        self.step = step
        self.started = time.monotonic()
        self.deadline = deadline
        self.output = folder / "output.json"
        self.log = folder / "log.txt"
        self.read_at = 0
        command = [*step.command, "--output", str(self.output)]
        if step.until_the_end:
            left = max(deadline - self.started - TO_END_A_STUDY, 1)
            command += ["--minutes", f"{left / 60:.3f}"]
        self.process = Process(command, self.log, env=environment, with_parent=True)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    def news(self) -> Optional[Record]:
        """The result so far, where it has changed since the last call."""
        try:
            changed = self.output.stat().st_mtime_ns
        except FileNotFoundError:
            return None
        if changed == self.read_at:
            return None
        self.read_at = changed
        return json.loads(self.output.read_text(encoding="utf-8"))

    def log_text(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")


class Runner:
    """Runs what is missing in a folder of results.

    Args:
        results: of the folder.
        deadline: of :func:`time.monotonic`, for all of it.
        headline: says what a step has found.
        environment: of the processes.
    """

    def __init__(
        self,
        results: Results,
        deadline: float,
        headline: Headline,
        environment: Mapping[str, str],
    ) -> None:
        self.results = results
        self.deadline = deadline
        self._headline = headline
        self._environment = {**environment, "PYTHONUNBUFFERED": "1"}
        self._cores = os.cpu_count() or 1

    @property
    def left(self) -> float:
        """Seconds that steps may still take."""
        return self.deadline - TO_END - time.monotonic()

    def do(self, steps: Sequence[Step]) -> None:
        """Run the steps that are not done, as far as the time goes.

        Raises:
            KeyboardInterrupt: as it came, once all processes have ended and what they had is kept.
        """
        waiting = [step for step in steps if not self.results.done(step.name)]
        if len(waiting) < len(steps):
            print(f"{len(steps) - len(waiting)} of {len(steps)} steps were done before", flush=True)
        seconds = sum(max(step.seconds for step in stage) for stage in stages(waiting))
        print(
            f"{len(waiting)} steps, about {seconds:.0f} s; {max(self.left, 0):.0f} s are there",
            flush=True,
        )
        for stage in stages(waiting):
            self._stage(stage)

    def _stage(self, stage: List[Step]) -> None:
        """Run steps at the same time, as many as there are cores."""
        waiting, at_work = list(stage), []
        threads = str(max(1, self._cores // len(stage)))
        environment = {"OMP_NUM_THREADS": threads, **self._environment}
        with tempfile.TemporaryDirectory(prefix="benchmarks-gpu-") as name:
            try:
                while waiting or at_work:
                    while waiting and len(at_work) < self._cores:
                        running = self._begin(waiting.pop(0), Path(name), environment)
                        if running is not None:
                            at_work.append(running)
                    time.sleep(POLL_SECONDS if at_work else 0)
                    at_work = [each for each in at_work if not self._look_after(each)]
            except BaseException:
                for each in at_work:
                    each.process.stop()
                for each in at_work:
                    each.process.wait()
                    if not self.results.ended(each.step.name):
                        self._end(each, kept.STOPPED)
                raise

    def _begin(
        self, step: Step, folder: Path, environment: Mapping[str, str]
    ) -> Optional[_Running]:
        # A study that is begun with half of its least time would train nothing.
        share = 1.0 if step.until_the_end else WORTH_BEGINNING
        if self.left < share * step.seconds:
            reason = f"it takes about {step.seconds:.0f} s, {max(self.left, 0):.0f} s are left"
            if not self.results.result(step.name):
                self.results.keep(step.name, status=kept.LEFT_OUT, error=reason)
            print(f"{step.name}: left out, {reason}", flush=True)
            return None
        of_step = folder / step.name.replace(" ", "-")
        of_step.mkdir()
        self.results.restart(step.name)
        seconds = max(MOST_OF_ESTIMATE * step.seconds, LEAST_SECONDS)
        if step.until_the_end:
            seconds = self.left
        return _Running(step, of_step, time.monotonic() + min(seconds, self.left), environment)

    def _look_after(self, running: _Running) -> bool:
        """Keep what is new; whether the step has ended."""
        status = running.process.ended()
        news = running.news()
        if news is not None:
            self.results.keep(running.step.name, result=news)
        if status is None and time.monotonic() < running.deadline:
            return False
        if status is None:
            running.process.stop()
            running.process.wait()
            self._end(running, kept.LATE)
        else:
            self._end(running, kept.FAILED if status else kept.DONE)
        return True

    def _end(self, running: _Running, status: str) -> None:
        """Keep how a step ended, and say so in one line."""
        name = running.step.name
        news = running.news()
        values: Dict[str, object] = {} if news is None else {"result": news}
        if status == kept.DONE and (news or self.results.result(name)).get("unfinished"):
            status = kept.LATE
        text = running.log_text()
        if status == kept.FAILED:
            values["error"] = text[-SHOWN_OF_LOG:]
        self.results.keep(name, status=status, seconds=round(running.seconds, 1), **values)
        with (self.results.folder / kept.LOG).open("a", encoding="utf-8") as log:
            log.write(f"== {name}: {status}, {running.seconds:.1f} s\n{text}\n")
        line = f"{name}: {status} in {running.seconds:.0f} s"
        found = self._headline(name, self.results.result(name))
        if status == kept.FAILED and text.strip():
            found = text.strip().splitlines()[-1]
        print(f"{line}{f'; {found}' if found else ''}", flush=True)
