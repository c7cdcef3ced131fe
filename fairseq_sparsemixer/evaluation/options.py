"""What a command line chooses: a model, how it searches, and what is scored. Loads no torch."""

from pathlib import Path
from typing import NamedTuple, Optional, Tuple

LARGEST = 2**31 - 1
"""Of whole numbers: neither torch nor numpy takes all larger ones as sizes and seeds."""


class ModelChoice(NamedTuple):
    """Which model, or ensemble.

    Attributes:
        run, checkpoint, data, source_lang, target_lang: see :class:`.translator.Translator`.
        average: ``"last"`` or ``"best"``, and of how many checkpoints of the run the mean is to
            take the place of ``checkpoint``.
    """

    run: str
    checkpoint: str
    data: Optional[Path]
    source_lang: Optional[str]
    target_lang: Optional[str]
    average: Optional[Tuple[str, int]] = None


class Search(NamedTuple):
    """How a model searches.

    Attributes:
        beam, lenpen, max_tokens: see :meth:`.translator.Translator.translate`.
        precision: see :class:`.translator.Translator`.
    """

    beam: int
    lenpen: float
    max_tokens: int
    precision: str


class ScoreChoice(NamedTuple):
    """How translations are scored.

    Attributes:
        tokenise: sacreBLEU's tokeniser; None for that of the target language.
        compound_split: BLEU over Moses tokens with compounds split.
        comet: a model of COMET, if any.
    """

    tokenise: Optional[str]
    compound_split: bool
    comet: Optional[str]
