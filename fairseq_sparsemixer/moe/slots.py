"""What backends share: the numbering of slots, the observer of outputs, and their operands."""

from typing import Callable, List

import torch
from torch import Tensor

from fairseq_sparsemixer.moe.experts import Experts

Observer = Callable[[Tensor, Tensor, Tensor], None]
"""Called with (S, D) inputs, (S,) experts and (S, D) outputs before the gate, for all slots
together or some at a time. A slot without an expert may be among them, with expert -1 and an output
that means nothing, not even a finite number."""


def tokens_of(slot_S: Tensor, top_k: int) -> Tensor:
    """(S,) int64: the token of each slot; slot t K + k is the k-th of token t."""
    return slot_S if top_k == 1 else slot_S.div(top_k, rounding_mode="floor")


def operands(x_TD: Tensor, experts: Experts) -> List[Tensor]:
    """x, w1, b1, w2, b2, in the dtype of autocast where that is on."""
    values = [x_TD, experts.w1, experts.b1, experts.w2, experts.b2]
    if torch.is_autocast_enabled(x_TD.device.type):
        dtype = torch.get_autocast_dtype(x_TD.device.type)
        values = [value.to(dtype) for value in values]
    return values
