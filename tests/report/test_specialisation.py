"""How much experts tell of words and domains, against scikit-learn and by hand."""

import numpy as np
import pytest
from sklearn.metrics import mutual_info_score

from fairseq_sparsemixer.report.specialisation import (
    MIN_COUNT,
    entropy,
    information,
    mutual_information,
    typical_words,
)


def test_information_against_scikit_learn():
    rng = np.random.default_rng(1)
    words = rng.integers(0, 40, 3000)
    experts = np.where(rng.random(3000) < 0.6, words % 5, rng.integers(0, 5, 3000))
    assert mutual_information(experts, words) == pytest.approx(mutual_info_score(experts, words))
    rng = np.random.default_rng(2)
    shuffled = [rng.permutation(words) for _ in range(20)]
    found = information(experts, words, "experts", shuffled)
    assert found.share == pytest.approx(mutual_info_score(experts, words) / entropy(experts))
    # By chance (rows - 1) (columns - 1) / 2T nats, to first order.
    assert found.shuffled == pytest.approx(4 * 39 / 6000 / entropy(experts), rel=0.2)
    by_hand = sorted(mutual_info_score(experts, each) / entropy(experts) for each in shuffled)
    assert found.chance == pytest.approx(np.quantile(by_hand, 0.95))
    assert by_hand[0] < found.shuffled < found.chance < by_hand[-1]
    assert information(words % 5, words, "experts", shuffled).share == pytest.approx(1)
    assert information(experts, words, "others", shuffled).share < found.share
    assert information(np.zeros(9, int), words[:9], "experts", []) is None


def test_typical_words_by_hand():
    """Expert 0: word 0 six times of 12, word 1 six of 6, word 2 four of 4, word 3 five of 10."""
    counts = {(0, 0): 6, (0, 1): 6, (0, 2): 4, (0, 3): 5, (1, 0): 6, (1, 3): 5, (1, 4): 10}
    pairs = [pair for pair, count in counts.items() for _ in range(count)]
    experts, words = np.array(pairs).T
    found = typical_words(experts, words, 0, most=9)
    assert MIN_COUNT == 5
    # Word 2 is too rare; the shares of expert 0 are of 21 choices, all of 42.
    assert [(each.word, each.times) for each in found] == [(1, 6)]
    assert found[0].lift == pytest.approx((6 / 21) / (6 / 42))
    assert [each.word for each in typical_words(experts, words, 1, most=9)] == [4]
    assert typical_words(experts, words, 1, most=0) == []
    more = np.append(experts, [1] * 21), np.append(words, [5] * 21)
    lifts = {each.word: each.lift for each in typical_words(*more, 0, most=9)}
    assert lifts == pytest.approx({1: 3.0, 0: 1.5, 3: 1.5})
    assert list(lifts) == [1, 0, 3]
