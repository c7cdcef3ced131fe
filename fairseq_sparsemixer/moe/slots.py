"""The slots of a batch in the order of their experts, without waiting for the device.

Shapes do not depend on the routing: there are always S = T K slots. Those without an expert, which
padding and empty slots have, come last.
"""

from typing import Callable, List, NamedTuple

import torch
from torch import Tensor

from fairseq_sparsemixer.moe.experts import Experts
from fairseq_sparsemixer.moe.routing import Routing

Observer = Callable[[Tensor, Tensor, Tensor], None]
"""Called with (S, D) inputs, (S,) experts and (S, D) outputs before the gate, for all slots
together or some at a time. A slot without an expert may be among them, with expert -1 and an output
that means nothing, not even a finite number."""


def tokens_of(slot_S: Tensor, top_k: int) -> Tensor:
    """(S,) int64: the token of each slot; slot t K + k is the k-th of token t."""
    return slot_S if top_k == 1 else slot_S.div(top_k, rounding_mode="floor")


class Slots(NamedTuple):
    """All slots, sorted by expert; of one expert in the order of their tokens."""

    slot_S: Tensor
    """(S,) int64: which slot of the batch lies here; slot t K + k is the k-th of token t."""
    expert_S: Tensor
    """(S,) int64: its expert, N where it has none."""
    end_N: Tensor
    """(N,) int32: one past the last slot of each expert."""
    top_k: int

    @classmethod
    def of(cls, routing: Routing, num_experts: int) -> "Slots":
        """Sort the slots of one layer."""
        index_S = routing.expert_index.reshape(-1)
        key_S = torch.where(index_S < 0, num_experts, index_S)
        expert_S, slot_S = key_S.sort(stable=True)
        expert_N = torch.arange(num_experts, device=expert_S.device)
        end_N = torch.searchsorted(expert_S, expert_N, right=True, out_int32=True)
        return cls(slot_S, expert_S, end_N, routing.expert_index.shape[1])

    @property
    def token_S(self) -> Tensor:
        """(S,) int64: the token of each slot."""
        return tokens_of(self.slot_S, self.top_k)

    @property
    def observed_S(self) -> Tensor:
        """(S,) int64: the expert of each slot, -1 where it has none."""
        num_experts = len(self.end_N)
        return self.expert_S.masked_fill(self.expert_S == num_experts, -1)


def operands(x_TD: Tensor, experts: Experts) -> List[Tensor]:
    """x, w1, b1, w2, b2, in the dtype of autocast where that is on."""
    values = [x_TD, experts.w1, experts.b1, experts.w2, experts.b2]
    if torch.is_autocast_enabled(x_TD.device.type):
        dtype = torch.get_autocast_dtype(x_TD.device.type)
        values = [value.to(dtype) for value in values]
    return values
