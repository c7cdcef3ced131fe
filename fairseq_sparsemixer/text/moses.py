r"""Text as the scripts of the Moses toolkit leave it: normalised, in tokens, and joined again.

Published results on WMT'14 English-German are measured on text that went through the toolkit's
Perl scripts. These functions give what the scripts give, one line at a time, without Perl:

=================================  =============================================================
:func:`training_tokens`            ``normalize-punctuation.perl L | remove-non-printing-char.perl
                                   | tokenizer.perl -a -l L``, for training and validation text
:func:`test_tokens`                every U+2019 made ``'``, then ``tokenizer.perl [-a] -l L``
:func:`detokenise`                 ``detokenizer.perl -l L``
=================================  =============================================================

The rules are those of sacremoses (optional: the extra ``wmt``), mended here where it departs from
the scripts. English and German are compared with the scripts' own output, in
``tests/data/moses_hard_lines.json``.

Lines are strings without their ``\n``, split on ``\n`` alone as
:func:`fairseq_sparsemixer.files.iterate_lines` does. Every function raises a
:class:`~fairseq_sparsemixer.errors.UserError` where sacremoses is needed and not installed.
"""

import functools
import re
from typing import Any, List, Pattern, Tuple

import regex

from fairseq_sparsemixer.requirements import load

# A pattern of `re` or of `regex`, and what stands for each match.
Rule = Tuple[Any, str]

_NON_PRINTING = regex.compile(r"\p{C}")
_CONTROLS_BUT_SPACES = re.compile(r"[\x00-\x08\x0e-\x1f]")
_FINAL_FULL_STOP = re.compile(r"(\S)\.$")
_MARKUP_LINE = re.compile(r"<.+>")
_ALPHABETIC = regex.compile(r"\p{Alpha}")
_LOWER_CASE = regex.compile(r"\p{Lower}")
_CURRENCY_OR_OPENING = regex.compile(r"^[\p{Sc}(\[{¿¡]+$")
_CONTRACTION = regex.compile(r"'\p{Alpha}")
_ENDS_ALPHANUMERIC = regex.compile(r"\p{Alnum}$")
# A noncharacter: no text has it.
_GUARD = "\uffff"
# The rules of sacremoses's tokeniser that list letters and digits, but for the English apostrophes.
_RULES_WITH_CLASSES = (
    "PAD_NOT_ISALNUM",
    "AGGRESSIVE_HYPHEN_SPLIT",
    "COMMA_SEPARATE_1",
    "COMMA_SEPARATE_2",
    "COMMA_SEPARATE_3",
)


def training_tokens(line: str, language: str) -> str:
    """Tokens of a line of training or validation text: punctuation normalised first.

    Source: the recipe of ``fairseq/examples/translation/prepare-wmt14en2de.sh``.
    """
    return tokenise(remove_non_printing(normalise_punctuation(line, language)), language)


def test_tokens(line: str, language: str, split_hyphens: bool = True) -> str:
    """Tokens of a line of test text, where only the typographic apostrophe is made plain."""
    return tokenise(line.replace("’", "'"), language, split_hyphens)


def normalise_punctuation(line: str, language: str) -> str:
    """Plain quotation marks, dashes and spaces, as ``normalize-punctuation.perl`` makes them.

    German quotation marks move before a comma or full stop, English ones behind it.
    """
    # Perl sees the line with its end: a German quotation mark that ends a line moves before the
    # full stop only because a character follows it.
    line += "\n"
    for pattern, replacement in _punctuation_rules(language):
        line = pattern.sub(replacement, line)
    return line[:-1]


def remove_non_printing(line: str) -> str:
    """A space for every control, format, private-use or unassigned character.

    These are the soft hyphen, the zero-width space, and the joiner inside an emoji too.
    """
    return _NON_PRINTING.sub(" ", line)


def tokenise(line: str, language: str, split_hyphens: bool = True) -> str:
    """Tokens of ``tokenizer.perl``, separated by single spaces; none for an empty line.

    The characters ``& | < > ' " [ ]`` become HTML entities. ``split_hyphens`` is the script's
    ``-a``: hyphens between letters or digits become the token ``@-@``.
    """
    # To Perl these are no spaces, and removed; Python would split words at some of them.
    line = _CONTROLS_BUT_SPACES.sub("", line)
    tokens = _tokeniser(language).tokenize(
        line, aggressive_dash_splits=split_hyphens, return_str=True
    )
    # After a final apostrophe Perl leaves a space, and sometimes two before it.
    return " ".join(tokens.split())


def detokenise(tokens: str, language: str) -> str:
    """Text from a line of tokens that :func:`tokenise` made, or a model that learned from them.

    A line that begins with ``<`` and ends with ``>`` counts as markup and stays as it is.
    """
    if _MARKUP_LINE.fullmatch(tokens):
        return tokens
    detokeniser = _detokeniser(language)
    # Entities are resolved before the words are looked at, so that the guards see their quotes.
    text = detokeniser.unescape_xml(f" {tokens} ".replace(" @-@ ", "-"))
    words = text.split()
    if language == "en":
        words = _guard_contractions(words)
    return detokeniser.detokenize(words, unescape=False).replace(_GUARD, "")


def _guard_contractions(words: List[str]) -> List[str]:
    """Keep sacremoses from joining ``'s`` to a word that ends in no letter and no digit."""
    return [
        _GUARD + word
        if _CONTRACTION.match(word) and not _ENDS_ALPHANUMERIC.search(previous)
        else word
        for previous, word in zip(["", *words], words)
    ]


@functools.cache
def _punctuation_rules(language: str) -> List[Tuple[Pattern[str], str]]:
    # `penn` means the contrary of the script's flag `-penn`, which the recipe does not give.
    normaliser = load("sacremoses", "wmt").MosesPunctNormalizer(
        language, penn=True, perl_parity=True
    )
    # Its own method would strip the line and let `\d` match every digit of Unicode; the script
    # works on bytes.
    return [(re.compile(rule, re.ASCII), mark) for rule, mark in normaliser.substitutions]


@functools.cache
def _tokeniser(language: str) -> Any:
    tokeniser = load("sacremoses", "wmt").MosesTokenizer(language)
    for name in _RULES_WITH_CLASSES:
        setattr(tokeniser, name, _by_property(getattr(tokeniser, name), tokeniser))
    tokeniser.ENGLISH_SPECIFIC_APOSTROPHE = [
        _by_property(rule, tokeniser) for rule in tokeniser.ENGLISH_SPECIFIC_APOSTROPHE
    ]
    # Those of sacremoses go through the whole list of letters at every call.
    tokeniser.isanyalpha = _ALPHABETIC.search
    tokeniser.islower = _LOWER_CASE.match
    split_full_stops = tokeniser.handles_nonbreaking_prefixes

    def split_final_too(text: str) -> str:
        # In Perl the last word loses its full stop even where it is an abbreviation.
        return _FINAL_FULL_STOP.sub(r"\1 .", split_full_stops(text))

    tokeniser.handles_nonbreaking_prefixes = split_final_too
    return tokeniser


def _by_property(rule: Rule, tokeniser: Any) -> Rule:
    """Replace the letters that sacremoses lists (an older Unicode, no Han) by their property."""
    pattern, replacement = rule
    text = pattern.pattern
    for name in ("Alnum", "Alpha", "N"):
        text = text.replace(getattr(tokeniser, f"Is{name}"), rf"\p{{{name}}}")
    return regex.compile(text), replacement


@functools.cache
def _detokeniser(language: str) -> Any:
    detokeniser = load("sacremoses", "wmt").MosesDetokenizer(language)
    # Its own list lacks the signs of bitcoin and lari.
    detokeniser.IS_CURRENCY_SYMBOL = _CURRENCY_OR_OPENING
    return detokeniser
