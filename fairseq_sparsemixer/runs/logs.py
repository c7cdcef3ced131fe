"""What fairseq's log of a run says: statistics, validations, and the time that training took.

A run that was stopped and started again appends to its log, and trains again what came after its
last checkpoint. Here a log reads as if the run had never been stopped: what was trained twice
counts once, as it was trained last, and neither the pause nor the start of a session counts as
training time.
"""

import contextlib
import json
import math
import re
import statistics
from datetime import datetime
from pathlib import Path
from typing import Dict, List, Mapping, NamedTuple, Optional, Tuple

from fairseq_sparsemixer.errors import UserError

LINE = re.compile(
    r"\[(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3})\]\[(?P<logger>[^\]]*)\]"
    r"\[(?:INFO|WARNING)\] - (?P<text>.*)"
)
"""A log line as hydra writes it: time, logger and text."""
LOADED = re.compile(r"Loaded checkpoint .* \(epoch \d+ @ (\d+) updates\)")
SAVED = re.compile(r"(?:Preparing to save|Saved) checkpoint .*\bepoch \d+ @ (\d+) updates")
PARAMETERS = re.compile(r"num\. (?:shared|expert) model params: ([\d,]+)")

WARNING = re.compile(r"update (\d+): (.*)")
"""What :mod:`fairseq_sparsemixer.watchdogs` logs."""


class Warned(NamedTuple):
    """A warning of the watchdogs: after how many updates, and the text without them."""

    updates: int
    text: str


class Validation(NamedTuple):
    """One validation.

    Attributes:
        updates: after how many updates of the parameters.
        loss: what the criterion reports, bits per token of the target.
        nll_loss: negative log-likelihood, bits per token of the target.
        seconds: of training until its end (see :func:`read_log`); None where the log does not tell.
        stats: all that was logged, without the prefix ``valid_``.
    """

    updates: int
    loss: float
    nll_loss: float
    seconds: Optional[float]
    stats: Dict[str, float]


class TrainingPoint(NamedTuple):
    """What was logged of a stretch of training (``common.log_interval`` updates).

    Attributes:
        updates: at its end.
        nll_loss: negative log-likelihood, bits per token of the target; mean over the stretch.
        seconds: of training until its end, as those of a :class:`Validation`.
        words_per_second: of the target.
    """

    updates: int
    nll_loss: Optional[float]
    seconds: Optional[float]
    words_per_second: float


class TrainingLog(NamedTuple):
    """What :func:`read_log` finds.

    Attributes:
        training, validations: by ascending updates, each number of updates once.
        words_per_second: median over the lines of training (target tokens); None without a line.
        parameters: of the whole model; None if not logged.
        ended: whether training came to its own end (its last update or epoch, early stopping)
            and was not stopped, be it by its time limit.
        warnings: of the watchdogs, in order.
    """

    training: List[TrainingPoint]
    validations: List[Validation]
    words_per_second: Optional[float]
    parameters: Optional[int]
    ended: bool
    warnings: List[Warned]


def line_stats(
    line: str, kind: str, updates: str = "num_updates", *needed: str
) -> Optional[Dict[str, float]]:
    """The numbers of one of fairseq's JSON log lines ("train_inner", "valid"), else None.

    Args:
        line: of the log.
        kind: of the line: its logger.
        updates: the key of the updates, which must be there.
        needed: other keys that must be there.
    """
    match = LINE.search(line)
    if not match or match["logger"] != kind:
        return None
    return _numbers(match["text"], updates, *needed)


def _numbers(text: str, updates: str, *needed: str) -> Optional[Dict[str, float]]:
    try:
        # fairseq writes null for what it has no value of, such as a layer left out by LayerDrop,
        # and an empty list for predictions (--report-mcc).
        known = {key: value for key, value in json.loads(text).items() if value not in (None, [])}
        stats = {key: float(value) for key, value in known.items()}
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError):
        return None  # cut off when the process was killed, or of another program
    if not math.isfinite(stats.get(updates, math.nan)) or any(key not in stats for key in needed):
        return None
    return stats


def nll_of(stats: Mapping[str, float]) -> float:
    """The negative log-likelihood: cross-entropy without label smoothing has one loss."""
    return float(stats.get("nll_loss", stats["loss"]))


def by_layer(stats: Dict[str, float], metric: str) -> Dict[str, float]:
    """One metric of the routing by layer: ``{"encoder.0": 0.25, ...}``."""
    prefix = f"{metric}/"
    return {k[len(prefix) :]: value for k, value in stats.items() if k.startswith(prefix)}


def read_log(path: Path, subset: str = "valid") -> TrainingLog:
    """Read ``hydra_train.log``, or the output of ``fairseq-hydra-train`` with ``log_format=json``.

    Seconds of training run from the first "begin training epoch" of a session, by the times of
    the log lines; validation and saving are part of them. A session that starts from a checkpoint
    goes on from the time at which that checkpoint was written. Where the log does not hold all of
    the training before it (as when the first session starts from a copied checkpoint), no time is
    told.

    Args:
        path: the log.
        subset: the validation set, as in ``dataset.valid_subset``.

    Raises:
        UserError: the file cannot be read.
    """
    reader = _LogReader(subset)
    try:
        with path.open(encoding="utf-8", errors="replace") as log:
            for line in log:
                match = LINE.search(line)
                if match:
                    with contextlib.suppress(ValueError):  # a date or number that there is not
                        time = datetime.strptime(match[1], "%Y-%m-%d %H:%M:%S,%f")
                        reader.read(time, match["logger"], match["text"])
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    return TrainingLog(
        training=reader.training,
        validations=reader.validations,
        words_per_second=statistics.median(point.words_per_second for point in reader.training)
        if reader.training
        else None,
        parameters=sum(reader.parameters) if reader.parameters else None,
        ended=reader.ended,
        warnings=reader.warnings,
    )


class _LogReader:
    """The state of training after the lines that were read."""

    def __init__(self, subset: str) -> None:
        self.subset = subset
        self.validations: List[Validation] = []
        self.training: List[TrainingPoint] = []
        self.marks: List[Tuple[int, Optional[float]]] = []
        """Updates, and the seconds of training at which the log tells them."""
        self.parameters: List[int] = []
        self.warnings: List[Warned] = []
        self.ended = False
        self._begin_session()

    def _begin_session(self) -> None:
        self.ended = self.out_of_time = False
        self.restart = 0
        self.began: Optional[datetime] = None
        self.before: Optional[float] = None

    def read(self, time: datetime, logger: str, text: str) -> None:
        """Take in one line."""
        if logger == "train_inner":
            stats = _numbers(text, "num_updates", "wps")
            if stats:
                updates, seconds = int(stats["num_updates"]), self._seconds(time)
                self.marks.append((updates, seconds))
                nll_loss = stats.get("nll_loss", stats.get("loss"))
                self.training.append(TrainingPoint(updates, nll_loss, seconds, stats["wps"]))
        elif logger == self.subset:
            prefix = f"{self.subset}_"
            stats = _numbers(text, f"{prefix}num_updates", f"{prefix}loss")
            if stats:
                self._validate(stats, self._seconds(time))
        elif logger == "fairseq.trainer":
            loaded = LOADED.match(text)
            if text.startswith("Preparing to load checkpoint"):
                self._begin_session()
            elif loaded:
                self.restart = int(loaded[1])
            elif text.startswith("begin training epoch") and self.began is None:
                # Not before: a session that fails while it starts takes nothing back.
                self._rewind(self.restart)
                self.began = time
        elif logger == "fairseq.checkpoint_utils":
            saved = SAVED.match(text)
            if saved:
                self.marks.append((int(saved[1]), self._seconds(time)))
        elif logger == "fairseq_sparsemixer.watchdogs":
            warned = WARNING.match(text)
            if warned:
                self.warnings.append(Warned(int(warned[1]), warned[2]))
        elif logger == "fairseq_sparsemixer.restarts":
            # A start after the time was over, which trains nothing.
            self.out_of_time |= "(--stop-time-hours)" in text
        elif logger == "fairseq_cli.train":
            if text.startswith("Stopping training due to cumulative_training_time"):
                self.out_of_time = True
            elif text.startswith("done training in"):
                self.ended = not self.out_of_time
            elif text.startswith("num. shared model params"):
                self.parameters = [_count(text)]
            elif text.startswith("num. expert model params"):
                self.parameters.append(_count(text))

    def _validate(self, stats: Dict[str, float], seconds: Optional[float]) -> None:
        prefix = f"{self.subset}_"
        stats = {key[len(prefix) :]: stats[key] for key in stats if key.startswith(prefix)}
        updates = int(stats["num_updates"])
        self.marks.append((updates, seconds))
        self.validations.append(Validation(updates, stats["loss"], nll_of(stats), seconds, stats))

    def _seconds(self, time: datetime) -> Optional[float]:
        if self.began is None or self.before is None:
            return None
        return self.before + (time - self.began).total_seconds()

    def _rewind(self, updates: int) -> None:
        """Forget what came after ``updates``: it is trained again."""
        self.validations = [v for v in self.validations if v.updates <= updates]
        self.training = [point for point in self.training if point.updates <= updates]
        self.warnings = [warned for warned in self.warnings if warned.updates <= updates]
        self.marks = [mark for mark in self.marks if mark[0] <= updates]
        reached, seconds = self.marks[-1] if self.marks else (0, 0.0)
        # Less, where the training before the checkpoint is not, or not all, in this log.
        self.before = seconds if reached == updates else None


def _count(text: str) -> int:
    match = PARAMETERS.match(text)
    return int(match[1].replace(",", "")) if match else 0
