"""How much an expert tells of words and domains, and its typical words.

All from pairs: for each choice of an expert the number of the expert, and that of a word or domain.
"""

from typing import Iterable, List, NamedTuple, Optional

import numpy as np

MIN_COUNT = 5
QUANTILE = 0.95


class Information(NamedTuple):
    """Mutual information as a share of an entropy, 0 to 1.

    Attributes:
        share: of the pairs as they are.
        shuffled: mean of the same over shuffled pairs: what a sample of this size shows where
            experts know nothing.
        chance: what :data:`QUANTILE` of the shuffled pairs stay below.
    """

    share: float
    shuffled: float
    chance: float


class Word(NamedTuple):
    """A word that an expert takes more often than its share.

    Attributes:
        word: its number.
        times: how often the expert took it.
        lift: p(word | expert) / p(word).
    """

    word: int
    times: int
    lift: float


def entropy(values: np.ndarray) -> float:
    """The entropy of the distribution of whole numbers >= 0, in nats."""
    counts = np.bincount(values)
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())


def mutual_information(one: np.ndarray, other: np.ndarray) -> float:
    """That of two arrays of as many whole numbers >= 0, in nats (the plug-in estimate)."""
    joint = one.astype(np.int64) * (int(other.max()) + 1) + other
    # Of the pairs that occur: a table of all would not fit for large vocabularies.
    joint = np.unique(joint, return_inverse=True)[1]
    return max(0.0, entropy(one) + entropy(other) - entropy(joint))


def information(
    experts: np.ndarray, others: np.ndarray, of: str, shuffled: Iterable[np.ndarray]
) -> Optional[Information]:
    """I(expert; other) / H, where ``of`` ("experts", "others") says of what H is the entropy.

    Args:
        experts, others: the pairs.
        of: see above.
        shuffled: ``others`` as they could as well be, had they nothing to do with the experts.

    Returns:
        None where H is 0: there is nothing to know.
    """

    def share(others: np.ndarray) -> float:
        total = entropy(experts if of == "experts" else others)
        return mutual_information(experts, others) / total if total else 0.0

    if entropy(experts if of == "experts" else others) == 0:
        return None
    values = [share(each) for each in shuffled]
    return Information(share(others), float(np.mean(values)), float(np.quantile(values, QUANTILE)))


def typical_words(experts: np.ndarray, words: np.ndarray, expert: int, most: int) -> List[Word]:
    """At most ``most`` words that ``expert`` takes :data:`MIN_COUNT` times or more, lift above 1.

    By descending count x ln(lift): their parts in the divergence of the expert's words from all.
    """
    overall = np.bincount(words)
    own = np.bincount(words[experts == expert], minlength=len(overall))
    candidates = np.flatnonzero(own >= MIN_COUNT)
    lift = (own[candidates] / own.sum()) / (overall[candidates] / overall.sum())
    candidates, lift = candidates[lift > 1], lift[lift > 1]
    order = np.argsort(-own[candidates] * np.log(lift), kind="stable")[:most]
    return [Word(int(candidates[i]), int(own[candidates[i]]), float(lift[i])) for i in order]
