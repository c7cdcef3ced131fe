"""fairseq's language models, with a point of measurements at every validation."""

from dataclasses import dataclass
from typing import Any, Dict, Mapping

import numpy as np
from fairseq.tasks import register_task
from fairseq.tasks.language_modeling import LanguageModelingConfig, LanguageModelingTask

from fairseq_sparsemixer.bits_per_byte import byte_counts
from fairseq_sparsemixer.runs.logs import nll_of
from fairseq_sparsemixer.tasks.measured import MeasuredTask, PointsConfig


@dataclass
class LanguageModelingWithRoutingConfig(PointsConfig, LanguageModelingConfig):
    """Settings of :class:`LanguageModelingWithRoutingTask`."""


@register_task("language_modeling_with_routing", dataclass=LanguageModelingWithRoutingConfig)
class LanguageModelingWithRoutingTask(MeasuredTask, LanguageModelingTask):
    """Points hold the perplexity ``ppl`` of a token and ``bits_per_byte``, which does not depend
    on how text is cut into tokens. Both are of blocks of ``tokens_per_sample``, whose first tokens
    have little before them: ``fairseq-eval-lm --context-window`` finds less.

    Without ``points_file``, it is fairseq's task ``language_modeling``.
    """

    metrics = ("ppl",)

    def figures(self, subset: str, stats: Mapping[str, Any]) -> Dict[str, float]:
        """See :class:`MeasuredTask`."""
        counts = np.array(byte_counts(self.dictionary.symbols, self.dictionary.nspecial))
        dataset = self.dataset(subset)
        tokens = size = 0
        for block in map(dataset.__getitem__, range(len(dataset))):
            tokens += len(block["target"])
            size += int(counts[block["target"].numpy()].sum())
        bits = nll_of(stats) * tokens
        return {**super().figures(subset, stats), "bits_per_byte": bits / size}
