"""Tokens to experts and back: the one seam behind which all backends lie.

Dropless: no expert has a capacity and no token is dropped. Shape suffixes: see
:mod:`fairseq_sparsemixer.moe`.
"""

from typing import Callable, Dict, Optional

import torch
from torch import Tensor

from fairseq_sparsemixer.moe.experts import Experts
from fairseq_sparsemixer.moe.routing import Routing

Observer = Callable[[Tensor, Tensor, Tensor], None]


def _sorted(
    x_TD: Tensor, routing: Routing, experts: Experts, observe: Optional[Observer]
) -> Tensor:
    """Sort the slots by expert once, so that each expert reads one contiguous slice."""
    top_k = routing.expert_index.shape[-1]
    expert_S = routing.expert_index.reshape(-1)
    # Padding and empty slots have index -1: they sort to the front and are cut off there.
    counts = torch.bincount(expert_S + 1, minlength=experts.num_experts + 1).tolist()
    slot_S = expert_S.argsort(stable=True)[counts[0] :]
    token_S = slot_S if top_k == 1 else slot_S.div(top_k, rounding_mode="floor")
    x_SD = x_TD.index_select(0, token_S)
    out_SD = experts(x_SD, counts[1:])
    if observe is not None:
        observe(x_SD, expert_S.index_select(0, slot_S), out_SD)
    out_SD = out_SD * routing.gate.reshape(-1, 1).index_select(0, slot_S)
    return out_SD.new_zeros(x_TD.shape).index_add(0, token_S, out_SD)


def _loop(x_TD: Tensor, routing: Routing, experts: Experts, observe: Optional[Observer]) -> Tensor:
    """Expert by expert, in plain words; the yardstick for the others."""
    y_TD = torch.zeros(x_TD.shape, dtype=torch.float32, device=x_TD.device)
    for expert in range(experts.num_experts):
        token_S, k_S = (routing.expert_index == expert).nonzero(as_tuple=True)
        slots = [0] * experts.num_experts
        slots[expert] = token_S.numel()
        out_SD = experts(x_TD[token_S], slots)
        if observe is not None:
            observe(x_TD[token_S], torch.full_like(token_S, expert), out_SD)
        out_SD = out_SD * routing.gate[token_S, k_S].unsqueeze(-1)
        y_TD = y_TD.index_add(0, token_S, out_SD.float())
    return y_TD


Backend = Callable[[Tensor, Routing, Experts, Optional[Observer]], Tensor]

BACKENDS: Dict[str, Backend] = {
    "sorted": _sorted,
    "loop": _loop,
}
"""The backends by name; ``"auto"`` takes the first that suits the input."""


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
) -> Tensor:
    """(T, D): sum_k gate_tk E_{index_tk}(x_t) for each token t, 0 at padding, in the dtype of x.

    Args:
        x_TD: tokens, padding included.
        routing: which experts each of them goes to.
        experts: the layer's experts.
        backend: "auto" or a name in :data:`BACKENDS`.
        observe: called with (S, D) inputs, (S,) experts and (S, D) outputs before the gate, for
            all slots together or some at a time.
    """
    run = BACKENDS["sorted" if backend == "auto" else backend]
    return run(x_TD, routing, experts, observe).to(x_TD.dtype)
