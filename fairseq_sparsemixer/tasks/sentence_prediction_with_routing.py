"""fairseq's classes of sentences, with a point of measurements at every validation."""

from dataclasses import dataclass

from fairseq.tasks import register_task
from fairseq.tasks.sentence_prediction import SentencePredictionConfig, SentencePredictionTask

from fairseq_sparsemixer.tasks.measured import MeasuredTask, PointsConfig


@dataclass
class SentencePredictionWithRoutingConfig(PointsConfig, SentencePredictionConfig):
    """Settings of :class:`SentencePredictionWithRoutingTask`."""


@register_task("sentence_prediction_with_routing", dataclass=SentencePredictionWithRoutingConfig)
class SentencePredictionWithRoutingTask(MeasuredTask, SentencePredictionTask):
    """Points hold the ``accuracy``, in percent, and what else the criterion is asked to report.

    Without ``points_file``, it is fairseq's task ``sentence_prediction``.
    """

    metrics = ("accuracy", "acc_and_f1", "mcc", "pearson_and_spearman")
