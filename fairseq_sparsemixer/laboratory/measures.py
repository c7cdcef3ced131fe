"""How an estimator's draws lie around the exact gradient."""

from typing import Dict, NamedTuple, Optional

import torch
from torch import Tensor

BATCHES = 32
"""How many draws of a whole batch ``batch_cosine`` averages over."""


class Measure(NamedTuple):
    """All relative to the length of the exact gradient, over all tokens together; None where that
    is 0, since no token has a choice.

    Lengths are root mean squares over the R x N entries, so tokens with a large gradient count
    more.
    """

    bias: Optional[float]
    """Length of (mean of the estimate - exact); what the finite number of draws adds to it is
    taken off."""
    noise: Optional[float]
    """Standard deviation of one draw."""
    rmse: Optional[float]
    """Root mean squared error of one draw."""
    cosine: Optional[float]
    """Between the mean of the estimate and the exact gradient: its direction. None, too, where the
    draws are too few to tell."""
    length: Optional[float]
    """Of the mean of the estimate along the exact gradient: its size, 1 where right. Adam does
    away with a common factor."""
    batch_cosine: Optional[float]
    """Between one draw of the whole batch and the exact gradient, both as gradients of the router's
    weights: what an optimiser sees. None where the problem has no inputs."""


def measure(draws_RSN: Tensor, exact_RN: Tensor, inputs_RD: Optional[Tensor] = None) -> Measure:
    """Bias, noise and direction.

    Args:
        draws_RSN: (R, S, N) S draws of the estimate for each of R tokens.
        exact_RN: (R, N) the exact gradient.
        inputs_RD: (R, D) the router's inputs x, for ``batch_cosine``.
    """
    draws_RSN, exact_RN = draws_RSN.double(), exact_RN.double()
    draws = draws_RSN.shape[1]
    mean_RN = draws_RSN.mean(1)
    exact = exact_RN.norm()
    if exact == 0:
        return Measure(*6 * (None,))
    variance = draws_RSN.var(1, unbiased=draws > 1).sum()
    bias_squared = ((mean_RN - exact_RN).square().sum() - variance / draws).clamp_min(0)
    along = (mean_RN * exact_RN).sum() / exact
    # The length of the mean, too, without what the finite number of draws adds.
    length_squared = mean_RN.square().sum() - variance / draws
    # Where that is much of it, there is no telling the direction.
    measurable = length_squared > 0.5 * variance / draws
    cosine = (along / length_squared.sqrt()).clamp(-1, 1).item() if measurable else None
    return Measure(
        bias=(bias_squared.sqrt() / exact).item(),
        noise=(variance.sqrt() / exact).item(),
        rmse=((bias_squared + variance).sqrt() / exact).item(),
        cosine=cosine,
        length=(along / exact).item(),
        batch_cosine=None if inputs_RD is None else _batch_cosine(draws_RSN, exact_RN, inputs_RD),
    )


def _batch_cosine(draws_RSN: Tensor, exact_RN: Tensor, inputs_RD: Tensor) -> float:
    inputs_RD = inputs_RD.double()
    exact = (exact_RN.t() @ inputs_RD).flatten()
    one_SX = torch.einsum("rsn,rd->snd", draws_RSN[:, :BATCHES], inputs_RD).flatten(1)
    return torch.nn.functional.cosine_similarity(one_SX, exact.unsqueeze(0)).mean().item()


def as_dict(measure: Measure) -> Dict[str, Optional[float]]:
    """Rounded, for JSON."""
    return {
        name: None if value is None else round(value, 5)
        for name, value in measure._asdict().items()
    }
