"""Ways to compute the same mixture; :mod:`fairseq_sparsemixer.moe.dispatch` chooses one."""

from typing import Callable

from torch import Tensor

Observer = Callable[[Tensor, Tensor, Tensor], None]
"""Called with (S, D) inputs, (S,) experts and (S, D) outputs before the gate, for all slots
together or some at a time. A slot without an expert may be among them, with expert -1 and an output
that means nothing, not even a finite number."""
