"""How much an expert tells of words and domains, and its typical words.

All from pairs: for each choice of an expert the number of the expert, and that of a word or domain.
"""

from typing import List, NamedTuple, Optional

import numpy as np

SHUFFLES = 5
MIN_COUNT = 5


class Information(NamedTuple):
    """Mutual information as a share of an entropy, 0 to 1.

    Attributes:
        share: of the pairs as they are.
        shuffled: mean of the same with the experts shuffled over the pairs: what a sample of this
            size shows where experts know nothing.
    """

    share: float
    shuffled: float


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
    """Of the distribution of whole numbers >= 0, in nats."""
    counts = np.bincount(values)
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())


def mutual_information(one: np.ndarray, other: np.ndarray) -> float:
    """Of two arrays of as many whole numbers >= 0, in nats (the plug-in estimate)."""
    joint = one.astype(np.int64) * (int(other.max()) + 1) + other
    # Of the pairs that occur: a table of all would not fit for large vocabularies.
    joint = np.unique(joint, return_inverse=True)[1]
    return max(0.0, entropy(one) + entropy(other) - entropy(joint))


def information(experts: np.ndarray, others: np.ndarray, of: str) -> Optional[Information]:
    """I(expert; other) / H, where ``of`` ("experts", "others") says of what H is the entropy.

    Returns:
        None where H is 0: there is nothing to know.
    """
    total = entropy(experts if of == "experts" else others)
    if total == 0:
        return None
    rng = np.random.default_rng(0)
    chance = [mutual_information(rng.permutation(experts), others) for _ in range(SHUFFLES)]
    return Information(mutual_information(experts, others) / total, float(np.mean(chance)) / total)


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
