"""Ways to compute the same mixture; :mod:`fairseq_sparsemixer.moe.dispatch` chooses one."""

from typing import Callable

from torch import Tensor

Observer = Callable[[Tensor, Tensor, Tensor], None]
"""Called with (S, D) inputs, (S,) experts and (S, D) outputs before the gate, for all slots
together or some at a time."""
