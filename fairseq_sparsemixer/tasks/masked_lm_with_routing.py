"""fairseq's pre-training on masked words, with a point of measurements at every validation."""

from dataclasses import dataclass

from fairseq.tasks import register_task
from fairseq.tasks.masked_lm import MaskedLMConfig, MaskedLMTask

from fairseq_sparsemixer.tasks.measured import MeasuredTask, PointsConfig


@dataclass
class MaskedLMWithRoutingConfig(PointsConfig, MaskedLMConfig):
    """Settings of :class:`MaskedLMWithRoutingTask`."""


@register_task("masked_lm_with_routing", dataclass=MaskedLMWithRoutingConfig)
class MaskedLMWithRoutingTask(MeasuredTask, MaskedLMTask):
    """Points hold the ``discriminator_loss``, in bits a token, where the model is ELECTRA.

    Without ``points_file``, it is fairseq's task ``masked_lm``.
    """

    metrics = ("discriminator_loss",)
