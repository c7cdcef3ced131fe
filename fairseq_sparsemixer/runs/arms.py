"""The models that are compared: a router and its number of experts, or the dense model."""

from typing import List, NamedTuple

from fairseq_sparsemixer.errors import UserError
from fairseq_sparsemixer.moe.routing import ROUTERS, find_router

DENSE = "dense"
"""In place of a router: the model without experts."""


def of_any_text() -> List[str]:
    """The routers that need no text of several languages."""
    return [name for name, router in ROUTERS.items() if not router.needs_languages]


class Variant(NamedTuple):
    """One model to train: its name, and hydra's overrides that make it of any config."""

    name: str
    overrides: List[str]


def build_variant(router: str, num_experts: int) -> Variant:
    """That of a router, with what this router cannot do without, or of :data:`DENSE`.

    Raises:
        UserError: there is no such router.
    """
    if router == DENSE:
        return Variant(DENSE, ["model.encoder_moe_layers=none", "model.decoder_moe_layers=none"])
    try:
        kind = find_router(router)
    except ValueError as error:
        raise UserError(f"--router: {error}") from None
    overrides = [f"model.router={router}", f"model.num_experts={num_experts}"]
    if kind.min_top_k > 1:
        overrides.append(f"model.top_k={kind.min_top_k}")
    if not kind.causal:
        overrides.append("model.decoder_moe_layers=none")
    if kind.balance_weight is not None:
        overrides.append(f"criterion.balance_weight={kind.balance_weight}")
    return Variant(f"{router}-{num_experts}", overrides)
