"""Tokens to experts and back: the one seam behind which all backends lie.

Dropless: no expert has a capacity and no token is dropped. Shape suffixes: see
:mod:`fairseq_sparsemixer.moe`.
"""

from typing import Callable, Dict, Optional

from torch import Tensor

from fairseq_sparsemixer.moe.backends import Observer
from fairseq_sparsemixer.moe.backends.loop import loop
from fairseq_sparsemixer.moe.backends.sorted import sorted_experts
from fairseq_sparsemixer.moe.experts import Experts
from fairseq_sparsemixer.moe.routing import Routing

Backend = Callable[[Tensor, Routing, Experts, Optional[Tensor], Optional[Observer]], Tensor]
"""(x_TD, routing, experts, scale_D, observe) -> y_TD in any floating dtype."""

BACKENDS: Dict[str, Backend] = {
    "sorted": sorted_experts,
    "loop": loop,
}
"""The backends by name; ``"auto"`` takes the one that suits the input."""


def check_backend(name: str) -> None:
    """Raise ValueError unless ``name`` is "auto" or one of :data:`BACKENDS`."""
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}; choose from auto, {', '.join(BACKENDS)}")


def dispatch(
    x_TD: Tensor,
    routing: Routing,
    experts: Experts,
    backend: str = "auto",
    observe: Optional[Observer] = None,
    scale_D: Optional[Tensor] = None,
) -> Tensor:
    """(T, D): scale * sum_k gate_tk E_{index_tk}(x_t) for each token t, in the dtype of x.

    Rows of padding are 0.

    Args:
        x_TD: tokens, padding included.
        routing: which experts each of them goes to.
        experts: the layer's experts.
        backend: "auto" or a name in :data:`BACKENDS`.
        observe: see :data:`~fairseq_sparsemixer.moe.backends.Observer`.
        scale_D: the learned output scale omega; None for 1.
    """
    run = BACKENDS["sorted" if backend == "auto" else backend]
    return run(x_TD, routing, experts, scale_D, observe).to(x_TD.dtype)
