"""One model: its translation of a sentence, which experts worked on it, and swaps by hand."""

from typing import Any, Dict, List, NamedTuple, Tuple

import torch
from fairseq import utils

from fairseq_sparsemixer.errors import UserError
from fairseq_sparsemixer.evaluation.translator import MAX_LEN_B, Translator
from fairseq_sparsemixer.files import misfit
from fairseq_sparsemixer.models.forcing import Forced, force_choices
from fairseq_sparsemixer.models.layers import switch_layers
from fairseq_sparsemixer.models.teacher_forcing import decoder_input, net_input
from fairseq_sparsemixer.models.watching import watch_routing
from fairseq_sparsemixer.moe import Routing
from fairseq_sparsemixer.report.page import PIECE_COLOURS, PIECE_LINES

MOST_PIECES = 150
"""Of a sentence, its end included."""
MOST_SWAPS = 64
_SWAP = {"layer": str, "position": int, "experts": [int]}
_REQUEST = {"text": str, "swaps?": [_SWAP]}


class _Side(NamedTuple):
    """What the encoder or the decoder works on."""

    tokens: List[int]
    dictionary: Any


class Inspector:
    """Answers what the page asks; for one thread at a time.

    Args:
        translator: of one model.
        beam, lenpen: see :meth:`.Translator.translate`.

    Raises:
        UserError: it is an ensemble, or translates in no way that can be shown.
    """

    def __init__(self, translator: Translator, beam: int, lenpen: float) -> None:
        if len(translator.checkpoints) > 1:
            raise UserError(
                f"an ensemble of {len(translator.checkpoints)} models cannot be shown, as each has "
                "experts of its own: name one checkpoint"
            )
        self._translator, self._beam, self._lenpen = translator, beam, lenpen
        self._layers = switch_layers(translator.model)
        self._most_pieces = min(MOST_PIECES, translator.max_source_positions)
        self._most_steps = min(MAX_LEN_B + 1, translator.max_target_positions)
        translator.encode_pair("", "")  # refuses what is not measured
        translator.hypothesis("1", beam, lenpen)  # the first is slow, and tells of wrong settings

    def describe(self) -> Dict[str, Any]:
        """The model and the limits of a request; ``layers``: experts of each layer that has any."""
        translator = self._translator
        routers = {name: layer.moe.router for name, layer in self._layers.items()}
        router = next(iter(routers.values()), None)
        rule = None if router is None else router.evaluation_rule()
        path = translator.checkpoints[0].path
        return {
            "model": f"{path.resolve().parent.name}/{path.name}",
            "source_lang": translator.source_lang,
            "target_lang": translator.target_lang,
            "beam": self._beam,
            "lenpen": self._lenpen,
            "layers": {name: each.num_experts for name, each in routers.items()},
            "router": None if router is None else router.name,
            "top_k": None if router is None else router.top_k,
            "gate": None if rule is None else rule.gate,
            "swappable": rule is not None,
            # A hash of the token's id may have learnt gates, and no choice.
            "learnt": router is not None
            and router.weight is not None
            and not router.needs_token_ids,
            "most_pieces": self._most_pieces,
            "most_swaps": MOST_SWAPS,
            "colours": PIECE_COLOURS,
            "lines": PIECE_LINES,
        }

    @torch.no_grad()
    def translate(self, request: Any) -> Dict[str, Any]:
        """Translate, with the choices that are swapped.

        Args:
            request: of JSON: ``text``, and maybe ``swaps``, a list of ``layer``, ``position`` (in
                the encoder of a piece, in the decoder of a step) and ``experts``, K of them.

        Returns:
            ``translation``, ``score`` and ``at_length_limit`` as :class:`.Translation`;
            ``log_probs`` (base e) of its pieces; and of ``encoder`` and ``decoder`` each
            ``pieces``, ``words`` (the number of each piece's word) and ``layers``: by name, for
            each piece ``experts``, their ``gates``, and the router's ``probs`` of all.

        Raises:
            UserError: it is no such request, or exceeds a limit.
        """
        text, forced = self._read(request)
        translator = self._translator
        source = translator.encode_pair(text, "").source
        if len(source) > self._most_pieces:
            raise UserError(
                f"the text has {len(source)} pieces, and at most {self._most_pieces} are taken: "
                "shorten it"
            )
        self._check_positions(forced, len(source))
        with force_choices(translator.model, forced):
            found = translator.hypothesis(text, self._beam, self._lenpen)
        if found is None:
            raise UserError("there is nothing to translate: give a sentence as text")
        dictionary = translator.target_dictionary
        read = decoder_input(found.tokens, dictionary.eos())
        inputs = utils.apply_to_sample(
            lambda tensor: tensor.to(translator.device),
            net_input([source], [read], dictionary.pad(), left_pad_source=True),
        )
        with force_choices(translator.model, forced), watch_routing(translator.model) as seen:
            translator.model(**inputs)
        encoder = _Side(source.tolist(), translator.task.source_dictionary)
        decoder = _Side(found.tokens.tolist(), dictionary)
        return {
            "translation": found.translation.text,
            "score": found.translation.score,
            "at_length_limit": found.translation.at_length_limit,
            "log_probs": found.log_probs.tolist(),
            "encoder": self._show("encoder", encoder, seen),
            "decoder": self._show("decoder", decoder, seen),
        }

    def _read(self, request: Any) -> Tuple[str, Forced]:
        """Text and choices of a request whose layers and experts are there."""
        wrong = misfit(request, _REQUEST, "the request")
        if wrong:
            raise UserError(f"{wrong}: see docs/serve.md for what a request holds")
        swaps = request.get("swaps", [])
        for part, known in [(request, {"text", "swaps"}), *((swap, _SWAP) for swap in swaps)]:
            for key in part.keys() - known:
                raise UserError(f"there is no {key[:30]!r} in a request: leave it out")
        if len(swaps) > MOST_SWAPS:
            raise UserError(f"{len(swaps)} swaps are too many: give at most {MOST_SWAPS}")
        try:
            request["text"].encode()
        except UnicodeEncodeError as error:
            raise UserError("the text has halves of surrogate pairs: send whole ones") from error
        forced: Dict[str, Dict[int, List[int]]] = {}
        for swap in swaps:
            self._check_swap(swap)
            by_position = forced.setdefault(swap["layer"], {})
            if swap["position"] in by_position:
                raise UserError(
                    f"two swaps are of position {swap['position']} of {swap['layer']}: give one"
                )
            by_position[swap["position"]] = swap["experts"]
        return request["text"], forced

    def _check_swap(self, swap: Dict[str, Any]) -> None:
        name, experts = swap["layer"], swap["experts"]
        if name not in self._layers:
            there = ", ".join(self._layers) or "none, as the model is dense"
            raise UserError(f"there is no layer {name[:30]!r} with experts; there are {there}")
        router = self._layers[name].moe.router
        if router.evaluation_rule() is None:
            raise UserError(
                f"router {router.name!r} does not choose for each token alone, so that there is no "
                "choice to swap: leave swaps out"
            )
        allowed = range(router.num_experts)
        if len(experts) != router.top_k or not set(experts) <= set(allowed):
            raise UserError(
                f"{name} sends a token to {router.top_k} of experts 0 to {allowed[-1]}: give as "
                "many of these numbers as experts of a swap"
            )
        if len(set(experts)) < len(experts):
            raise UserError(f"a swap of {name} names an expert twice: give different ones")

    def _check_positions(self, forced: Forced, pieces: int) -> None:
        for name, by_position in forced.items():
            of_encoder = name.startswith("encoder")
            limit = pieces if of_encoder else self._most_steps
            for position in by_position:
                if not 0 <= position < limit:
                    what = "the pieces of this text" if of_encoder else "the steps of a translation"
                    raise UserError(
                        f"position {position} of {name} is none: {what} are 0 to {limit - 1}"
                    )

    def _show(self, name: str, side: _Side, seen: Dict[str, Routing]) -> Dict[str, Any]:
        pieces = [side.dictionary[token] for token in side.tokens]
        mark = "▁" if self._translator.subwords.pipeline == "sentencepiece" else None
        begins = [
            token == side.dictionary.eos()
            or (piece.startswith(mark) if mark else not before.endswith("@@"))
            for token, piece, before in zip(side.tokens, pieces, ["", *pieces])
        ]
        words = [sum(begins[1 : place + 1]) for place in range(len(pieces))]
        layers = {
            layer: [
                {
                    "experts": [e for e in experts if e >= 0],
                    "gates": [gate for gate, e in zip(gates, experts) if e >= 0],
                    "probs": probs,
                }
                for experts, gates, probs in zip(
                    routing.expert_index.tolist(), routing.gate.tolist(), routing.probs.tolist()
                )
            ]
            for layer, routing in seen.items()
            if layer.startswith(name)
        }
        return {"pieces": pieces, "words": words, "layers": layers}
