"""Lets fairseq-eval-lm say what a byte of text costs.

Other than the perplexity, that does not depend on how text is cut into tokens.
"""

import functools
import logging
import math
import re
import sys
from typing import Any, List, Sequence

from fairseq import utils
from fairseq.sequence_scorer import SequenceScorer

logger = logging.getLogger(__name__)

SPACE = "\u2581"
"""sentencepiece's sign for the space before a word."""
_ONE_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


def byte_counts(symbols: Sequence[str], special: int) -> List[int]:
    """Of each entry, in UTF-8, so that those of a line add up to the line and its end.

    Of sentencepiece's pieces the space before the first word stands for the end of the line; words,
    and those that ``@@`` cuts, have a space or the end of the line after them.

    Args:
        symbols: all entries of a dictionary.
        special: how many of them, at its beginning, are no text: these have 0, also the unknown
            word.
    """
    pieces = any(SPACE in symbol for symbol in symbols)
    counts = [0] * special
    for symbol in symbols[special:]:
        if pieces:
            text = symbol.replace(SPACE, " ")
        else:
            text = symbol[:-2] if symbol.endswith("@@") else f"{symbol} "
        counts.append(1 if _ONE_BYTE.fullmatch(symbol) else len(text.encode()))
    return counts


def apply() -> None:
    """Put it behind fairseq-eval-lm's own figures.

    It is found when it loads extensions, which it does again once it has been imported itself.
    """
    load = utils.import_user_module

    @functools.wraps(load)
    def import_user_module(args: Any) -> None:
        load(args)
        for name in ("__main__", "fairseq_cli.eval_lm"):  # the first of python -m
            module: Any = sys.modules.get(name)
            original = getattr(module, "eval_lm", None)
            if original is not None and not hasattr(original, "__wrapped__"):
                module.eval_lm = _with_bits_per_byte(module, original)

    utils.import_user_module = import_user_module


def _with_bits_per_byte(module: Any, original: Any) -> Any:
    @functools.wraps(original)
    def eval_lm(*args: Any, **kwargs: Any) -> Any:
        bits = bytes_of_text = 0.0
        first = int(kwargs.get("remove_bos_token", False))

        class Scorer(SequenceScorer):
            def generate(self, models: Any, sample: Any, **kwargs: Any) -> Any:
                nonlocal bits, bytes_of_text
                found = super().generate(models, sample, **kwargs)
                for hypothesis, *_ in found:
                    bits -= hypothesis["positional_scores"][first:].double().sum().item()
                    bytes_of_text += sum(counts[token] for token in hypothesis["tokens"].tolist())
                return found

        dictionary = kwargs["source_dictionary"]
        counts = byte_counts(dictionary.symbols, dictionary.nspecial)
        module.SequenceScorer = Scorer
        results = original(*args, **kwargs)
        if bytes_of_text:
            results["bits_per_byte"] = bits / math.log(2) / bytes_of_text
            logger.info("Bits per byte: %.4f", results["bits_per_byte"])
        return results

    return eval_lm
