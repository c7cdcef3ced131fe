"""A task whose validations add points: training is timed, and the experts are watched."""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence

import torch
from fairseq.dataclass import FairseqDataclass
from fairseq.tasks import FairseqTask
from omegaconf import II

from fairseq_sparsemixer.models.layers import switch_layers
from fairseq_sparsemixer.runs import points
from fairseq_sparsemixer.runs.logs import nll_of
from fairseq_sparsemixer.tasks import measuring


@dataclass
class PointsConfig(FairseqDataclass):
    """Settings of :class:`MeasuredTask`."""

    points_file: Optional[str] = field(
        default=None,
        metadata={"help": "JSON lines that every validation adds to (default: none)"},
    )
    valid_subset: str = II("dataset.valid_subset")
    tensorboard_logdir: Optional[str] = II("common.tensorboard_logdir")


class _Stopwatch:
    """Seconds, CPU seconds and target words of training, from those of a session before."""

    def __init__(self, before: points.Clock) -> None:
        self._total = before
        self.running = False

    def set(self, total: points.Clock) -> None:
        """Go on from there."""
        self._total = total

    def start(self) -> None:
        """Start, if it does not run."""
        if not self.running:
            self._since = time.perf_counter(), time.process_time()
            self.running = True

    def count(self, words: float) -> None:
        """Add words that were trained on."""
        self._total = self._total._replace(words=_sum(self._total.words, words))

    def stop(self) -> points.Clock:
        """Stop, if it runs; all that was trained so far."""
        if self.running:
            wall, cpu = self._since
            self._total = self._total._replace(
                seconds=_sum(self._total.seconds, time.perf_counter() - wall),
                cpu_seconds=_sum(self._total.cpu_seconds, time.process_time() - cpu),
            )
            self.running = False
        return self._total


def _sum(known: Optional[float], more: float) -> Optional[float]:
    return None if known is None else known + more


def _rounded(value: Optional[float]) -> Optional[float]:
    return None if value is None else round(value, 3)


class MeasuredTask(FairseqTask):
    """The base, beside one of fairseq's tasks, that adds a point (:mod:`.runs.points`) at each
    validation, if ``points_file`` is given.

    The numbers also go to fairseq's log and, with ``--tensorboard-logdir``, to TensorBoard, which
    besides shows the experts' load as an image. Of several validation sets the first is measured.
    """

    cfg: Any
    args: Any = None
    metrics: Sequence[str] = ()
    """What is taken from fairseq's statistics of a validation, besides the losses."""
    losses_by_sentence = False
    """Whether :meth:`further_figures` needs them."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._watch: Optional[_Stopwatch] = None
        self._updates = 0
        self._measured = -1
        self._sentences: measuring.Sentences = {}

    # Training, which is timed

    def train_step(
        self,
        sample: Dict[str, Any],
        model: Any,
        criterion: Any,
        optimizer: Any,
        update_num: int,
        ignore_grad: bool = False,
    ) -> Any:
        """See fairseq."""
        if self._path is not None:
            if self._watch is None:
                self.check_measuring(model)
                known = {0: points.Clock(0.0, 0.0, 0.0), **points.read_clocks(self._clocks_path)}
                self._watch = _Stopwatch(known.get(update_num, points.Clock()))
            self._watch.start()
            self._updates = update_num + 1
        return super().train_step(sample, model, criterion, optimizer, update_num, ignore_grad)

    def reduce_metrics(self, logging_outputs: List[Dict[str, Any]], criterion: Any) -> None:
        """See fairseq, which calls this with what all workers logged."""
        super().reduce_metrics(logging_outputs, criterion)
        if self._watch is not None and self._watch.running:  # not of validation
            self._watch.count(sum(float(output.get("ntokens", 0)) for output in logging_outputs))

    def state_dict(self) -> Dict[str, Any]:
        """See fairseq, which calls this for each checkpoint."""
        if self._watch is not None and measuring.is_first_worker():
            points.add_clock(self._clocks_path, self._updates, self._watch.stop())
        return super().state_dict()

    def begin_valid_epoch(self, epoch: int, model: Any) -> None:
        """See fairseq."""
        super().begin_valid_epoch(epoch, model)
        if self._watch is not None:
            self._watch.stop()
        self._sentences = {}

    @property
    def settings(self) -> Any:
        """Of the task, which fairseq's older ones keep elsewhere."""
        return self.args if self.cfg is None else self.cfg

    @property
    def subset(self) -> str:
        """The validation set that is measured."""
        return self.settings.valid_subset.split(",")[0]

    @property
    def _path(self) -> Optional[Path]:
        return Path(self.settings.points_file) if self.settings.points_file else None

    @property
    def _clocks_path(self) -> Path:
        assert self._path is not None
        return self._path.with_suffix(".clock.json")

    # Validation

    def valid_step(self, sample: Dict[str, Any], model: Any, criterion: Any) -> Any:
        """See fairseq."""
        if self._path is None:
            return super().valid_step(sample, model, criterion)
        pad = self.source_dictionary.pad()
        observed = measuring.observe(model, sample, pad, self.losses_by_sentence)
        with torch.no_grad(), observed as sentences:
            result = super().valid_step(sample, model, criterion)
        self._sentences.update(sentences)
        return result

    def post_validate(self, model: Any, stats: Dict[str, Any], agg: Any) -> None:
        """Called by fairseq after each validation set, with its statistics, which it then logs."""
        updates = int(stats["num_updates"])
        if self._path is None or updates == self._measured:
            return
        self._measured = updates
        sentences = measuring.all_workers(self._sentences)
        if not measuring.is_first_worker():
            return
        known = {point["updates"]: point for point in points.read_points(self._path)}
        point = known.get(updates)
        # One of another loss was measured in another training.
        if point is None or point["nll_loss"] != points.number(nll_of(stats)):
            point = self._measure(model, stats, sentences)
            points.save_choices(self._path, updates, measuring.flat_choices(sentences))
            points.add_point(self._path, point)
            points.forget_choices(self._path, updates)
        elif self._watch is not None:
            # Trained again: time goes on from when it was measured.
            self._watch.set(points.Clock(*(point[key] for key in points.Clock._fields)))
        # What all workers have measured stays: checkpoints and patience go by it.
        stats.update({**measuring.scalars(point), **stats})
        if self.settings.tensorboard_logdir:
            _show_load(self.settings.tensorboard_logdir, point)

    def _measure(
        self, model: Any, stats: Mapping[str, Any], sentences: measuring.Sentences
    ) -> Dict[str, Any]:
        num_experts = {
            name: layer.moe.router.num_experts for name, layer in switch_layers(model).items()
        }
        clock = points.Clock() if self._watch is None else self._watch.stop()
        assert self._path is not None
        updates = int(stats["num_updates"])
        before = points.load_choices(self._path, updates)
        point: Dict[str, Any] = {
            "updates": updates,
            "seconds": _rounded(clock.seconds),
            "cpu_seconds": _rounded(clock.cpu_seconds),
            "words": None if clock.words is None else round(clock.words),
            "words_per_second": _rounded(
                clock.words / clock.seconds if clock.words is not None and clock.seconds else None
            ),
            "loss": points.number(stats["loss"]),
            "nll_loss": points.number(nll_of(stats)),
            "layers": measuring.layer_figures(sentences, self.groups(), num_experts, stats, before),
        }
        figures = self.figures(self.subset, stats)
        point.update({key: points.number(value) for key, value in figures.items()})
        return {**point, **self.further_figures(model, point, sentences)}

    # What tasks differ in

    def check_measuring(self, model: torch.nn.Module) -> None:
        """Refuse, before training, what could not be measured."""

    def groups(self) -> Optional[List[str]]:
        """For each sentence of the validation set its domain; None where there are none."""
        return None

    def figures(self, subset: str, stats: Mapping[str, Any]) -> Dict[str, float]:
        """What the task measures besides losses (:data:`.runs.points.METRICS`).

        Args:
            subset: that was validated.
            stats: fairseq's, of that.
        """
        return {key: stats[key] for key in self.metrics if key in stats}

    def further_figures(
        self, model: Any, point: Mapping[str, Any], sentences: measuring.Sentences
    ) -> Dict[str, Any]:
        """What a point holds besides losses, layers and :meth:`figures`.

        Args:
            model: in evaluation mode.
            point: so far.
            sentences: of the validation set.
        """
        return {}


def _show_load(folder: str, point: Mapping[str, Any]) -> None:
    """Each layer's load as an image for TensorBoard, where its packages are installed."""
    try:
        from matplotlib.figure import Figure
        from tensorboardX import SummaryWriter
    except ImportError:
        return  # fairseq's own log tells that they are missing
    loads = [figures["load"] for figures in point["layers"].values()]
    if not loads:
        return
    figure = Figure(figsize=(1 + 0.6 * max(map(len, loads)), 1 + 0.5 * len(loads)))
    axes = figure.add_subplot()
    image = axes.imshow(loads, cmap="cividis", vmin=0, aspect="auto")
    axes.set_yticks(range(len(loads)), list(point["layers"]))
    axes.set(xlabel="expert", title=f"share of the choices, update {point['updates']}")
    figure.colorbar(image)
    # Files are named by the second: without a suffix it may be that of fairseq's own writer.
    suffix = f".load{point['updates']}"
    with SummaryWriter(str(Path(folder, "valid")), filename_suffix=suffix) as writer:
        writer.add_figure("expert_load", figure, point["updates"])
