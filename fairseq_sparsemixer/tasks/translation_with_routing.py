"""fairseq's translation task, with a point of measurements at every validation."""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Optional

from fairseq.tasks import register_task
from fairseq.tasks.translation import TranslationConfig, TranslationTask

from fairseq_sparsemixer.tasks.translated import (
    Part,
    TranslatedTask,
    TranslationPointsConfig,
    find_tokeniser,
)


@dataclass
class TranslationWithRoutingConfig(TranslationPointsConfig, TranslationConfig):
    """Settings of :class:`TranslationWithRoutingTask`."""


@register_task("translation_with_routing", dataclass=TranslationWithRoutingConfig)
class TranslationWithRoutingTask(TranslatedTask, TranslationTask):
    """Without ``points_file``, it is fairseq's task ``translation``."""

    cfg: TranslationWithRoutingConfig

    def _inference_with_bleu(self, generator: Any, sample: Dict[str, Any], model: Any) -> Any:
        """See fairseq, whose ``--eval-bleu`` cuts every language like English."""
        import sacrebleu

        original = sacrebleu.corpus_bleu
        tokeniser = find_tokeniser(self.cfg.target_lang)
        # fairseq takes it from the module at each call; of tokenised BLEU it names the tokeniser.
        sacrebleu.corpus_bleu = functools.partial(original, tokenize=tokeniser)
        try:
            return super()._inference_with_bleu(generator, sample, model)
        finally:
            sacrebleu.corpus_bleu = original

    def parts(self) -> List[Part]:
        """See :class:`TranslatedTask`: one."""
        source, target = self.cfg.source_lang, self.cfg.target_lang
        return [Part(source, target, target, range(len(self.dataset(self.subset))))]

    def groups(self) -> Optional[List[str]]:
        """See :class:`MeasuredTask`."""
        if not self.cfg.points_text:
            return None
        if not Path(self.cfg.points_text, f"{self.subset}.domain").is_file():
            return None
        return self.text("domain", len(self.dataset(self.subset)))
