"""The models that are compared: a router and its number of experts, or the dense model."""

from typing import List, NamedTuple

from fairseq_sparsemixer.errors import UserError

DENSE = "dense"
"""In place of a router: the model without experts."""


class Arm(NamedTuple):
    """One model to train."""

    name: str
    overrides: List[str]
    """hydra overrides of ``configs/demo.yaml`` or ``configs/wmt14.yaml``."""


def build_arm(router: str, num_experts: int) -> Arm:
    """The arm of a router, with what this router cannot do without, or of :data:`DENSE`.

    Raises:
        UserError: there is no such router.
    """
    from fairseq_sparsemixer.moe.routing import find_router

    if router == DENSE:
        return Arm(DENSE, ["model.encoder_moe_layers=none", "model.decoder_moe_layers=none"])
    try:
        kind = find_router(router)
    except ValueError as error:
        raise UserError(f"--router: {error}") from None
    overrides = [f"model.router={router}", f"model.num_experts={num_experts}"]
    if kind.min_top_k > 1:
        overrides.append(f"model.top_k={kind.min_top_k}")
    if not kind.causal:
        overrides.append("model.decoder_moe_layers=none")
    if router == "reinmax":  # sends all of a layer's tokens to one expert at 0.01
        overrides.append("criterion.balance_weight=0.05")
    return Arm(f"{router}-{num_experts}", overrides)
