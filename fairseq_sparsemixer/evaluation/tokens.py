"""BLEU over tokens, which older papers score; never to be compared with sacreBLEU."""

from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Tuple

from fairseq_sparsemixer.evaluation import scoring
from fairseq_sparsemixer.files import write_lines
from fairseq_sparsemixer.text import moses


class TokenScore(NamedTuple):
    """A BLEU over tokens: its key in the JSON, name in the table, and label.

    Attributes:
        ending: what its files of tokens end in.
        label: what it is a score of; in place of ``{tokens}`` how the model's tokens are made.
    """

    key: str
    title: str
    ending: str
    label: str


TOKENISED = TokenScore(
    "tokenised_bleu",
    "tokenised BLEU",
    "tok",
    "{tokens}, BPE removed; not comparable with sacreBLEU",
)
COMPOUND_SPLIT = TokenScore(
    "compound_split_bleu",
    "compound-split BLEU",
    "atat",
    "Moses tokens without -a, compounds split as by tensor2tensor's get_ende_bleu.sh; not "
    "comparable with sacreBLEU",
)


def token_paths(stem: Path, language: str, kind: TokenScore) -> Tuple[Path, Path]:
    """The files of tokens: of the translations, and of the reference."""
    hypotheses = stem.with_name(f"{stem.name}.{language}.{kind.ending}")
    reference = stem.with_name(f"{stem.name}.ref.{language}.{kind.ending}")
    return hypotheses, reference


def score_tokens(
    kind: TokenScore, hypotheses: List[str], reference: List[str], stem: Path, language: str
) -> Dict[str, Any]:
    """BLEU over tokens, with its label and the files that it can be computed from again."""
    paths = token_paths(stem, language, kind)
    for path, lines in zip(paths, (hypotheses, reference)):
        write_lines(path, lines)
    return {
        **scoring.tokenised_bleu(hypotheses, reference),
        "label": kind.label,
        "hypotheses": str(paths[0]),
        "reference": str(paths[1]),
    }


def compounds_split(lines: List[str], language: str) -> List[str]:
    """Moses tokens of raw lines, without ``-a``, then with their compounds split.

    ``get_ende_bleu.sh`` also makes the Unicode punctuation of translations plain, but not that of
    references; here both stay as they are.
    """
    return scoring.split_compounds(
        [moses.tokenise(line, language, split_hyphens=False) for line in lines]
    )
