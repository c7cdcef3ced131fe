"""fairseq's beam search for models that are laid out (:mod:`.laid_out`), on a CPU.

It finds what :class:`fairseq.sequence_generator.SequenceGenerator` finds. That computes and copies
whole rows of the vocabulary several times in each step; here the few best words of each hypothesis
are looked for, and the bookkeeping is of those alone.
"""

import functools
import math
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

import torch
from fairseq import search
from fairseq.sequence_generator import SequenceGenerator
from torch import Tensor

from fairseq_sparsemixer.models.laid_out import Layout, obstacle

BLOCK = 64
"""The best words of a row are in the blocks, of so many words, with the largest maxima."""
KEPT_SHARE = 7 / 8
"""Finished sentences are dropped once no more than so many are left: that copies the others, and
oneDNN compiles a program for each number of rows."""


def apply() -> None:
    """Let fairseq's generator search in this way where it can."""
    original = SequenceGenerator._generate

    @functools.wraps(original)
    def _generate(
        self: Any,
        sample: Dict[str, Any],
        prefix_tokens: Optional[Tensor] = None,
        constraints: Optional[Tensor] = None,
        bos_token: Optional[int] = None,
    ) -> Any:
        if constraints is None and _is_plain(self, sample, prefix_tokens):
            found = _Search(self, sample, prefix_tokens, bos_token).run()
            if all(found):
                return found
        return original(self, sample, prefix_tokens, constraints, bos_token)

    SequenceGenerator._generate = _generate


def _is_plain(generator: Any, sample: Dict[str, Any], prefix_SP: Optional[Tensor]) -> bool:
    """Whether a search asks for no more than :class:`_Search` does, of models that are laid out."""
    inputs = sample["net_input"]
    words = {generator.eos, generator.pad}
    return (
        type(generator) is SequenceGenerator
        and type(generator.search) is search.BeamSearch
        and generator.lm_model is None
        and generator.repeat_ngram_blocker is None
        and not generator.match_source_len
        and 2 * generator.beam_size < generator.vocab_size
        and inputs.keys() <= {"src_tokens", "src_lengths", "prev_output_tokens"}
        and (prefix_SP is None or words.isdisjoint(prefix_SP.unique().tolist()))
        and all(_is_laid_out(model) for model in generator.model.models)
    )


def _is_laid_out(model: Any) -> bool:
    layout = getattr(model, "layout", None)
    return isinstance(layout, Layout) and not model.training and obstacle(model) is None


class _Node(NamedTuple):
    """The last token of a hypothesis."""

    before: Optional["_Node"]
    token: int
    score: float
    """The log-probability (base e) up to here, a float32; -inf for none."""


class _Sentence:
    """A sentence that is being translated.

    Attributes:
        number: in its batch.
        nodes: its hypotheses.
        found: those that ended, as fairseq puts them out.
    """

    def __init__(self, number: int, first: int, beam: int) -> None:
        self.number = number
        # In the first step all hypotheses are the same.
        self.nodes = [_Node(None, first, -math.inf if i else 0.0) for i in range(beam)]
        self.found: List[Dict[str, Tensor]] = []

    def extend(
        self, eos: int, scores: List[float], words: List[int], parents: List[int]
    ) -> Tuple[List[_Node], List[int]]:
        """Go on with the best candidates.

        Returns:
            Those of them, of the better half, that end; and the hypotheses that others continue.
        """
        beam = len(self.nodes)
        ended: List[_Node] = []
        nodes: List[_Node] = []
        continued: List[int] = []
        for place, (score, word, parent) in enumerate(zip(scores, words, parents)):
            node = _Node(self.nodes[parent], word, score)
            if word == eos and score != -math.inf:
                if place < beam:
                    ended.append(node)
            elif len(nodes) < beam:
                nodes.append(node)
                continued.append(parent)
        while len(nodes) < beam:  # a prefix leaves one
            nodes.append(_Node(self.nodes[0], eos, -math.inf))
            continued.append(0)
        self.nodes = nodes
        return ended, continued


class _Search:
    """The translation of one batch.

    Args:
        generator: fairseq's, for its models and settings.
        sample: S sentences.
        prefix_SP: the first tokens of each translation, none of which ends it.
        first: the token that comes before a translation; None for the end of sentence.
    """

    def __init__(
        self,
        generator: Any,
        sample: Dict[str, Any],
        prefix_SP: Optional[Tensor],
        first: Optional[int],
    ) -> None:
        self.options = generator
        self.beam = generator.beam_size
        tokens_ST = sample["net_input"]["src_tokens"]
        self.prefix_SP = tokens_ST[:, :0] if prefix_SP is None else prefix_SP
        self.longest = min(
            int(generator.max_len_a * tokens_ST.shape[1] + generator.max_len_b),
            generator.max_len - 1,
        )
        assert generator.min_len <= self.longest, "--min-len is more than --max-len-b allows"
        first = generator.eos if first is None else first
        self.sentences = [_Sentence(i, first, self.beam) for i in range(len(tokens_ST))]
        models = generator.model.models
        self.hypotheses = [model.layout.of(model).read(tokens_ST, self.beam) for model in models]

    def run(self) -> List[List[Dict[str, Tensor]]]:
        """For each sentence its translations, the best first."""
        everyone, rows = self.sentences, self.sentences
        for step in range(self.longest + 1):
            scores, words, parents = self._candidates(rows, step)
            continued = []
            for sentence, *own in zip(rows, scores, words, parents):
                ended, followed = sentence.extend(self.options.eos, *own)
                continued.append(followed)
                for node in ended[: self.beam - len(sentence.found)]:
                    sentence.found.append(self._finished(node, step))
            going_on = [i for i, one in enumerate(rows) if len(one.found) < self.beam]
            if not going_on or step == self.longest:
                break
            parents_SB = torch.tensor(continued)
            for hypotheses in self.hypotheses:
                hypotheses.follow(parents_SB)
            if len(going_on) <= KEPT_SHARE * len(rows):
                rows = [rows[i] for i in going_on]
                kept = torch.tensor(going_on)
                for hypotheses in self.hypotheses:
                    hypotheses.keep(kept)
        return [sorted(s.found, key=lambda one: -float(one["score"])) for s in everyone]

    @torch.inference_mode()
    def _candidates(self, rows: List[_Sentence], step: int) -> Sequence[List[Any]]:
        """For each sentence the scores, words and hypotheses of 2 B continuations, best first."""
        tokens_R = torch.tensor([node.token for one in rows for node in one.nodes])
        scores_R = torch.tensor([node.score for one in rows for node in one.nodes])
        scores_RK, words_RK = self._best_words(rows, tokens_R, step)
        scores_RK = scores_RK.add_(scores_R.unsqueeze(-1))
        count = scores_RK.shape[-1]
        scores_SC, places_SC = scores_RK.view(len(rows), -1).topk(min(2, count) * self.beam)
        words_SC = words_RK.view(len(rows), -1).gather(1, places_SC)
        parents_SC = places_SC.div(count, rounding_mode="trunc")
        return scores_SC.tolist(), words_SC.tolist(), parents_SC.tolist()

    def _best_words(
        self, rows: List[_Sentence], tokens_R: Tensor, step: int
    ) -> Tuple[Tensor, Tensor]:
        """(R, K) log-probabilities and words: the 2 B best of each hypothesis, or the prefix's."""
        options = self.options
        each = [hypotheses.step(tokens_R) for hypotheses in self.hypotheses]
        if options.temperature != 1:
            each = [logits.div_(options.temperature) for logits in each]
        each = [logits.log_softmax(dim=-1) for logits in each]
        scores_RV = each[0]
        if len(each) > 1:  # the mean of the probabilities
            scores_RV = torch.stack(each).logsumexp(dim=0).sub_(math.log(len(each)))
        scores_RV[:, options.pad] = -math.inf
        scores_RV[:, options.unk] -= options.unk_penalty
        if step >= self.longest:
            best = torch.full_like(tokens_R, options.eos).unsqueeze(-1)
        elif step < self.prefix_SP.shape[1]:
            numbers = [one.number for one in rows]
            best = self.prefix_SP[numbers, step].repeat_interleave(self.beam).unsqueeze(-1)
        else:
            if step < options.min_len:
                scores_RV[:, options.eos] = -math.inf
            if options.token_indices_to_suppress is not None:
                scores_RV[:, options.token_indices_to_suppress] = -math.inf
            best = _largest(scores_RV, 2 * self.beam)
        scores_RK = scores_RV.gather(1, best)
        return scores_RK.nan_to_num_(nan=-math.inf, neginf=-math.inf), best

    def _finished(self, last: _Node, step: int) -> Dict[str, Tensor]:
        """A hypothesis as fairseq puts it out."""
        tokens, sums = [], []
        node = last
        while node.before is not None:
            tokens.append(node.token)
            sums.append(node.score)
            node = node.before
        sums_L = torch.tensor(sums[::-1])
        score = sums_L[-1].clone()
        if self.options.normalize_scores:
            score /= (step + 1) ** self.options.len_penalty
        return {
            "tokens": torch.tensor(tokens[::-1]),
            "score": score,
            "attention": torch.empty(0),
            "alignment": torch.empty(0),
            "positional_scores": sums_L.diff(prepend=sums_L.new_zeros(1)),
        }


def _largest(values_RV: Tensor, count: int) -> Tensor:
    """(R, count) int64: the places of the largest of each row, in no order."""
    rows, width = values_RV.shape
    blocks = width // BLOCK
    if blocks <= 2 * count:
        return values_RV.topk(count, sorted=False).indices
    whole = values_RV[:, : blocks * BLOCK].view(rows, blocks, BLOCK)
    first = whole.amax(dim=-1).topk(count, sorted=False).indices.unsqueeze(-1) * BLOCK
    places = (first + torch.arange(BLOCK)).view(rows, -1)
    rest = torch.arange(blocks * BLOCK, width).expand(rows, -1)
    places = torch.cat([places, rest], dim=-1)
    return places.gather(1, values_RV.gather(1, places).topk(count, sorted=False).indices)
