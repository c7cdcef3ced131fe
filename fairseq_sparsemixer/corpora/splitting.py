"""Train, valid and test text without a common document; how much one still gives away of another.

Training text has no near duplicates of valid and test; these two may have some of each other.

Similarity is the cosine of TF-IDF vectors over character 4-grams within words, with numbers made
equal. Shapes: S training sentences, Q queries.
"""

import dataclasses
import hashlib
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Sequence, Set, Tuple

from tqdm import tqdm

from fairseq_sparsemixer.corpora.cleaning import SentencePair, tokens
from fairseq_sparsemixer.errors import UserError
from fairseq_sparsemixer.text.bleu import make_bleu

_QUERIES_AT_ONCE = 256
_NUMBER = re.compile(r"\d+")


@dataclass(frozen=True)
class SplitSettings:
    """How a corpus is divided."""

    held_out_share: float  # of the documents
    salt: str  # another salt holds out other documents
    min_held_out_tokens: int  # shorter sources say little about a translation model
    max_cosine: float  # training pairs this close to a held-out source are removed
    # The rest is for corpora of several domains and of text that is not all sentences.
    domain_shares: Dict[str, float] = field(default_factory=dict)  # instead of held_out_share
    max_held_out: Optional[int] = None  # of a domain in valid, and in test; others are left out
    max_held_out_tokens: Optional[int] = None
    whole_sentences: bool = False  # held-out pairs are sentences, without code or references
    # Domains are pairs of languages: a source may be held out once in each.
    by_languages: bool = False
    max_train: Optional[int] = None  # of a domain

    def describe(self) -> Dict[str, Any]:
        """As a JSON object, without the settings that are left out."""
        return {
            name: value
            for name, value in dataclasses.asdict(self).items()
            if value is not None and value is not False and value != {}
        }

    def share(self, domain: str) -> float:
        """Of the documents of a domain, how many are held out."""
        return self.domain_shares.get(domain, self.held_out_share)


class Split(NamedTuple):
    """The parts of a corpus, and counts of what was left out."""

    train: List[SentencePair]
    valid: List[SentencePair]
    test: List[SentencePair]
    counts: Dict[str, Any]

    def of_domain(self, domain: str) -> "Split":
        """Its pairs of a domain."""
        train, valid, test = ([pair for pair in part if pair.domain == domain] for part in self[:3])
        return Split(train, valid, test, self.counts)


def stable_fraction(text: str) -> float:
    """A number in [0, 1) that depends on nothing but the text (Python's ``hash`` is salted)."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8")).digest()[:8], "big") / 2**64


def hold_out(pairs: Sequence[SentencePair], settings: SplitSettings) -> Split:
    """Split by document: whole documents are held out, half of them for valid, half for test.

    Held-out sources are unique (of each pair of languages), and no sentence of either language is
    in both valid and test.
    Training pairs are not yet filtered: see :func:`remove_near_duplicates`.

    Raises:
        UserError: the settings leave valid or test without a sentence.
    """
    domains = {pair.document: pair.domain for pair in pairs}
    held_out = {
        document
        for document, domain in domains.items()
        if stable_fraction(f"{settings.salt}/{document}") < settings.share(domain)
    }
    dropped: Counter = Counter()
    candidates = []
    sources: Set[Tuple[str, str]] = set()
    for pair in pairs:
        if pair.document not in held_out:
            continue
        reason = unsuitable(pair, settings)
        source = pair.source.lower(), pair.domain if settings.by_languages else ""
        if reason is None and source in sources:
            reason = "duplicate_source"
        if reason is not None:
            dropped[reason] += 1
        else:
            sources.add(source)
            candidates.append(pair)
    valid_documents = _half(candidates, settings.salt)
    valid = [pair for pair in candidates if pair.document in valid_documents]
    test = [pair for pair in candidates if pair.document not in valid_documents]
    if settings.max_held_out is not None:
        held = len(valid) + len(test)
        valid = _sample(valid, settings.max_held_out, settings.salt)
        test = _sample(test, settings.max_held_out, settings.salt)
        dropped["over_the_maximum"] = held - len(valid) - len(test)
    valid_targets = {pair.target.lower() for pair in valid}
    kept_test = [pair for pair in test if pair.target.lower() not in valid_targets]
    dropped["target_also_in_valid"] = len(test) - len(kept_test)
    if not valid or not kept_test:
        raise UserError(
            f"{len(held_out)} of {len(domains)} documents held out: too few; give more text"
        )
    counts = {
        "documents": len(domains),
        "documents_held_out": len(held_out),
        "held_out_dropped": dict(sorted(dropped.items())),
        "held_out": len(valid) + len(kept_test),
    }
    train = [pair for pair in pairs if pair.document not in held_out]
    return Split(train, valid, kept_test, counts)


_SENTENCE_END = re.compile(r"[.!?]['\"”“»)]*$")
_CODE_OR_REFERENCE = re.compile(r"[{}%\\|<>]|\w\(\d\)")


def unsuitable(pair: SentencePair, settings: SplitSettings) -> Optional[str]:
    """Why a pair may not be held out, or None."""
    length = len(tokens(pair.source))
    if length < settings.min_held_out_tokens:
        return "too_short"
    if settings.max_held_out_tokens is not None and length > settings.max_held_out_tokens:
        return "too_long"
    if settings.whole_sentences:
        if not (_SENTENCE_END.search(pair.source) and _SENTENCE_END.search(pair.target)):
            return "no_sentence"
        if _CODE_OR_REFERENCE.search(pair.source):
            return "code_or_reference"
    return None


def _half(pairs: Sequence[SentencePair], salt: str) -> Set[str]:
    """Documents with about half of the pairs: in hashed order, each goes to the smaller half.

    Each domain is halved by itself, but for documents of several, which go by all of them.
    """
    sizes: Dict[str, Counter] = {}
    for pair in pairs:
        sizes.setdefault(pair.document, Counter())[pair.domain] += 1
    first: Set[str] = set()
    balances: Counter = Counter()
    for document in sorted(sizes, key=lambda name: stable_fraction(f"{salt}/half/{name}")):
        if sum(balances[domain] for domain in sizes[document]) <= 0:
            first.add(document)
            balances.update(sizes[document])
        else:
            balances.subtract(sizes[document])
    return first


def _sample(pairs: Sequence[SentencePair], size: int, salt: str) -> List[SentencePair]:
    """At most ``size`` pairs of each domain, which their hash decides; in their order."""
    by_domain: Dict[str, List[SentencePair]] = {}
    for pair in pairs:
        by_domain.setdefault(pair.domain, []).append(pair)
    chosen: Set[SentencePair] = set()
    for members in by_domain.values():
        members.sort(key=lambda pair: stable_fraction(f"{salt}/sample/{pair.source}"))
        chosen.update(members[:size])
    return [pair for pair in pairs if pair in chosen]


def random_split(pairs: Sequence[SentencePair], like: Split, settings: SplitSettings) -> Split:
    """What not to do: as many pairs of each domain held out as in ``like``, of any document.

    The same pairs may be held out as in ``like``; all others are for training. ``valid`` is empty.
    """
    sizes = Counter(pair.domain for pair in [*like.valid, *like.test])
    test: List[SentencePair] = []
    for domain, size in sizes.items():
        suitable = [
            pair for pair in pairs if pair.domain == domain and unsuitable(pair, settings) is None
        ]
        test += _sample(suitable, size, settings.salt)
    held_out = set(test)
    return Split([pair for pair in pairs if pair not in held_out], [], test, {})


def fill_training_part(split: Split, settings: SplitSettings) -> Split:
    """At most ``max_train`` training pairs of each domain, without what gives held-out ones away.

    As many as there are: where :func:`remove_near_duplicates` takes some out, others take their
    place, in the order of their sources' hash. Pairs of several languages are thus of the same
    sources as far as these are translated.
    """
    assert settings.max_train is not None
    found, dropped = split, Counter[str]()
    while True:
        sampled = _sample(found.train, settings.max_train, settings.salt)
        part = remove_near_duplicates(found._replace(train=sampled), settings.max_cosine)
        dropped.update(part.counts["train_dropped"])
        if len(part.train) == len(sampled):
            counts = {**split.counts, "train_before_filter": len(split.train)}
            left_out = len(found.train) - len(sampled)
            counts["train_dropped"] = {**dropped, "over_the_maximum": left_out}
            return part._replace(counts=counts)
        removed = set(sampled) - set(part.train)
        found = found._replace(train=[pair for pair in found.train if pair not in removed])


def remove_near_duplicates(split: Split, max_cosine: float) -> Split:
    """Remove from the training part what gives a held-out sentence away.

    These are pairs whose source is within ``max_cosine`` of a held-out source, and pairs whose
    target is a held-out target. Removal changes the TF-IDF weights, hence the rounds: on return,
    :func:`nearest_neighbours` of the training part finds nothing that close.
    """
    held_out = [*split.valid, *split.test]
    targets = {pair.target.lower() for pair in held_out}
    train = [pair for pair in split.train if pair.target.lower() not in targets]
    same_target = len(split.train) - len(train)
    queries = list(dict.fromkeys(pair.source for pair in held_out))
    before = len(train)
    while train:
        close = _within(max_cosine, [pair.source for pair in train], queries)
        if not close:
            break
        train = [pair for index, pair in enumerate(train) if index not in close]
    dropped = {"held_out_target": same_target, "near_duplicate": before - len(train)}
    counts = {**split.counts, "train_before_filter": len(split.train), "train_dropped": dropped}
    return Split(train, split.valid, split.test, counts)


def _within(min_cosine: float, train_sources: List[str], queries: List[str]) -> Set[int]:
    """Indices of the training sources at least that close to any query."""
    close: Set[int] = set()
    for _, block in _similarities(train_sources, queries):
        close.update(block.indices[block.data >= min_cosine].tolist())
    return close


def nearest_neighbours(train_sources: Sequence[str], queries: Sequence[str]) -> Tuple[Any, Any]:
    """The most similar training source of each query (the first of equals).

    Memory: about 1 kB for each training sentence.

    Returns:
        ``(indices, cosines)``: int64 [Q], -1 where nothing is shared; float32 [Q].
    """
    import numpy as np

    indices = np.full(len(queries), -1, dtype=np.int64)
    cosines = np.zeros(len(queries), dtype=np.float32)
    for start, block in _similarities(train_sources, queries):
        for row in range(block.shape[0]):
            begin, end = block.indptr[row : row + 2]
            if begin == end:
                continue
            best = begin + block.data[begin:end].argmax()
            indices[start + row] = block.indices[best]
            cosines[start + row] = block.data[best]
    return indices, cosines


def _similarities(
    train_sources: Sequence[str], queries: Sequence[str]
) -> Iterator[Tuple[int, Any]]:
    """Yield ``(first query, cosines)`` for blocks of queries; cosines are CSR [block, S].

    Column indices are sorted within each row, so that ties break by training order.
    """
    import numpy as np
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectoriser = TfidfVectorizer(
        analyzer="char_wb", ngram_range=(4, 4), sublinear_tf=True, dtype=np.float32
    )
    train_by_gram = vectoriser.fit_transform(map(_comparable, train_sources)).T.tocsr()
    vectors = vectoriser.transform(map(_comparable, queries))
    starts = range(0, len(queries), _QUERIES_AT_ONCE)
    for start in tqdm(starts, desc="nearest neighbours", unit="block", leave=False, disable=None):
        block = (vectors[start : start + _QUERIES_AT_ONCE] @ train_by_gram).tocsr()
        block.sort_indices()
        yield start, block


def _comparable(text: str) -> str:
    return _NUMBER.sub("0", text.lower())


class CopyScore(NamedTuple):
    """What copying from the training text scores: the floor for any model's BLEU."""

    bleu: float
    signature: str
    hypotheses: List[str]


class Copies(NamedTuple):
    """For each query the target of its nearest training neighbour, and how near that is.

    Where no neighbour shares anything the target is empty and the cosine 0.
    """

    targets: List[str]
    cosines: List[float]


def copies(train: Sequence[SentencePair], parts: Sequence[Sequence[SentencePair]]) -> List[Copies]:
    """For each part of the held-out pairs, what copying from the training pairs gives."""
    queries = [pair.source for part in parts for pair in part]
    indices, cosines = nearest_neighbours([pair.source for pair in train], queries)
    targets = [train[index].target if index >= 0 else "" for index in indices]
    found = []
    start = 0
    for part in parts:
        end = start + len(part)
        found.append(Copies(targets[start:end], cosines[start:end].tolist()))
        start = end
    return found


def score_copies(copied: Copies, part: Sequence[SentencePair], tokeniser: str) -> CopyScore:
    """SacreBLEU of the copies for a part against its targets."""
    return _sacrebleu(copied.targets, [pair.target for pair in part], tokeniser)


def describe_leak(
    copied: Sequence[Copies],
    parts: Sequence[Sequence[SentencePair]],
    min_cosine: float,
    tokeniser: str,
) -> Dict[str, Any]:
    """How much the held-out pairs have in training: a JSON object.

    ``bleu`` is the copies' over all parts together, ``near`` the share of the pairs that have a
    training neighbour of at least that cosine.
    """
    targets = [target for copy in copied for target in copy.targets]
    cosines = [cosine for copy in copied for cosine in copy.cosines]
    references = [pair.target for part in parts for pair in part]
    near = sum(cosine >= min_cosine for cosine in cosines) / len(cosines)
    bleu = _sacrebleu(targets, references, tokeniser).bleu
    return {"sentences": len(references), "bleu": bleu, "near": round(near, 4)}


def describe_documents(part: Sequence[SentencePair]) -> Dict[str, Dict[str, Any]]:
    """By domain, how many ``documents`` a part is from, and the ``largest`` with its ``pairs``.

    A domain of few documents says little about other text of its kind.
    """
    found: Dict[str, Dict[str, Any]] = {}
    for domain in sorted({pair.domain for pair in part}):
        sizes = Counter(pair.document for pair in part if pair.domain == domain)
        (largest, pairs), *_ = sizes.most_common(1)
        found[domain] = {"documents": len(sizes), "largest": largest, "pairs": pairs}
    return found


def bleu_by_domain(
    copied: Copies, part: Sequence[SentencePair], tokeniser: str
) -> Dict[str, float]:
    """BLEU of the copies for each domain of a part."""
    scores = {}
    for domain in sorted({pair.domain for pair in part}):
        rows = [row for row, pair in enumerate(part) if pair.domain == domain]
        hypotheses = [copied.targets[row] for row in rows]
        references = [part[row].target for row in rows]
        scores[domain] = _sacrebleu(hypotheses, references, tokeniser).bleu
    return scores


def _sacrebleu(hypotheses: List[str], references: List[str], tokeniser: str) -> CopyScore:
    metric = make_bleu(tokeniser)
    bleu = metric.corpus_score(hypotheses, [references]).score
    return CopyScore(round(bleu, 2), str(metric.get_signature()), hypotheses)
