"""What points of translation hold besides losses and experts: scores of translations."""

import contextlib
import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ContextManager, Dict, List, Mapping, NamedTuple, Optional

import numpy as np
import torch
from fairseq import utils
from fairseq.distributed import utils as distributed_utils
from fairseq.distributed.fully_sharded_data_parallel import FullyShardedDataParallel

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


find_tokeniser = functools.cache(bleu.find_tokeniser)
"""Of BLEU; to find one out is to make it, which takes some languages a dictionary."""


@dataclass
class TranslationPointsConfig(PointsConfig):
    """Settings of :class:`TranslatedTask`."""

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


class Part(NamedTuple):
    """The lines of the validation set in one pair of languages.

    Attributes:
        source_lang, target_lang: of the pair.
        reference: ending of the file of their translations.
        lines: their numbers.
    """

    source_lang: str
    target_lang: str
    reference: str
    lines: range


class TranslatedTask(MeasuredTask):
    """The base of tasks of translation; points hold BLEU and chrF where ``points_text`` is given.

    fairseq's task is the other base.
    """

    losses_by_sentence = True

    # What tasks differ in

    def parts(self) -> List[Part]:
        """The validation set by pair of languages."""
        raise NotImplementedError

    def translating(self, part: Part) -> ContextManager[Any]:
        """Context in which fairseq's task translates this part."""
        return contextlib.nullcontext()

    # What they share

    def check_measuring(self, model: torch.nn.Module) -> None:
        """See :class:`MeasuredTask`."""
        if self.settings.points_text:
            self.groups()
            if self.settings.points_sentences > 0:
                self._references()
                self._subwords()
                for part in self.parts():
                    find_tokeniser(part.target_lang)
        self._check_translation(model)

    def _check_translation(self, model: torch.nn.Module) -> None:
        """Refuse what would wait for ever: only the first worker translates."""
        translates = self.settings.points_text and self.settings.points_sentences > 0
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

    def further_figures(
        self, model: Any, point: Mapping[str, Any], sentences: measuring.Sentences
    ) -> Dict[str, Any]:
        """See :class:`MeasuredTask`."""
        domains, figures = self.groups(), {}
        by_domain = {} if domains is None else measuring.domain_losses(sentences, domains)
        translates = self.settings.points_text and self.settings.points_sentences > 0
        if translates and point["nll_loss"] is not None:
            lines = measuring.choose_lines(self.settings.points_sentences, sentences, domains)
            figures = self._translation_figures(model, lines, domains)
            for domain, scores in figures.pop("by_domain", {}).items():
                by_domain[domain].update(scores)
        return {**figures, "by_domain": by_domain} if by_domain else figures

    def _translation_figures(
        self, model: Any, lines: List[int], domains: Optional[List[str]]
    ) -> Dict[str, Any]:
        references, parts = self._references(), self.parts()
        own = {part: [line for line in lines if line in part.lines] for part in parts}
        figures = {
            f"{part.source_lang}-{part.target_lang}": measuring.translation_figures(
                self._translate(model, part, chosen),
                references,
                domains if len(parts) == 1 else None,
                find_tokeniser(part.target_lang),
            )
            for part, chosen in own.items()
            if chosen
        }
        return measuring.mean_figures(figures) if len(parts) > 1 else next(iter(figures.values()))

    def _references(self) -> List[str]:
        """Of each line of the validation set."""
        return [
            line for part in self.parts() for line in self.text(part.reference, len(part.lines))
        ]

    def text(self, ending: str, pairs: int) -> List[str]:
        """A file of ``points_text`` that has a line for each of so many pairs.

        Raises:
            ConfigError: there is none.
        """
        path = Path(self.settings.points_text, f"{self.subset}.{ending}")
        if not path.is_file():
            raise ConfigError(
                f"there is no {path}: give --points-text the folder of the raw text of the "
                "validation set"
            )
        lines = read_lines(path)
        if len(lines) != pairs:
            raise ConfigError(
                f"{path} has {len(lines)} lines and the validation set {pairs} pairs: give "
                "--points-text the folder of the text that it was made from"
            )
        return lines

    def _translate(self, model: Any, part: Part, lines: List[int]) -> Dict[int, str]:
        """Translations by line, in order. The model is left in evaluation mode, as it was."""
        dataset: Any = self.dataset(self.subset)
        cutting = self._subwords()
        encoder = cutting.encoder()
        batches = dataset.batch_by_size(
            np.array(sorted(lines, key=dataset.num_tokens), dtype=np.int64),
            max_tokens=max([TOKENS_AT_ONCE, *map(dataset.num_tokens, lines)]),
        )
        samples = (dataset.collater([dataset[int(line)] for line in batch]) for batch in batches)
        translations = {}
        with self.translating(part):
            found = best_hypotheses(
                self, [model], samples, max_output=MAX_OUTPUT, beam=self.settings.points_beam
            )
            for line, hypothesis in found:
                pieces = self.target_dictionary.string(hypothesis["text_tokens"].int().cpu())
                text, _ = cutting.decode(encoder.decode(pieces), part.target_lang)
                translations[line] = text
        return dict(sorted(translations.items()))

    def _subwords(self) -> "subwords.Subwords":
        return subwords.find_subwords([Path(utils.split_paths(self.settings.data)[0])])


def _is_sharded(model: torch.nn.Module) -> bool:
    return any(isinstance(module, FullyShardedDataParallel) for module in model.modules())
