"""Splitting by document and domain, without near duplicates; the copy score."""

import collections
import dataclasses
import hashlib
import itertools
import math
import re

import pytest
from support import debian, messages
from support.corpora import SPLITS, lines_of

from fairseq_sparsemixer.corpora import cleaning, splitting
from fairseq_sparsemixer.corpora.cleaning import SentencePair


def naive_cosines(train, queries):
    """TF-IDF of 4-grams in padded words, written out: smoothed idf, 1 + log tf, unit length."""

    def grams(text):
        found = collections.Counter()
        for word in re.sub(r"\d+", "0", text.lower()).split():
            padded = f" {word} "
            found.update(padded[i : i + 4] for i in range(max(1, len(padded) - 3)))
        return found

    documents = [grams(text) for text in train]
    frequency = collections.Counter(gram for document in documents for gram in document)

    def vector(counts):
        weights = {
            gram: (1 + math.log(n)) * (1 + math.log((1 + len(train)) / (1 + frequency[gram])))
            for gram, n in counts.items()
            if gram in frequency
        }
        norm = math.sqrt(sum(weight**2 for weight in weights.values())) or 1.0
        return {gram: weight / norm for gram, weight in weights.items()}

    vectors = [vector(document) for document in documents]
    return [
        [sum(weight * other.get(gram, 0.0) for gram, weight in query.items()) for other in vectors]
        for query in (vector(grams(text)) for text in queries)
    ]


def test_nearest_neighbours_agrees_with_the_formula(messages_corpus):
    train = lines_of(messages_corpus, "train", "en")[:60]
    queries = lines_of(messages_corpus, "test", "en")[:20] + ["zzzz qqqq"]
    expected = naive_cosines(train, queries)
    indices, cosines = splitting.nearest_neighbours(train, queries)
    for row, index, cosine in zip(expected[:-1], indices, cosines):
        assert cosine == pytest.approx(max(row), abs=1e-5)
        assert row[index] == pytest.approx(max(row), abs=1e-5)
    assert (indices[-1], cosines[-1]) == (-1, 0.0)


def test_nearest_neighbours_over_many_blocks_with_ties():
    train = ["the red lamp 7", "the blue door", "the red lamp 12"]
    queries = ["the blue door", "the red lamp 99"] * 300
    indices, cosines = splitting.nearest_neighbours(train, queries)
    # Numbers count as equal, and the first of equals is taken.
    assert indices.tolist() == [1, 0] * 300
    assert cosines == pytest.approx([1.0] * 600, abs=1e-6)


def test_stable_fraction_is_pinned():
    digest = hashlib.sha256(b"41/zha").hexdigest()
    assert splitting.stable_fraction("41/zha") == int(digest[:16], 16) / 16**16
    values = [splitting.stable_fraction(str(i)) for i in range(2000)]
    assert 0.27 < sum(value < 0.3 for value in values) / 2000 < 0.33


def message_pairs():
    for component, english, german in messages.component_messages():
        for key, source in english["config"].items():
            yield SentencePair(source, german["config"][key], component)


def test_hold_out_shares_no_document_and_no_sentence():
    pairs = [*message_pairs()]
    held = {p.document for p in splitting.hold_out(pairs, messages.SPLIT).test}
    # A short sentence, the same source in other letters, and the same target in valid and test.
    document = sorted(held)[0]
    split = splitting.hold_out(pairs, messages.SPLIT)
    extra = [
        SentencePair("Too short a one", "Eine zu kurze", document),
        SentencePair(split.test[0].source.upper(), "Etwas ganz anderes", document),
        SentencePair("Quite another English sentence here.", split.valid[0].target, document),
    ]
    split = splitting.hold_out(pairs + extra, messages.SPLIT)
    parts = {name: getattr(split, name) for name in SPLITS}
    documents = {name: {pair.document for pair in part} for name, part in parts.items()}
    assert all(documents.values())
    for one, other in itertools.combinations(SPLITS, 2):
        assert not documents[one] & documents[other]
    for side in (0, 1):
        texts = [{pair[side].lower() for pair in parts[name]} for name in ("valid", "test")]
        assert not texts[0] & texts[1]
    sources = [pair.source.lower() for pair in split.valid + split.test]
    assert len(set(sources)) == len(sources)
    assert all(len(cleaning.tokens(source)) >= 5 for source in sources)
    sizes = [len(split.valid), len(split.test)]
    assert abs(sizes[0] - sizes[1]) <= 12  # one document
    dropped = split.counts["held_out_dropped"]
    assert dropped["too_short"] == 1
    assert dropped["duplicate_source"] >= 1
    assert dropped["target_also_in_valid"] == 1
    everything = len(split.train) + sum(sizes) + sum(dropped.values())
    assert everything == len(pairs) + len(extra)


def test_hold_out_refuses_to_leave_a_part_empty():
    pairs = [pair for pair in message_pairs() if pair.document < "component03"]
    with pytest.raises(ValueError, match="documents held out"):
        splitting.hold_out(pairs, dataclasses.replace(messages.SPLIT, held_out_share=0.0))


def test_remove_near_duplicates_leaves_none_and_no_more_than_it_must():
    test = [SentencePair("The garden sensor 12 is out of reach", "Der Sensor fehlt gerade", "t")]
    valid = [SentencePair("Choose another colour for the lamp", "Wähle eine andere Farbe", "v")]
    near = SentencePair("The garden sensor 3 is out of reach!", "Gartensensor 3 ist weg", "a")
    same_target = SentencePair("A completely different wording", "Der Sensor fehlt gerade", "b")
    far = SentencePair("Washing machines need water", "Waschmaschinen brauchen Wasser", "c")
    split = splitting.Split([near, same_target, far], valid, test, {"documents": 5})
    filtered = splitting.remove_near_duplicates(split, 0.70)
    assert filtered.train == [far]
    assert filtered.counts == {
        "documents": 5,
        "train_before_filter": 3,
        "train_dropped": {"held_out_target": 1, "near_duplicate": 1},
    }


def copy_score(train, targets, sources, references):
    pairs, part = (
        [SentencePair(*sides, "") for sides in zip(*texts)]
        for texts in ((train, targets), (sources, references))
    )
    (copied,) = splitting.copies(pairs, [part])
    return splitting.score_copies(copied, part, "13a")


def test_copy_score_is_sacrebleu_of_the_nearest_translation():
    import sacrebleu

    train = ["the red lamp is on", "the blue door is shut", "one more sentence here"]
    targets = ["die rote Lampe ist an", "die blaue Tür ist zu", "noch ein Satz hier"]
    score = copy_score(train, targets, train[:2], targets[:2])
    assert score.bleu == 100.0
    sources, references = ["a red lamp is off", "xyzzyx"], ["eine rote Lampe ist an", "nichts"]
    score = copy_score(train, targets, sources, references)
    assert score.hypotheses == [targets[0], ""]
    expected = sacrebleu.corpus_bleu([targets[0], ""], [references]).score
    assert score.bleu == pytest.approx(expected, abs=0.005)
    assert "tok:13a" in score.signature
    assert f"version:{sacrebleu.__version__}" in score.signature


# --- by domain ------------------------------------------------------------------------------------


def domain_pairs(domain, documents, sentences=10):
    phrases = debian.Phrases(domain)
    return [
        SentencePair(
            f"{text[0][:-1]} {number} {i}.",
            f"{text[1][:-1]} {number} {i}.",
            f"{domain}/{number}",
            domain,
        )
        for number in range(documents)
        for i, text in enumerate(phrases.sentence() for _ in range(sentences))
    ]


def count(pairs, domain):
    return sum(pair.domain == domain for pair in pairs)


def test_each_domain_has_its_share_and_its_maximum():
    pairs = domain_pairs("one", 200) + domain_pairs("three", 200)
    settings = splitting.SplitSettings(
        held_out_share=0.5, salt="x", min_held_out_tokens=1, max_cosine=0.7,
        domain_shares={"one": 0.05}, max_held_out=100,
    )  # fmt: skip
    split = splitting.hold_out(pairs, settings)
    held = {
        domain: len({p.document for p in pairs if p.domain == domain})
        - len({p.document for p in split.train if p.domain == domain})
        for domain in ("one", "three")
    }
    assert 3 <= held["one"] <= 20 and 80 <= held["three"] <= 120
    for part in (split.valid, split.test):
        assert count(part, "three") == 100
    smaller = [count(part, "one") for part in (split.valid, split.test)]
    assert sum(smaller) == 10 * held["one"] and abs(smaller[0] - smaller[1]) <= 10
    assert split.counts["held_out_dropped"]["over_the_maximum"] == 10 * held["three"] - 200
    # Which are kept does not depend on the order of the pairs.
    again = splitting.hold_out(pairs[::-1], settings)
    assert set(again.valid) == set(split.valid) and set(again.test) == set(split.test)


@pytest.mark.parametrize(
    ("source", "target", "reason"),
    [
        ("Six short words are enough here.", "Sechs Wörter sind hier genug.", None),
        ('He said "this is it."', "Er sagte: „Das ist es.“", None),
        ("Too short.", "Zu kurz.", "too_short"),
        (f"{'many ' * 30}words.", "Viele Wörter.", "too_long"),
        ("The title of a page without an end", "Der Titel einer Seite.", "no_sentence"),
        ("The title of a page with an end.", "Der Titel einer Seite", "no_sentence"),
        ("See the page parrot(1) for more of it.", "Siehe dort.", "code_or_reference"),
        ("Set the name of it to {name} now.", "Setze es.", "code_or_reference"),
    ],
)
def test_what_may_be_held_out(source, target, reason):
    settings = splitting.SplitSettings(
        0.1, "x", 6, 0.7, max_held_out_tokens=20, whole_sentences=True
    )
    assert splitting.unsuitable(SentencePair(source, target, "d"), settings) == reason


def test_random_split_holds_out_as_many_of_each_domain_of_any_document():
    pairs = domain_pairs("one", 50) + domain_pairs("three", 50)
    settings = splitting.SplitSettings(0.2, "x", 1, 0.7, max_held_out=30)
    like = splitting.hold_out(pairs, settings)
    split = splitting.random_split(pairs, like, settings)
    for domain in ("one", "three"):
        assert count(split.test, domain) == count([*like.valid, *like.test], domain)
    assert not set(split.test) & set(split.train)
    assert len(split.test) + len(split.train) == len(pairs)
    documents = {pair.document for pair in split.test}
    assert len(documents & {pair.document for pair in split.train}) > len(documents) / 2


def test_settings_are_described_without_what_is_left_out():
    plain = splitting.SplitSettings(0.0, "41", 5, 0.70)
    assert plain.describe() == {
        "held_out_share": 0.0, "salt": "41", "min_held_out_tokens": 5, "max_cosine": 0.70
    }  # fmt: skip
    described = debian.SPLIT.describe()
    assert splitting.SplitSettings(**described) == debian.SPLIT
