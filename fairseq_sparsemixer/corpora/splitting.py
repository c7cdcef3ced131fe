"""Train, valid and test text that share no document and no near duplicates; and how much they do.

Similarity is the cosine of TF-IDF vectors over character 4-grams within words, with numbers made
equal. Shapes: S training sentences, Q queries.
"""

import hashlib
import re
from collections import Counter
from dataclasses import dataclass
from typing import Any, Dict, Iterator, List, NamedTuple, Sequence, Set, Tuple

from fairseq_sparsemixer.corpora.cleaning import Pair, tokens

_QUERIES_AT_ONCE = 256
_NUMBER = re.compile(r"\d+")


@dataclass(frozen=True)
class SplitSettings:
    """How a corpus is divided."""

    held_out_share: float  # of the documents
    salt: str  # another salt holds out other documents
    min_held_out_tokens: int  # shorter sources say little about a translation model
    max_cosine: float  # training pairs this close to a held-out source are removed


class Split(NamedTuple):
    """The parts of a corpus, and counts of what was left out."""

    train: List[Pair]
    valid: List[Pair]
    test: List[Pair]
    counts: Dict[str, Any]


def stable_fraction(text: str) -> float:
    """A number in [0, 1) that depends on nothing but the text (Python's ``hash`` is salted)."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8")).digest()[:8], "big") / 2**64


def hold_out(pairs: Sequence[Pair], settings: SplitSettings) -> Split:
    """Split by document: whole documents are held out, half of them for valid, half for test.

    Held-out sources are unique, and no sentence of either language is in both valid and test.
    Training pairs are not yet filtered: see :func:`remove_near_duplicates`.

    Raises:
        ValueError: the settings leave valid or test without a sentence.
    """
    documents = sorted({pair.document for pair in pairs})
    held_out = {
        document
        for document in documents
        if stable_fraction(f"{settings.salt}/{document}") < settings.held_out_share
    }
    dropped: Counter = Counter()
    candidates = []
    sources: Set[str] = set()
    for pair in pairs:
        if pair.document not in held_out:
            continue
        if len(tokens(pair.source)) < settings.min_held_out_tokens:
            dropped["too_short"] += 1
        elif pair.source.lower() in sources:
            dropped["duplicate_source"] += 1
        else:
            sources.add(pair.source.lower())
            candidates.append(pair)
    valid_documents = _half(candidates, settings.salt)
    valid = [pair for pair in candidates if pair.document in valid_documents]
    test = [pair for pair in candidates if pair.document not in valid_documents]
    valid_targets = {pair.target.lower() for pair in valid}
    kept_test = [pair for pair in test if pair.target.lower() not in valid_targets]
    dropped["target_also_in_valid"] = len(test) - len(kept_test)
    if not valid or not kept_test:
        raise ValueError(f"{len(held_out)} of {len(documents)} documents held out: too few")
    counts = {
        "documents": len(documents),
        "documents_held_out": len(held_out),
        "held_out_dropped": dict(sorted(dropped.items())),
        "held_out": len(valid) + len(kept_test),
    }
    train = [pair for pair in pairs if pair.document not in held_out]
    return Split(train, valid, kept_test, counts)


def _half(pairs: Sequence[Pair], salt: str) -> Set[str]:
    """Documents with about half of the pairs: in hashed order, each goes to the smaller half."""
    sizes = Counter(pair.document for pair in pairs)
    first: Set[str] = set()
    balance = 0
    for document in sorted(sizes, key=lambda name: stable_fraction(f"{salt}/half/{name}")):
        if balance <= 0:
            first.add(document)
            balance += sizes[document]
        else:
            balance -= sizes[document]
    return first


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
    queries = [pair.source for pair in held_out]
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
    from tqdm import tqdm

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


def copy_score(
    train_sources: Sequence[str],
    train_targets: Sequence[str],
    sources: Sequence[str],
    references: Sequence[str],
) -> CopyScore:
    """SacreBLEU of "translating" each source by its nearest training neighbour's target.

    Where no neighbour shares anything the hypothesis is empty.
    """
    from sacrebleu.metrics import BLEU

    indices, _ = nearest_neighbours(train_sources, sources)
    hypotheses = [train_targets[index] if index >= 0 else "" for index in indices]
    metric = BLEU()
    bleu = metric.corpus_score(hypotheses, [list(references)]).score
    return CopyScore(round(bleu, 2), str(metric.get_signature()), hypotheses)
