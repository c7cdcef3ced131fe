"""What a point (:mod:`fairseq_sparsemixer.runs.points`) holds, measured on the validation set.

Shape suffixes: B sentences of a batch, L their length, T tokens, K choices of a token, N experts.
"""

import contextlib
import math
from typing import Any, Dict, Iterator, List, Mapping, NamedTuple, Optional, Sequence

import numpy as np
import torch
from torch import nn

from fairseq_sparsemixer.models.watching import SentenceChoices, choices_of_batch, watch_routing
from fairseq_sparsemixer.runs.logs import by_layer
from fairseq_sparsemixer.runs.points import number


class Sentence(NamedTuple):
    """What the model does with one sample of the validation set under teacher forcing."""

    nll: float
    """Nats, of the whole target; 0 where that was not asked for."""
    tokens: int
    """Of the target, end of sentence included; 0 likewise."""
    choices: SentenceChoices


Sentences = Dict[int, Sentence]
"""By number of the line, from 0."""


@contextlib.contextmanager
def observe(
    model: nn.Module, sample: Dict[str, Any], pad: int, losses: bool
) -> Iterator[Sentences]:
    """The sentences of ``sample``, filled in when the block has run ``model`` on them.

    Args:
        model: called in the block, in evaluation mode and without gradient.
        sample: a batch of the validation set: ``id``, ``net_input`` and ``target``.
        pad: symbol of padding.
        losses: whether to tell those of each sentence, by the probability of each target token.
    """
    outputs: List[Any] = []
    sentences: Sentences = {}
    with watch_routing(model) as seen:
        # At its end: in the same block --eval-bleu may translate with its layers.
        handle = model.register_forward_hook(
            lambda _, __, output: outputs.append((output, dict(seen)))
        )
        try:
            yield sentences
        finally:
            handle.remove()
    output, routings = outputs[-1]
    lines = sample["id"].tolist()
    nll_B, tokens_B = [0.0] * len(lines), [0] * len(lines)
    if losses:
        target_BL = sample["target"]
        log_probs = model.get_normalized_probs(output, log_probs=True)  # type: ignore[operator]
        kept_BL = target_BL.ne(pad)
        nll_BL = -log_probs.gather(-1, target_BL.unsqueeze(-1)).squeeze(-1)
        nll_B = nll_BL.masked_fill(~kept_BL, 0.0).sum(-1).tolist()
        tokens_B = kept_BL.sum(-1).tolist()
    choices_B = choices_of_batch(routings, sample["net_input"], pad)
    sentences.update(zip(lines, map(Sentence, nll_B, tokens_B, choices_B)))


def is_first_worker() -> bool:
    """Whether this is the one that writes."""
    return _workers() == 1 or torch.distributed.get_rank() == 0


def _workers() -> int:
    """How many processes train together."""
    started = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if started else 1


def all_workers(sentences: Sentences) -> Sentences:
    """The sentences of all workers, by ascending line. Every worker has to call it."""
    parts: List[Sentences] = [{}] * _workers()
    if len(parts) > 1:
        torch.distributed.all_gather_object(parts, sentences)
    else:
        parts = [sentences]
    whole = {line: sentence for part in parts for line, sentence in part.items()}
    return dict(sorted(whole.items()))


def layer_figures(
    sentences: Sentences,
    domains: Optional[Sequence[str]],
    num_experts: Mapping[str, int],
    stats: Mapping[str, float],
    before: Mapping[str, np.ndarray],
) -> Dict[str, Any]:
    """A point's ``layers``: for each layer ``load``, ``entropy``, ``drift``, ``load_by_domain``.

    Args:
        sentences: of the validation set.
        domains: of each line; None where there are none, and then no ``load_by_domain``.
        num_experts: of each layer.
        stats: of the validation, for the entropy.
        before: :func:`flat_choices` of the point before, or nothing.
    """
    entropy = by_layer(dict(stats), "router_entropy")
    now = flat_choices(sentences)
    figures: Dict[str, Dict[str, Any]] = {}
    for layer, experts in num_experts.items():
        figures[layer] = {
            "load": _shares(now[layer], experts),
            "entropy": number(entropy.get(layer)),
            "drift": _drift(before[layer], now[layer]) if layer in before else None,
        }
        if domains is not None:
            figures[layer]["load_by_domain"] = {
                domain: _shares(
                    np.concatenate([sentences[line].choices[layer] for line in lines]), experts
                )
                for domain, lines in _lines_by_domain(sentences, domains).items()
            }
    return figures


def flat_choices(sentences: Sentences) -> Dict[str, np.ndarray]:
    """The choices (tokens, K) of each layer over all sentences, in their order."""
    layers = next(iter(sentences.values())).choices if sentences else {}
    return {
        layer: np.concatenate([sentence.choices[layer] for sentence in sentences.values()])
        for layer in layers
    }


def _shares(choices_TK: np.ndarray, num_experts: int) -> List[float]:
    """(N,) each expert's share of the choices that were made."""
    counts_N = np.bincount(choices_TK[choices_TK >= 0], minlength=num_experts)
    return (counts_N / max(1, counts_N.sum())).round(6).tolist()


def _drift(before_TK: np.ndarray, now_TK: np.ndarray) -> Optional[float]:
    """The share of the choices now that the same token did not make before."""
    if len(before_TK) != len(now_TK):
        return None  # of another validation set
    kept_TK = (now_TK[:, :, None] == before_TK[:, None, :]).any(-1)
    made_TK = now_TK >= 0
    return round(1 - float((kept_TK & made_TK).sum() / max(1, made_TK.sum())), 6)


def _lines_by_domain(lines: Mapping[int, Any], domains: Sequence[str]) -> Dict[str, List[int]]:
    """The lines of each domain, both in order."""
    return {
        domain: [line for line in lines if domains[line] == domain]
        for domain in sorted({domains[line] for line in lines})
    }


def domain_losses(sentences: Sentences, domains: Sequence[str]) -> Dict[str, Dict[str, Any]]:
    """``nll_loss`` (bits a token) and ``tokens`` of each domain."""
    figures = {}
    for domain, lines in _lines_by_domain(sentences, domains).items():
        tokens = sum(sentences[line].tokens for line in lines)
        nll = sum(sentences[line].nll for line in lines)
        bits = number(round(nll / tokens / math.log(2), 4))
        figures[domain] = {"nll_loss": bits, "tokens": tokens}
    return figures


def choose_lines(count: int, sentences: Sentences, domains: Optional[Sequence[str]]) -> List[int]:
    """``count`` lines of ``sentences``, shared out among domains (one at least), evenly spread."""
    by_domain = {"": list(sentences)}
    if domains is not None:
        by_domain = _lines_by_domain(sentences, domains)
    share = max(1, count // max(1, len(by_domain)))
    chosen = []
    for lines in by_domain.values():
        taken = min(share, len(lines))
        chosen += [lines[i * len(lines) // taken] for i in range(taken)]
    return sorted(chosen)


def translation_figures(
    hypotheses: Mapping[int, str],
    references: Sequence[str],
    domains: Optional[Sequence[str]],
    tokeniser: str,
) -> Dict[str, Any]:
    """``bleu``, ``chrf``, ``sentences``, ``signatures``, and the first three ``by_domain``.

    Args:
        hypotheses: detokenised text by line.
        references, domains: of each line of the validation set.
        tokeniser: of BLEU, see :func:`.text.bleu.find_tokeniser`.
    """
    from fairseq_sparsemixer.evaluation import scoring

    def score(lines: Sequence[int]) -> Dict[str, Any]:
        return scoring.score(
            [hypotheses[n] for n in lines], [references[n] for n in lines], tokeniser
        )

    whole = score(list(hypotheses))
    figures: Dict[str, Any] = {**_short(whole), "sentences": len(hypotheses)}
    figures["signatures"] = {metric: whole[metric]["signature"] for metric in whole}
    if domains is not None:
        figures["by_domain"] = {
            domain: {**_short(score(lines)), "sentences": len(lines)}
            for domain, lines in _lines_by_domain(hypotheses, domains).items()
        }
    return figures


def _short(scores: Mapping[str, Any]) -> Dict[str, float]:
    """The numbers of :func:`.scoring.score` alone."""
    return {metric: round(scores[metric]["score"], 4) for metric in scores}


def scalars(point: Mapping[str, Any]) -> Dict[str, float]:
    """The numbers of a point that fairseq's log of the validation has not, under flat names.

    Points of earlier versions come here, too: a key that is newer than ``drift`` may be missing.
    """
    found = {key: point[key] for key in ("bleu", "chrf", "bits_per_byte") if key in point}
    for domain, figures in point.get("by_domain", {}).items():
        for key in figures.keys() - {"tokens", "sentences"}:
            found[f"{key}/{domain}"] = figures[key]
    for layer, figures in point["layers"].items():
        found[f"drift/{layer}"] = figures["drift"]
        for expert, share in enumerate(figures["load"]):
            found[f"load/{layer}/{expert}"] = share
    return {key: value for key, value in found.items() if value is not None}
