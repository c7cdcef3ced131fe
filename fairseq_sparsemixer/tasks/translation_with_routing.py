"""fairseq's translation task, with a point of measurements at every validation."""

import functools
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional

import numpy as np
import torch
from fairseq import utils
from fairseq.distributed import utils as distributed_utils
from fairseq.distributed.fully_sharded_data_parallel import FullyShardedDataParallel
from fairseq.tasks import register_task
from fairseq.tasks.translation import TranslationConfig, TranslationTask
from omegaconf import II

from fairseq_sparsemixer.expert_parallelism import parallel_of
from fairseq_sparsemixer.files import read_lines
from fairseq_sparsemixer.models.config import ConfigError
from fairseq_sparsemixer.models.layers import switch_layers
from fairseq_sparsemixer.models.search import best_hypotheses
from fairseq_sparsemixer.runs import points
from fairseq_sparsemixer.tasks import measuring
from fairseq_sparsemixer.text import bleu, subwords

TOKENS_AT_ONCE = 4096
"""In one batch of beam search."""
MAX_OUTPUT = 100
"""Tokens of a translation: a model that has learnt little may not find an end."""


@dataclass
class TranslationWithRoutingConfig(TranslationConfig):
    """Settings of :class:`TranslationWithRoutingTask`."""

    points_file: Optional[str] = field(
        default=None,
        metadata={"help": "JSON lines that every validation adds to (default: none)"},
    )
    points_text: Optional[str] = field(
        default=None,
        metadata={
            "help": "folder of the raw text of the validation set, to score translations against "
            "(VALID.LANG), and of its domains (VALID.domain, one a line) if there are any"
        },
    )
    points_sentences: int = field(
        default=200,
        metadata={"help": "sentences to translate at a point, spread over domains; 0 for none"},
    )
    points_beam: int = field(default=1, metadata={"help": "beam of these translations"})
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


@register_task("translation_with_routing", dataclass=TranslationWithRoutingConfig)
class TranslationWithRoutingTask(TranslationTask):
    """Translation; with ``points_file``, each validation adds a point (:mod:`.runs.points`).

    Without it, it is fairseq's task ``translation``. The numbers also go to fairseq's log and, with
    ``--tensorboard-logdir``, to TensorBoard, which besides shows the experts' load as an image. Of
    several validation sets the first is measured.
    """

    cfg: TranslationWithRoutingConfig

    def __init__(self, cfg: TranslationWithRoutingConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(cfg, *args, **kwargs)
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
                self._check_text()
                self._check_translation(model)
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
    def _path(self) -> Optional[Path]:
        return Path(self.cfg.points_file) if self.cfg.points_file else None

    @property
    def _clocks_path(self) -> Path:
        assert self._path is not None
        return self._path.with_suffix(".clock.json")

    # Validation

    def valid_step(self, sample: Dict[str, Any], model: Any, criterion: Any) -> Any:
        """See fairseq."""
        if self._path is None:
            return super().valid_step(sample, model, criterion)
        with torch.no_grad(), measuring.observe(model, sample, self.tgt_dict.pad()) as sentences:
            result = super().valid_step(sample, model, criterion)
        self._sentences.update(sentences)
        return result

    @functools.cached_property
    def _tokeniser(self) -> str:
        """Of BLEU; to find it out is to make one, which takes some languages a dictionary."""
        return bleu.find_tokeniser(self.cfg.target_lang)

    def _inference_with_bleu(self, generator: Any, sample: Dict[str, Any], model: Any) -> Any:
        """See fairseq, whose ``--eval-bleu`` cuts every language like English."""
        import sacrebleu

        original = sacrebleu.corpus_bleu
        # fairseq takes it from the module at each call; of tokenised BLEU it names the tokeniser.
        sacrebleu.corpus_bleu = functools.partial(original, tokenize=self._tokeniser)
        try:
            return super()._inference_with_bleu(generator, sample, model)
        finally:
            sacrebleu.corpus_bleu = original

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
        if point is None or point["nll_loss"] != points.number(_nll_loss(stats)):
            point = self._measure(model, stats, sentences)
            points.save_choices(self._path, updates, measuring.flat_choices(sentences))
            points.add_point(self._path, point)
            points.forget_choices(self._path, updates)
        elif self._watch is not None:
            # Trained again: time goes on from when it was measured.
            self._watch.set(points.Clock(*(point[key] for key in points.Clock._fields)))
        # What all workers have measured stays: checkpoints and patience go by it.
        stats.update({**measuring.scalars(point), **stats})
        if self.cfg.tensorboard_logdir:
            _show_load(self.cfg.tensorboard_logdir, point)

    def _measure(
        self, model: Any, stats: Mapping[str, Any], sentences: measuring.Sentences
    ) -> Dict[str, Any]:
        domains = self._domains()
        num_experts = {
            name: layer.moe.router.num_experts for name, layer in switch_layers(model).items()
        }
        clock = points.Clock() if self._watch is None else self._watch.stop()
        assert self._path is not None
        updates = int(stats["num_updates"])
        before = points.load_choices(self._path, updates)
        nll_loss = points.number(_nll_loss(stats))
        point: Dict[str, Any] = {
            "updates": updates,
            "seconds": _rounded(clock.seconds),
            "cpu_seconds": _rounded(clock.cpu_seconds),
            "words": None if clock.words is None else round(clock.words),
            "words_per_second": _rounded(
                clock.words / clock.seconds if clock.words is not None and clock.seconds else None
            ),
            "loss": points.number(stats["loss"]),
            "nll_loss": nll_loss,
            "layers": measuring.layer_figures(sentences, domains, num_experts, stats, before),
        }
        by_domain = {} if domains is None else measuring.domain_losses(sentences, domains)
        if self.cfg.points_text and self.cfg.points_sentences > 0 and nll_loss is not None:
            references = self._text(self.cfg.target_lang)
            lines = measuring.choose_lines(self.cfg.points_sentences, sentences, domains)
            translations = self._translate(model, lines)
            figures = measuring.translation_figures(
                translations, references, domains, self._tokeniser
            )
            for domain, scores in figures.pop("by_domain", {}).items():
                by_domain[domain].update(scores)
            point.update(figures)
        if by_domain:
            point["by_domain"] = by_domain
        return point

    def _check_text(self) -> None:
        """Before training, rather than at the first point."""
        if self.cfg.points_text:
            self._domains()
            if self.cfg.points_sentences > 0:
                self._text(self.cfg.target_lang)
                self._subwords()
                _ = self._tokeniser  # found out before anything is trained

    def _check_translation(self, model: torch.nn.Module) -> None:
        """Refuse what would wait for ever: only the first worker translates."""
        translates = self.cfg.points_text and self.cfg.points_sentences > 0
        several = distributed_utils.get_data_parallel_world_size() > 1
        if not (translates and several):
            return
        if parallel_of(model) is not None:
            what = "--expert-parallel-size"
        elif _is_sharded(model):
            what = "--ddp-backend fully_sharded"
        else:
            return
        raise ConfigError(
            f"--points-sentences must be 0 with {what}: the worker that translates would wait for "
            "the parameters of the others"
        )

    def _domains(self) -> Optional[List[str]]:
        if not self.cfg.points_text:
            return None
        path = Path(self.cfg.points_text, f"{self._subset}.domain")
        return self._text("domain") if path.is_file() else None

    @property
    def _subset(self) -> str:
        return self.cfg.valid_subset.split(",")[0]

    def _text(self, ending: Optional[str]) -> List[str]:
        """A file of ``points_text`` that has a line for each pair of the validation set."""
        assert self.cfg.points_text is not None
        path = Path(self.cfg.points_text, f"{self._subset}.{ending}")
        if not path.is_file():
            raise ConfigError(
                f"there is no {path}: give --points-text the folder of the raw text of the "
                "validation set"
            )
        lines = read_lines(path)
        pairs = len(self.dataset(self._subset))
        if len(lines) != pairs:
            raise ConfigError(
                f"{path} has {len(lines)} lines and the validation set {pairs} pairs: give "
                "--points-text the folder of the text that it was made from"
            )
        return lines

    def _translate(self, model: Any, lines: List[int]) -> Dict[int, str]:
        """Translations by line, in order. The model is left in evaluation mode, as it was."""
        dataset = self.dataset(self._subset)
        cutting = self._subwords()
        encoder = cutting.encoder()
        batches = dataset.batch_by_size(
            np.array(sorted(lines, key=dataset.num_tokens), dtype=np.int64),
            max_tokens=max([TOKENS_AT_ONCE, *map(dataset.num_tokens, lines)]),
        )
        samples = (dataset.collater([dataset[int(line)] for line in batch]) for batch in batches)
        found = best_hypotheses(
            self, [model], samples, max_output=MAX_OUTPUT, beam=self.cfg.points_beam
        )
        translations = {}
        for line, hypothesis in found:
            pieces = self.tgt_dict.string(hypothesis["text_tokens"].int().cpu())
            text, _ = cutting.decode(encoder.decode(pieces), self.cfg.target_lang)
            translations[line] = text
        return dict(sorted(translations.items()))

    def _subwords(self) -> "subwords.Subwords":
        return subwords.find_subwords([Path(utils.split_paths(self.cfg.data)[0])])


def _is_sharded(model: torch.nn.Module) -> bool:
    return any(isinstance(module, FullyShardedDataParallel) for module in model.modules())


def _nll_loss(stats: Mapping[str, Any]) -> float:
    """Cross-entropy without label smoothing has one loss."""
    return float(stats.get("nll_loss", stats["loss"]))


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
