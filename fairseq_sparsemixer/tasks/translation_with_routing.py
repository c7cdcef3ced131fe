"""fairseq's translation task, with a point of measurements at every validation."""

import functools
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

from fairseq_sparsemixer.expert_parallelism import parallel_of
from fairseq_sparsemixer.files import read_lines
from fairseq_sparsemixer.models.config import ConfigError
from fairseq_sparsemixer.models.search import best_hypotheses
from fairseq_sparsemixer.tasks import measuring
from fairseq_sparsemixer.tasks.measured import MeasuredTask, PointsConfig
from fairseq_sparsemixer.text import bleu, subwords

TOKENS_AT_ONCE = 4096
"""In one batch of beam search."""
MAX_OUTPUT = 100
"""Tokens of a translation: a model that has learnt little may not find an end."""


@dataclass
class TranslationWithRoutingConfig(PointsConfig, TranslationConfig):
    """Settings of :class:`TranslationWithRoutingTask`."""

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


@register_task("translation_with_routing", dataclass=TranslationWithRoutingConfig)
class TranslationWithRoutingTask(MeasuredTask, TranslationTask):
    """Translation, whose points hold BLEU and chrF, too, where ``points_text`` is given.

    Without ``points_file``, it is fairseq's task ``translation``.
    """

    cfg: TranslationWithRoutingConfig
    losses_by_sentence = True

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

    def check_measuring(self, model: torch.nn.Module) -> None:
        """See :class:`MeasuredTask`."""
        if self.cfg.points_text:
            self.groups()
            if self.cfg.points_sentences > 0:
                self._text(self.cfg.target_lang)
                self._subwords()
                _ = self._tokeniser  # found out before anything is trained
        self._check_translation(model)

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

    def groups(self) -> Optional[List[str]]:
        """See :class:`MeasuredTask`."""
        if not self.cfg.points_text:
            return None
        path = Path(self.cfg.points_text, f"{self.subset}.domain")
        return self._text("domain") if path.is_file() else None

    def further_figures(
        self, model: Any, point: Mapping[str, Any], sentences: measuring.Sentences
    ) -> Dict[str, Any]:
        """See :class:`MeasuredTask`."""
        domains, figures = self.groups(), {}
        by_domain = {} if domains is None else measuring.domain_losses(sentences, domains)
        if self.cfg.points_text and self.cfg.points_sentences > 0 and point["nll_loss"] is not None:
            references = self._text(self.cfg.target_lang)
            lines = measuring.choose_lines(self.cfg.points_sentences, sentences, domains)
            translations = self._translate(model, lines)
            figures = measuring.translation_figures(
                translations, references, domains, self._tokeniser
            )
            for domain, scores in figures.pop("by_domain", {}).items():
                by_domain[domain].update(scores)
        return {**figures, "by_domain": by_domain} if by_domain else figures

    def _text(self, ending: Optional[str]) -> List[str]:
        """A file of ``points_text`` that has a line for each pair of the validation set."""
        assert self.cfg.points_text is not None
        path = Path(self.cfg.points_text, f"{self.subset}.{ending}")
        if not path.is_file():
            raise ConfigError(
                f"there is no {path}: give --points-text the folder of the raw text of the "
                "validation set"
            )
        lines = read_lines(path)
        pairs = len(self.dataset(self.subset))
        if len(lines) != pairs:
            raise ConfigError(
                f"{path} has {len(lines)} lines and the validation set {pairs} pairs: give "
                "--points-text the folder of the text that it was made from"
            )
        return lines

    def _translate(self, model: Any, lines: List[int]) -> Dict[int, str]:
        """Translations by line, in order. The model is left in evaluation mode, as it was."""
        dataset = self.dataset(self.subset)
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
