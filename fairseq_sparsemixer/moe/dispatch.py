"""Tokens to experts and back: the one seam behind which all backends lie.

Dropless: no expert has a capacity and no token is dropped. Shape suffixes: see
:mod:`fairseq_sparsemixer.moe`.
"""

from typing import Callable, Dict, Optional

import torch
from torch import Tensor, nn

from fairseq_sparsemixer.moe.backends.loop import loop
from fairseq_sparsemixer.moe.backends.sorted import sorted_experts
from fairseq_sparsemixer.moe.exchange import exchanged
from fairseq_sparsemixer.moe.experts import Experts
from fairseq_sparsemixer.moe.kernels import products
from fairseq_sparsemixer.moe.kernels.experts import triton_experts
from fairseq_sparsemixer.moe.routing import Routing
from fairseq_sparsemixer.moe.slots import Observer

Backend = Callable[[Tensor, Routing, Experts, Optional[Tensor], Optional[Observer]], Tensor]
"""(x_TD, routing, experts, scale_D, observe) -> y_TD in any floating dtype."""

BACKENDS: Dict[str, Backend] = {
    "sorted": sorted_experts,
    "triton": triton_experts,
    "loop": loop,
}
"""The backends by name; ``"auto"`` takes the one that suits the input."""

OBSTACLES: Dict[str, Callable[[torch.device, torch.dtype], Optional[str]]] = {
    "triton": products.obstacle,
}
"""(device, dtype) -> why a backend cannot serve such an input, None if it can; backends that serve
every input are not listed."""


def check_backend(name: str) -> None:
    """Raise ValueError unless ``name`` is "auto" or one of :data:`BACKENDS`."""
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}; choose from auto, {', '.join(BACKENDS)}")


def backend_for(device: torch.device, dtype: torch.dtype) -> str:
    """What ``"auto"`` stands for: on a GPU the one that never waits for it, else ``"sorted"``."""
    on_gpu = device.type == "cuda" and products.obstacle(device, dtype) is None
    return "triton" if on_gpu else "sorted"


def dispatch(
    x_TD: Tensor,
    routing: Routing,
    experts: Experts,
    backend: str = "auto",
    observe: Optional[Observer] = None,
    scale_D: Optional[Tensor] = None,
) -> Tensor:
    """(T, D): scale * sum_k gate_tk E_{index_tk}(x_t) for each token t, in the dtype of x.

    Rows of padding are 0. Where the experts are spread over workers, all of these have to call it.

    Args:
        x_TD: tokens, padding included.
        routing: which experts each of them goes to.
        experts: the layer's experts.
        backend: "auto" or a name in :data:`BACKENDS`.
        observe: see :data:`~fairseq_sparsemixer.moe.slots.Observer`.
        scale_D: the learned output scale omega; None for 1.

    Raises:
        ValueError: the backend cannot serve the device or the dtype of x, or the activation.
    """
    device, dtype = x_TD.device, x_TD.dtype
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    stateful = isinstance(experts.activation_fn, nn.Module)
    if stateful and backend not in ("auto", "loop"):
        raise ValueError(
            f"backend {backend!r} takes an activation that is a function, not a Module: "
            "choose 'auto' or 'loop'"
        )
    if backend == "auto":
        backend = "loop" if stateful else backend_for(device, dtype)
    elif backend in OBSTACLES:
        obstacle = OBSTACLES[backend](device, dtype)
        if obstacle is not None:
            raise ValueError(
                f"backend {backend!r} {obstacle}, not {dtype} on {device.type}: choose 'auto'"
            )
    run = BACKENDS[backend]
    if experts.parallel is None:
        return run(x_TD, routing, experts, scale_D, observe).to(x_TD.dtype)
    y_TD = exchanged(
        x_TD.to(dtype),
        routing,
        experts.parallel,
        lambda x_RD, routing_R: run(x_RD, routing_R, experts, None, None).to(dtype),
        observe,
        scale_D,
    )
    return y_TD.to(x_TD.dtype)
