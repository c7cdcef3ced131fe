"""Problems made of a trained model: one token's routing in one layer, on real sentences.

f(h) is the label-smoothed loss of the token's sentence, in nats, as a function of what the layer
puts out at that token. All else is held fixed: dropout is off, and every other token, in this layer
and in the others, stays with the experts that evaluation gives it (their gates may move), so that f
has no jumps that belong to somebody else's choice. Everything runs on the CPU.
"""

import dataclasses
from typing import Any, Dict, Iterable, Iterator, List, NamedTuple, Tuple

import torch
from fairseq.criterions.label_smoothed_cross_entropy import label_smoothed_nll_loss
from fairseq.data import data_utils
from fairseq.modules.checkpoint_activations import unwrap_checkpoint
from torch import Tensor, nn
from torch.nn import functional

from fairseq_sparsemixer.laboratory.problems import Loss, Problem
from fairseq_sparsemixer.models.layers import SwitchLayer, switch_layers
from fairseq_sparsemixer.models.teacher_forcing import (
    EncodedPair,
    batches,
    decoder_input,
    net_input,
)
from fairseq_sparsemixer.models.watching import watch_routing
from fairseq_sparsemixer.moe import MoEFeedForward, Router, Routing
from fairseq_sparsemixer.moe.adaptation import ExpertLines, ExpertMeans

TOKENS_AT_ONCE = 4000
"""Of source and target together, in one forward pass."""
SMOOTHING = 0.1


class Place(NamedTuple):
    """A token: which sentence, and its position on the layer's side."""

    sentence: int
    position: int


def draw_places(
    pairs: List[EncodedPair], side: str, count: int, generator: torch.Generator
) -> List[Place]:
    """``count`` tokens of one side ("encoder", "decoder"), drawn without replacement."""
    places = [
        Place(i, position)
        for i, pair in enumerate(pairs)
        for position in range(len(pair.source if side == "encoder" else pair.target))
    ]
    order = torch.randperm(len(places), generator=generator)[:count]
    return [places[i] for i in sorted(order.tolist())]


class _Choice(NamedTuple):
    """Of one sentence in one layer: experts (length, 1) and which were reachable (length, N)."""

    expert: Tensor
    reachable: Tensor

    def of_length(self, length: int) -> "_Choice":
        """Cut, or filled up with padding."""
        missing = max(length - len(self.expert), 0)
        return _Choice(
            functional.pad(self.expert[:length], (0, 0, 0, missing), value=-1),
            functional.pad(self.reachable[:length], (0, 0, 0, missing), value=True),
        )


class Sentences:
    """Forward passes of one model over pairs of sentences.

    Args:
        model: a Switch Transformer in evaluation mode; its parameters lose their gradient.
        pairs: the sentences.
        pad, eos: symbols of the target dictionary.
    """

    def __init__(self, model: Any, pairs: List[EncodedPair], pad: int, eos: int) -> None:
        self.model = unwrap_checkpoint(model.cpu())
        model.eval()
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        self.pairs = pairs
        self.sizes = [sum(map(len, pair)) for pair in pairs]
        self.pad, self.eos = pad, eos
        self._choices: Dict[str, List[_Choice]] = {}
        self._record_choices()

    def _record_choices(self) -> None:
        """Note which experts evaluation gives every token, in every layer."""
        with watch_routing(self.model) as seen, torch.no_grad():
            for run in self.batches(range(len(self.pairs))):
                self._run(run)
                for name, routing in seen.items():
                    by_token = _Choice(routing.expert_index, routing.sampling_probs > 0)
                    # (length x batch, ...) to one (length, ...) for each sentence
                    columns = [value.unflatten(0, (-1, len(run))) for value in by_token]
                    self._choices.setdefault(name, []).extend(
                        _Choice(*(value[:, column] for value in columns))
                        for column in range(len(run))
                    )

    def read_by(self, side: str, number: int) -> Tensor:
        """(length,) what the encoder, or the decoder under teacher forcing, reads."""
        pair = self.pairs[number]
        if side == "encoder":
            return pair.source
        return decoder_input(pair.target, self.eos)

    def losses(self, numbers: List[int]) -> Tensor:
        """(len(numbers),) the label-smoothed loss of each sentence, summed over its target.

        With the experts that were recorded, whatever has become of the logits.
        """
        handles = [
            layer.moe.router.register_forward_hook(self._hold_choices(name, numbers))
            for name, layer in switch_layers(self.model).items()
        ]
        try:
            return self._run(numbers)
        finally:
            for handle in handles:
                handle.remove()

    def _hold_choices(self, name: str, numbers: List[int]) -> Any:
        """A hook that puts the recorded experts into a router's answer; gates stay functions."""
        choices = [self._choices[name][number] for number in numbers]

        def hook(router: Router, _: Tuple, routing: Routing) -> Routing:
            length = len(routing.logits) // len(numbers)
            index, reachable = (
                torch.stack(values, dim=1).flatten(0, 1)
                for values in zip(*(choice.of_length(length) for choice in choices))
            )
            logits = routing.logits
            if getattr(router, "gate", None) != "full":
                logits = logits.masked_fill(~reachable, float("-inf"))
            probs = (logits / router.temperature).softmax(dim=-1)
            gate = probs.gather(-1, index.clamp_min(0)).masked_fill(index < 0, 0.0)
            return dataclasses.replace(routing, expert_index=index, gate=gate)

        return hook

    def _run(self, numbers: List[int]) -> Tensor:
        sources, previous = (
            [self.read_by(side, i) for i in numbers] for side in ("encoder", "decoder")
        )
        inputs = net_input(sources, previous, self.pad, left_pad_source=False)
        log_probs = self.model.get_normalized_probs(self.model(**inputs), log_probs=True)
        target = data_utils.collate_tokens([self.pairs[i].target for i in numbers], self.pad)
        loss, _ = label_smoothed_nll_loss(
            log_probs.flatten(0, 1), target.flatten(), SMOOTHING, self.pad, reduce=False
        )
        return loss.view(target.shape).sum(-1)

    def batches(self, numbers: Iterable[int]) -> Iterator[List[int]]:
        """``numbers`` cut into runs of at most :data:`TOKENS_AT_ONCE` tokens."""
        return batches(self.sizes, numbers, TOKENS_AT_ONCE)


class _Seen(NamedTuple):
    """What passed through a layer: inputs (T, D), chosen experts (T,) and vocabulary ids (T,)."""

    inputs: Tensor
    expert: Tensor
    token_ids: Tensor


def _watch(sentences: Sentences, layer: SwitchLayer) -> List[_Seen]:
    """For each sentence what the layer saw of it."""
    captured: List[Tuple[Tensor, Tensor]] = []

    def hook(_: nn.Module, args: Tuple, output: Tuple) -> None:
        captured.append((args[0].detach(), output[1].expert_index[:, 0]))

    side = layer.layer_name.split(".")[0]
    handle = layer.moe.register_forward_hook(hook)
    seen: List[_Seen] = []
    try:
        with torch.no_grad():
            for run in sentences.batches(range(len(sentences.pairs))):
                sentences.losses(run)
                inputs, expert = captured.pop()
                expert = expert.view(inputs.shape[:2])
                for column, number in enumerate(run):
                    ids = sentences.read_by(side, number)
                    rows = slice(len(ids))
                    seen.append(_Seen(inputs[rows, column], expert[rows, column], ids))
    finally:
        handle.remove()
    return seen


@torch.no_grad()
def _all_outputs(moe: MoEFeedForward, x_RD: Tensor) -> Tensor:
    """(R, N, D): omega E_i(x) of every expert for every token."""
    rows, experts = len(x_RD), moe.router.num_experts
    outputs = moe.experts(x_RD.repeat(experts, 1), [rows] * experts)
    outputs = outputs.view(experts, rows, -1).transpose(0, 1)
    return outputs if moe.router.output_scale is None else outputs * moe.router.output_scale


@torch.no_grad()
def fit_predictions(
    moe: MoEFeedForward, fit: List[_Seen], inputs_RD: Tensor, token_ids_R: Tensor
) -> Dict[str, Tensor]:
    """What training could know of E_i(x) where E_i was not computed, by name: (R, N, D).

    Each is fitted on the tokens that expert i got: "mean" and "linear" as ``sparsemixer-cv`` does;
    "token mean" is the mean over the same vocabulary entry, where it occurred.
    """
    x = torch.cat([seen.inputs for seen in fit])
    expert = torch.cat([seen.expert for seen in fit])
    ids = torch.cat([seen.token_ids for seen in fit])
    own = _all_outputs(moe, x)[torch.arange(len(x)), expert]
    num_experts, embed_dim = moe.router.num_experts, moe.embed_dim
    means = ExpertMeans(num_experts, embed_dim, decay=0.0)
    means.observe(x, expert, own)
    means.end_update()
    lines = ExpertLines(num_experts, embed_dim, decay=0.0)
    lines.observe(x, expert, own)
    lines.end_update()
    lines.solve()
    by_token = means.predict(inputs_RD).clone()
    for row, token in enumerate(token_ids_R.tolist()):
        for i in range(num_experts):
            same = (ids == token) & (expert == i)
            if same.any():
                by_token[row, i] = own[same].mean(0)
    return {
        "mean": means.predict(inputs_RD),
        "token mean": by_token,
        "linear": lines.predict(inputs_RD),
    }


def build_problem(
    sentences: Sentences, fit: Sentences, layer: SwitchLayer, places: List[Place]
) -> Problem:
    """The routing of some tokens in one layer, whose gates multiply one expert's output each.

    Args:
        sentences: those that the tokens are in.
        fit: other sentences, for the predictions.
        layer: of ``sentences.model``.
        places: the tokens.
    """
    moe = layer.moe
    seen = _watch(sentences, layer)
    inputs_RD = torch.stack([seen[p.sentence].inputs[p.position] for p in places])
    ids_R = torch.stack([seen[p.sentence].token_ids[p.position] for p in places])
    return Problem(
        logits=_logits(moe.router, inputs_RD),
        outputs=_all_outputs(moe, inputs_RD),
        loss=_sentence_loss(sentences, layer, places),
        predictions=fit_predictions(moe, _watch(fit, layer), inputs_RD, ids_R),
        inputs=inputs_RD,
    )


@torch.no_grad()
def _logits(router: Router, x_RD: Tensor) -> Tensor:
    """(R, N): z with p = softmax(z), so with the balance bias and the temperature if it has any."""
    return router.route(router.logits(x_RD.float())).logits / router.temperature


def _sentence_loss(sentences: Sentences, layer: SwitchLayer, places: List[Place]) -> Loss:
    """f: the loss of each token's sentence with h in place of the layer's output at the token."""

    def loss(h_MD: Tensor, row_M: Tensor) -> Tuple[Tensor, Tensor]:
        losses_M, slope_MD = torch.empty(len(h_MD)), torch.empty_like(h_MD)
        of_sentence: List[int] = [places[row].sentence for row in row_M.tolist()]
        # Sentences of like length together: less padding.
        order = sorted(range(len(h_MD)), key=lambda m: sentences.sizes[of_sentence[m]])
        start = 0
        for run in sentences.batches([of_sentence[m] for m in order]):
            chunk = torch.tensor(order[start : start + len(run)])
            start += len(run)
            h = h_MD[chunk].detach().requires_grad_()
            position = torch.tensor([places[row].position for row in row_M[chunk].tolist()])
            handle = layer.moe.register_forward_hook(_replace_output(position, h))
            try:
                with torch.enable_grad():
                    values = sentences.losses(run)
                    (slope_MD[chunk],) = torch.autograd.grad(values.sum(), h)
            finally:
                handle.remove()
            losses_M[chunk] = values.detach()
        return losses_M, slope_MD

    return loss


def _replace_output(position: Tensor, h: Tensor) -> Any:
    """A hook that puts h (batch, D) into the output (length, batch, D), at a position of each."""

    def hook(_: nn.Module, __: Tuple, output: Tuple) -> Tuple:
        y, routing = output
        column = torch.arange(len(position))
        return y.index_put((position, column), h.to(y.dtype)), routing

    return hook
