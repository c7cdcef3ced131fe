"""What the experts of a model are worth on a text: their load, and the loss without them."""

import math
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Tuple

import torch
from fairseq import utils
from fairseq.data import data_utils
from torch import Tensor
from torch.nn import functional

from fairseq_sparsemixer.models.layers import SwitchLayer
from fairseq_sparsemixer.models.teacher_forcing import (
    EncodedPair,
    batches,
    decoder_input,
    net_input,
)
from fairseq_sparsemixer.models.watching import watch_routing
from fairseq_sparsemixer.moe import MoEFeedForward
from fairseq_sparsemixer.moe.adaptation import count_tokens

TOKENS_AT_ONCE = 4000
"""Of source and target together, in one forward pass."""


class Usage(NamedTuple):
    """What a layer's router did with a text.

    Attributes:
        shares: (N,) the share of the choices that each expert got.
        gate: the mean over tokens of the sum of their gates.
    """

    shares: Tensor
    gate: float


class TextLoss:
    """The loss of one model, whose layers may be exchanged, on one text.

    Args:
        model: in evaluation mode.
        pairs: sentences and their translations.
        pad, eos: symbols of the target dictionary.
    """

    def __init__(self, model: Any, pairs: List[EncodedPair], pad: int, eos: int) -> None:
        self.model = model
        self._pairs, self._pad, self._eos = pairs, pad, eos

    @torch.no_grad()
    def bits(self) -> float:
        """Cross-entropy of a target token, without label smoothing, in bits as in fairseq's log."""
        total, tokens = 0.0, 0
        for log_probs, target in self._passes():
            loss = functional.nll_loss(log_probs, target, ignore_index=self._pad, reduction="sum")
            total += float(loss)
            tokens += int(target.ne(self._pad).sum())
        return total / tokens / math.log(2)

    @torch.no_grad()
    def usage(self) -> Dict[str, Usage]:
        """What each layer's router does with the text, by the layer's name."""
        counts: Dict[str, Tensor] = {}
        gates: Dict[str, Tensor] = {}
        with watch_routing(self.model) as seen:
            for _ in self._passes():
                for name, routing in seen.items():
                    experts = routing.probs.shape[-1]
                    padding = routing.padding_mask
                    tokens = len(routing.gate) - (0 if padding is None else int(padding.sum()))
                    sums = routing.gate.new_tensor([float(routing.gate.sum()), tokens])
                    counts[name] = counts.get(name, 0) + count_tokens(routing.chosen, experts)
                    gates[name] = gates.get(name, 0) + sums
        return {
            name: Usage(count / count.sum(), float(gates[name][0] / gates[name][1]))
            for name, count in counts.items()
        }

    @torch.no_grad()
    def bits_with(
        self, layer: SwitchLayer, others: Callable[[MoEFeedForward, int], MoEFeedForward]
    ) -> List[float]:
        """(N,) the loss with another mixture in one layer, for each of its experts.

        Args:
            layer: of the model.
            others: what takes the mixture's place, made of it and the number of an expert.
        """
        mixture, losses = layer.moe, []
        try:
            for expert in range(mixture.router.num_experts):
                layer.moe = others(mixture, expert)
                losses.append(self.bits())
        finally:
            layer.moe = mixture
        return losses

    def _passes(self) -> Iterator[Tuple[Tensor, Tensor]]:
        """(T, V) log-probabilities and (T,) targets of batch after batch, padding included."""
        device = next(self.model.parameters()).device
        sizes = [len(pair.source) + len(pair.target) for pair in self._pairs]
        order = sorted(range(len(sizes)), key=sizes.__getitem__)
        for run in batches(sizes, order, TOKENS_AT_ONCE):
            targets = [self._pairs[i].target for i in run]
            previous = [decoder_input(target, self._eos) for target in targets]
            sources = [self._pairs[i].source for i in run]
            inputs = net_input(sources, previous, self._pad, left_pad_source=False)
            output = self.model(**utils.apply_to_sample(lambda each: each.to(device), inputs))
            log_probs = self.model.get_normalized_probs(output, log_probs=True).flatten(0, 1)
            yield log_probs, data_utils.collate_tokens(targets, self._pad).flatten().to(device)
