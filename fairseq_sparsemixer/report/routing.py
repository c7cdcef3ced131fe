"""Runs a model over the test set: which experts take which words and domains, and samples.

What comes out is kept in ``RUN/evaluation/routing.json``, so that the next report needs neither the
model nor its data.
"""

import contextlib
import hashlib
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Sequence

import numpy as np
import torch
from fairseq import utils
from tqdm import tqdm

from fairseq_sparsemixer.comparison.conditions import read_texts
from fairseq_sparsemixer.comparison.results import TestText
from fairseq_sparsemixer.errors import UserError
from fairseq_sparsemixer.evaluation.translator import Translator
from fairseq_sparsemixer.files import read_json, sha256_of, write_json
from fairseq_sparsemixer.models.layers import switch_layers
from fairseq_sparsemixer.models.teacher_forcing import batches, decoder_input, net_input
from fairseq_sparsemixer.models.watching import SentenceChoices, choices_of_batch, watch_routing
from fairseq_sparsemixer.report.specialisation import Information, information, typical_words
from fairseq_sparsemixer.runs.folder import ROUTING, Run

FORMAT = 2
MOST_SENTENCES = 2000
MOST_WORDS = 12
SAMPLES_OF_A_DOMAIN, SAMPLES_WITHOUT_DOMAINS = 2, 6
SAMPLE_WORDS = (4, 20)
"""Least and most words of a sample's source."""
BATCH_TOKENS = 4000
SHUFFLES_OF_WORDS, SHUFFLES_OF_DOMAINS = 20, 100
"""The former vary little: there are far more pieces than sentences."""

_INFORMATION = ({str: float}, None)
_PIECES = ({"layer": str, "pieces": [str], "experts": [[int]]}, None)
_ROUTING = {
    "of": dict,
    "sentences": int,
    "left_out": int,
    "samples": [
        {
            "line": int,
            "domain": (str, None),
            **dict.fromkeys(("source", "reference", "translation"), str),
            **{f"{side}?": _PIECES for side in ("encoder", "decoder")},
        }
    ],
    "layers": {
        str: {
            "num_experts": int,
            "tokens": int,
            "unrouted": float,
            "words": _INFORMATION,
            "domains": _INFORMATION,
            "domain_shares": {str: float},
            "experts": [
                {
                    "share": float,
                    "words": [{"word": str, "count": int, "lift": float}],
                    "domain_shares": {str: float},
                }
            ],
        }
    },
}
"""What the file holds."""


class _Pair(NamedTuple):
    """A line of the test set, and what encoder and decoder read of it (length,)."""

    line: int
    source: torch.Tensor
    target: torch.Tensor


def routing_of_run(run: Run, text: Optional[TestText], problem: str) -> Dict[str, Any]:
    """Which experts a scored run chooses on the test set; from its file, if that is up to date.

    Args:
        run: one that counts.
        text: the test set; not needed where the file is there.
        problem: why there is no ``text``.

    Returns:
        ``sentences`` and ``left_out`` (numbers of lines), ``samples``, and for each layer
        ``num_experts``, ``tokens``, ``unrouted`` (share of tokens without expert), ``words`` and
        ``domains`` (the attributes of :class:`.specialisation.Information`, or None),
        ``domain_shares`` and ``experts``, a list with ``share``, ``words``, ``domain_shares``
        of each. ``layers`` is empty for a dense model.

    Raises:
        UserError: the checkpoint or the test set is not there or was changed.
    """
    path = run.folder / ROUTING
    found = _read(path)
    of = _identity(run, found, text)
    if found.get("of") != of:
        if text is None:
            raise UserError(problem)
        found = {"of": of, **_analyse(run, text)}
        with contextlib.suppress(OSError):  # the runs of others can be read alone
            write_json(path, found)
    return found


def _read(path: Path) -> Dict[str, Any]:
    try:
        return read_json(path, _ROUTING, "") if path.exists() else {}
    except UserError:
        return {}  # it is only a copy


def _identity(run: Run, found: Dict[str, Any], text: Optional[TestText]) -> Dict[str, Any]:
    """What the file's content depends on; labels of domains as they were, if they are gone."""
    data = run.evaluation["data"]
    domains = found.get("of", {}).get("domains_sha256")
    if text is not None:
        domains = None
        if text.domains is not None:
            domains = hashlib.sha256("\n".join(text.domains).encode()).hexdigest()
    return {
        "format": FORMAT,
        "checkpoints": [checkpoint["sha256"] for checkpoint in run.evaluation["checkpoints"]],
        "source_sha256": data["source_sha256"],
        "reference_sha256": data["reference_sha256"],
        "bleu": run.scores["bleu"]["score"],  # of the translations that samples are taken from
        "domains_sha256": domains,
    }


def _analyse(run: Run, text: TestText) -> Dict[str, Any]:
    hypotheses = read_texts([run])[run.folder]
    samples: List[Dict[str, Any]] = [
        {
            "line": line,
            "domain": None if text.domains is None else text.domains[line],
            "source": text.sources[line],
            "reference": text.references[line],
            "translation": hypotheses[line],
        }
        for line in choose_samples(text.sources, text.domains)
    ]
    if run.name == "dense":
        return {"sentences": 0, "left_out": 0, "layers": {}, "samples": samples}
    translator = _load(run, text)
    # Where there are several pairs of languages, they are the domains.
    readers = {"-".join(pair): translator.of_pair(pair) for pair in translator.pairs}

    def encode(line: int, source: str, target: str) -> List[_Pair]:
        domain = "" if text.domains is None else text.domains[line]
        return _encode(readers.get(domain, translator), line, source, target)

    step = max(1, -(-len(text.sources) // MOST_SENTENCES))
    lines = range(0, len(text.sources), step)
    pairs = [pair for n in lines for pair in encode(n, text.sources[n], text.references[n])]
    choices = choose_experts(translator, pairs, run.name)
    layers = {
        name: _describe_layer(
            translator, name, layer.moe.router.num_experts, pairs, choices, text.domains
        )
        for name, layer in switch_layers(translator.model).items()
    }
    for sample in samples:
        own = encode(sample["line"], sample["source"], sample["translation"])
        for pair, choice in zip(own, choose_experts(translator, own)):
            for side in ("encoder", "decoder"):
                sample[side] = _last_layer(translator, side, pair, choice)
    return {
        "sentences": len(pairs),
        "left_out": len(lines) - len(pairs),
        "layers": layers,
        "samples": samples,
    }


def choose_samples(sources: Sequence[str], domains: Optional[Sequence[str]]) -> List[int]:
    """Lines spread evenly over each domain, neither very short nor long; the same for all runs."""
    by_domain: Dict[Optional[str], List[int]] = {}
    for line, source in enumerate(sources):
        if SAMPLE_WORDS[0] <= len(source.split()) <= SAMPLE_WORDS[1]:
            by_domain.setdefault(domains[line] if domains else None, []).append(line)
    most = SAMPLES_OF_A_DOMAIN if domains else SAMPLES_WITHOUT_DOMAINS
    chosen = []
    for lines in by_domain.values():
        count = min(most, len(lines))
        chosen += [lines[len(lines) * (2 * i + 1) // (2 * count)] for i in range(count)]
    return chosen


def _load(run: Run, text: TestText) -> Translator:
    """The model that was scored, the first of an ensemble."""
    checkpoint = run.evaluation["checkpoints"][0]
    beside, written = run.folder / checkpoint["name"], Path(checkpoint.get("path", ""))
    path = beside if beside.is_file() or not written.is_file() else written
    if not path.is_file():
        raise UserError(f"there is no {path}, the checkpoint that was scored; copy it there")
    if sha256_of(path) != checkpoint["sha256"]:
        raise UserError(
            f"{path} is not the checkpoint that {run.scores_path} was scored for; run "
            "`fairseq-sparsemixer evaluate` again"
        )
    data = run.evaluation["data"]
    # The test set is PREPARED_CORPUS/raw/test.en.
    return Translator(
        str(path.parent),
        path.name,
        data=text.source_path.parent.parent,
        source_lang=data.get("source_lang"),
        target_lang=data.get("target_lang"),
    )


def _encode(translator: Translator, line: int, source: str, target: str) -> List[_Pair]:
    """A pair as the model reads it; none of a blank source, or where it is too long for it."""
    longest_target = translator.model.decoder.max_positions()  # type: ignore[operator, union-attr]
    if not source.strip():
        return []
    source_tokens, target_tokens = translator.encode_pair(source, target)
    if len(source_tokens) > translator.max_source_positions or len(target_tokens) > longest_target:
        return []
    read = decoder_input(target_tokens, translator.target_dictionary.eos())
    return [_Pair(line, source_tokens, read)]


@torch.no_grad()
def choose_experts(
    translator: Translator, pairs: Sequence[_Pair], name: str = ""
) -> List[SentenceChoices]:
    """The experts of each pair under teacher forcing; with a progress bar where it has a name."""
    pad = translator.target_dictionary.pad()
    choices: List[SentenceChoices] = [{}] * len(pairs)
    sizes = [len(pair.source) + len(pair.target) for pair in pairs]
    by_size = sorted(range(len(pairs)), key=sizes.__getitem__)
    with tqdm(
        total=len(pairs), desc=f"routing of {name}", unit="line", disable=None if name else True
    ) as bar:
        for batch in batches(sizes, by_size, BATCH_TOKENS):
            sources = [pairs[n].source for n in batch]
            targets = [pairs[n].target for n in batch]
            inputs = utils.apply_to_sample(
                lambda tensor: tensor.to(translator.device),
                net_input(sources, targets, pad, left_pad_source=True),
            )
            with watch_routing(translator.model) as seen:
                translator.model(**inputs)
            for n, choice in zip(batch, choices_of_batch(seen, inputs, pad)):
                choices[n] = choice
            bar.update(len(batch))
    return choices


def _describe_layer(
    translator: Translator,
    name: str,
    num_experts: int,
    pairs: Sequence[_Pair],
    choices: Sequence[SentenceChoices],
    domains: Optional[Sequence[str]],
) -> Dict[str, Any]:
    """One layer's entry of :func:`routing_of_run`."""
    side = _side(name)
    chosen_TK = np.concatenate([choice[name] for choice in choices]).astype(np.int64)
    words_T = np.concatenate([getattr(pair, side).numpy() for pair in pairs])
    labels = sorted(set(domains)) if domains else []
    domain_S = np.array([labels.index(domains[pair.line]) if domains else 0 for pair in pairs])
    choices_S = [int((choice[name] >= 0).sum()) for choice in choices]
    made_TK = chosen_TK >= 0
    experts = chosen_TK[made_TK]  # one entry for each choice, in all that follows
    words, domain = np.repeat(words_T, made_TK.sum(1)), np.repeat(domain_S, choices_S)
    rng = np.random.default_rng(0)
    shuffled_words = (rng.permutation(words) for _ in range(SHUFFLES_OF_WORDS))
    # A sentence has one domain: its choices are no independent samples of it.
    shuffled_domains = (
        np.repeat(rng.permutation(domain_S), choices_S) for _ in range(SHUFFLES_OF_DOMAINS)
    )
    counts = np.bincount(experts, minlength=num_experts)
    dictionary = _dictionary(translator, name)
    return {
        "num_experts": num_experts,
        "tokens": len(words_T),
        "unrouted": float((~made_TK.any(1)).mean()),
        "words": _as_dict(information(experts, words, "experts", shuffled_words)),
        "domains": _as_dict(information(experts, domain, "others", shuffled_domains))
        if labels
        else None,
        "domain_shares": _shares(domain, labels),
        "experts": [
            {
                "share": float(counts[expert] / max(1, counts.sum())),
                "words": [
                    {"word": dictionary[each.word], "count": each.times, "lift": each.lift}
                    for each in typical_words(experts, words, expert, MOST_WORDS)
                ],
                "domain_shares": _shares(domain[experts == expert], labels),
            }
            for expert in range(num_experts)
        ],
    }


def _as_dict(found: Optional[Information]) -> Optional[Dict[str, float]]:
    return None if found is None else found._asdict()


def _shares(domain: np.ndarray, labels: Sequence[str]) -> Dict[str, float]:
    """The share of each domain; empty without any token."""
    if not len(domain):
        return {}
    counts = np.bincount(domain, minlength=len(labels))
    return {label: float(count / len(domain)) for label, count in zip(labels, counts)}


def _side(layer: str) -> str:
    """Which of a pair a layer reads."""
    return "source" if layer.startswith("encoder") else "target"


def _dictionary(translator: Translator, layer: str) -> Any:
    """The dictionary of what a layer reads."""
    part = translator.model.encoder if layer.startswith("encoder") else translator.model.decoder
    return part.dictionary  # type: ignore[union-attr]


def _last_layer(
    translator: Translator, side: str, pair: _Pair, choice: SentenceChoices
) -> Optional[Dict[str, Any]]:
    """Pieces and their experts in the last layer with experts of a side; None without one."""
    names = [name for name in choice if name.startswith(side)]
    if not names:
        return None
    name = max(names, key=lambda name: int(name.split(".")[1]))
    dictionary = _dictionary(translator, name)
    return {
        "layer": name,
        "pieces": [dictionary[token] for token in getattr(pair, _side(name)).tolist()],
        "experts": [[e for e in experts if e >= 0] for experts in choice[name].tolist()],
    }
