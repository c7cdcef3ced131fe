"""Which experts a model's layers choose, token by token, on whatever it is run on."""

import contextlib
from typing import Any, Dict, Iterator, List

import numpy as np
from torch import Tensor, nn

from fairseq_sparsemixer.models.layers import switch_layers
from fairseq_sparsemixer.moe import Routing

SentenceChoices = Dict[str, np.ndarray]
"""Of one sentence: for each layer ("encoder.0") the experts of its tokens, (length, K) int16;
-1 where a token went to no expert."""


@contextlib.contextmanager
def watch_routing(model: nn.Module) -> Iterator[Dict[str, Routing]]:
    """Inside the block, the yielded dict holds what each layer did in its last forward pass.

    Keys are the names of the layers; it is empty for a model without experts.
    """
    seen: Dict[str, Routing] = {}

    def note(name: str) -> Any:
        return lambda _, __, output: seen.__setitem__(name, output[1])

    handles = [
        layer.moe.register_forward_hook(note(name)) for name, layer in switch_layers(model).items()
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def choices_of_batch(
    seen: Dict[str, Routing], net_input: Dict[str, Tensor], pad: int
) -> List[SentenceChoices]:
    """What :func:`watch_routing` saw of one batch, by sentence and without padding.

    Args:
        seen: after ``model(**net_input)``.
        net_input: ``src_tokens``, which encoder layers read, and ``prev_output_tokens``, which
            decoder layers read, but for those of language models: (batch, length) each.
        pad: symbol of padding.

    Returns:
        For each sentence of the batch its choices, in the order of its tokens.
    """
    sentences: List[SentenceChoices] = [{} for _ in range(len(net_input["src_tokens"]))]
    for name, routing in seen.items():
        tokens_BL = net_input["src_tokens"]
        if name.startswith("decoder"):
            tokens_BL = net_input.get("prev_output_tokens", tokens_BL)
        # Layers see (length, batch).
        experts_LBK = routing.expert_index.unflatten(0, (-1, len(tokens_BL))).cpu().numpy()
        kept_BL = tokens_BL.ne(pad).cpu().numpy()
        for row, sentence in enumerate(sentences):
            sentence[name] = experts_LBK[kept_BL[row], row].astype(np.int16)
    return sentences
