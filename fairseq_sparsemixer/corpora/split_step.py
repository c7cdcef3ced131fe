"""The step that divides pairs into train, valid and test, and what the record says of them."""

from collections import Counter
from pathlib import Path
from typing import Any, Dict, List, Sequence

from fairseq_sparsemixer.corpora import splitting
from fairseq_sparsemixer.corpora.cleaning import SentencePair
from fairseq_sparsemixer.corpora.folder import (
    SPLITS,
    Languages,
    copy_path,
    domain_path,
    raw_path,
    read_pairs,
    sides_of,
)
from fairseq_sparsemixer.corpora.resumable import StepResult, Steps
from fairseq_sparsemixer.errors import UserError
from fairseq_sparsemixer.files import write_lines
from fairseq_sparsemixer.text.bleu import find_tokeniser
from fairseq_sparsemixer.version import __version__


def split_step(
    steps: Steps, pairs_path: Path, languages: Languages, settings: splitting.SplitSettings
) -> Dict[str, Any]:
    """Split the pairs of a file (see :func:`.folder.write_pairs`) into ``raw/``.

    Where they are of several domains, ``raw/`` also says of which, and the result how many are of
    each and how much each measure against leaks does.

    Raises:
        UserError: see :func:`.splitting.hold_out`.
    """
    folder = steps.folder
    tokeniser = find_tokeniser(languages[1])

    def build() -> StepResult:
        pairs = read_pairs(pairs_path)
        unfiltered = splitting.hold_out(pairs, settings)
        split = splitting.remove_near_duplicates(unfiltered, settings.max_cosine)
        outputs = _write_split(folder, split, languages)
        parts = [getattr(split, name) for name in SPLITS[1:]]
        before = splitting.copies(unfiltered.train, parts)
        after = splitting.copies(split.train, parts)
        scores = {
            name: splitting.score_copies(copied, part, tokeniser)
            for name, copied, part in zip(SPLITS[1:], after, parts)
        }
        described = describe_scores(scores)
        for name, copied, part in zip(SPLITS[1:], before, parts):
            score = splitting.score_copies(copied, part, tokeniser)
            described[name]["bleu_before_filter"] = score.bleu
        copied_path = copy_path(folder, languages)
        write_lines(copied_path, scores["test"].hypotheses)
        result = {
            "counts": split.counts,
            "copy_score": described,
            "versions": split_versions(),
        }
        if any(pair.domain for pair in pairs):
            domains = {name: [pair.domain for pair in getattr(split, name)] for name in SPLITS}
            outputs += write_domains(folder, domains)
            result["domains"] = count_domains(domains)
            result["held_out_documents"] = {
                name: splitting.describe_documents(getattr(split, name)) for name in SPLITS[1:]
            }
            random = splitting.random_split(pairs, split, settings)
            measures = {
                "random": (splitting.copies(random.train, [random.test]), [random.test]),
                "documents": (before, parts),
                "documents_and_filter": (after, parts),
            }
            result["leaks"] = {
                name: splitting.describe_leak(*measured, settings.max_cosine, tokeniser)
                for name, measured in measures.items()
            }
            result["copy_bleu_by_domain"] = splitting.bleu_by_domain(
                after[1], split.test, tokeniser
            )
        return [*outputs, copied_path], result

    made_with = {"version": __version__, **settings.describe()}
    return steps.run("split", made_with, [pairs_path], build)


def split_languages_step(
    steps: Steps, pairs_path: Path, pairs: Sequence[str], settings: splitting.SplitSettings
) -> Dict[str, Any]:
    """Split the pairs of a file, whose domains are pairs of languages, into ``raw/``.

    A document is in the same part for all languages, and no training text of any of them is a near
    duplicate of what is held out of another.

    Args:
        pairs: of languages, such as ``en-de``.

    Raises:
        UserError: see :func:`.splitting.hold_out`; or nothing is held out of a pair.
    """
    folder = steps.folder
    tokenisers = {pair: find_tokeniser(pair.split("-")[1]) for pair in pairs}

    def build() -> StepResult:
        unfiltered = splitting.hold_out(read_pairs(pairs_path), settings)
        split = splitting.fill_training_part(unfiltered, settings)
        outputs: List[Path] = []
        scores: Dict[str, Any] = {}
        for pair in pairs:
            part = split.of_domain(pair)
            if not all(part[:3]):
                raise UserError(
                    f"--languages {pair.split('-')[1]}: too few descriptions are translated into "
                    "it to have training, validation and test text; leave it out"
                )
            outputs += _write_split(folder, part, sides_of(pair))
            held_out = dict(zip(SPLITS[1:], (part.valid, part.test)))
            copied = splitting.copies(part.train, list(held_out.values()))
            found = {
                name: splitting.score_copies(copies, held_out[name], tokenisers[pair])
                for name, copies in zip(held_out, copied)
            }
            outputs.append(copy_path(folder, sides_of(pair)))
            write_lines(outputs[-1], found["test"].hypotheses)
            described = describe_scores(found)
            scores.update({f"{name}.{pair}": score for name, score in described.items()})
        documents = {
            name: splitting.describe_documents(getattr(split, name)) for name in SPLITS[1:]
        }
        return outputs, {
            "counts": split.counts,
            "copy_score": scores,
            "held_out_documents": documents,
            "versions": split_versions(),
        }

    made_with = {"version": __version__, "pairs": list(pairs), **settings.describe()}
    return steps.run("split", made_with, [pairs_path], build)


def _write_split(folder: Path, split: splitting.Split, languages: Languages) -> List[Path]:
    outputs = []
    for name in SPLITS:
        pairs: Sequence[SentencePair] = getattr(split, name)
        for side, language in enumerate(languages):
            path = raw_path(folder, name, language)
            write_lines(path, (pair[side] for pair in pairs))
            outputs.append(path)
    return outputs


def write_domains(folder: Path, domains: Dict[str, List[str]]) -> List[Path]:
    """Write the domains of each split's lines; the paths."""
    outputs = [domain_path(folder, split) for split in SPLITS]
    for split, path in zip(SPLITS, outputs):
        write_lines(path, domains[split])
    return outputs


def count_domains(domains: Dict[str, List[str]]) -> Dict[str, Dict[str, int]]:
    """How many lines of each split are of each domain."""
    return {split: dict(sorted(Counter(labels).items())) for split, labels in domains.items()}


def describe_scores(scores: Dict[str, splitting.CopyScore]) -> Dict[str, Dict[str, Any]]:
    """What the record says of the copy scores of splits."""
    return {
        name: {"bleu": score.bleu, "signature": score.signature} for name, score in scores.items()
    }


def split_versions() -> Dict[str, str]:
    """Of the packages that copy scores depend on."""
    import sacrebleu
    import sklearn

    return {"sacrebleu": sacrebleu.__version__, "scikit-learn": sklearn.__version__}
