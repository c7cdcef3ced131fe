"""Problems with a formula for f, and the order of accuracy of the SparseMixer family."""

from typing import Callable, Dict, List, Tuple

import numpy as np
import torch
from torch import Tensor

from fairseq_sparsemixer.laboratory.problems import Loss, Problem, through_softmax

WIDTH = 16
LOSSES = ("quadratic", "cubic", "network")


def loss_function(kind: str, rows: int, generator: torch.Generator) -> Loss:
    """f_r(h) for each row r.

    Args:
        kind: ``"quadratic"`` or ``"cubic"``: polynomials of h with random coefficients, shared by
            all rows; ``"network"``: w tanh(W (x_r + h)), a residual stream x_r and one hidden
            layer of four times the width.
        rows: R.
        generator: of the coefficients.
    """

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    if kind == "network":
        residual_RD, inner_FD = normal(rows, WIDTH), normal(4 * WIDTH, WIDTH) / WIDTH**0.5
        outer_F = normal(4 * WIDTH) / (4 * WIDTH) ** 0.5

        def network(h_MD: Tensor, row_M: Tensor) -> Tensor:
            stream_MD = residual_RD[row_M].to(h_MD.dtype) + h_MD
            return torch.tanh(stream_MD @ inner_FD.t().to(h_MD.dtype)) @ outer_F.to(h_MD.dtype)

        return _with_gradient(network)
    linear_D, matrix_DD = normal(WIDTH), normal(WIDTH, WIDTH) / WIDTH**0.5
    cubes_D = normal(WIDTH) / 3

    def polynomial(h_MD: Tensor, row_M: Tensor) -> Tensor:
        value_M = h_MD @ linear_D.to(h_MD.dtype)
        value_M = value_M + ((h_MD @ matrix_DD.to(h_MD.dtype)) * h_MD).sum(-1)
        if kind == "cubic":
            value_M = value_M + h_MD.pow(3) @ cubes_D.to(h_MD.dtype)
        return value_M

    return _with_gradient(polynomial)


def _with_gradient(function: Callable[[Tensor, Tensor], Tensor]) -> Loss:
    def loss(h_MD: Tensor, row_M: Tensor) -> Tuple[Tensor, Tensor]:
        h_MD = h_MD.detach().requires_grad_()
        with torch.enable_grad():
            value_M = function(h_MD, row_M)
            (slope_MD,) = torch.autograd.grad(value_M.sum(), h_MD)
        return value_M.detach(), slope_MD

    return loss


def toy_problem(
    kind: str,
    num_experts: int,
    temperature: float,
    seed: int = 0,
    rows: int = 32,
    mean_to_spread: float = 1.5,
    scale: float = 1.0,
) -> Problem:
    """Random logits and experts.

    Args:
        kind: of :data:`LOSSES`.
        num_experts: N.
        temperature: the logits are normal with standard deviation 1 / temperature.
        seed: of everything.
        rows: R.
        mean_to_spread: how much the experts' mean outputs differ, relative to how much the outputs
            of one expert differ over tokens; "mean" predictions are worth something above 0.
        scale: factor on the outputs.
    """
    generator = torch.Generator().manual_seed(seed)
    loss = loss_function(kind, rows, generator)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    logits_RN = normal(rows, num_experts) / temperature
    means_ND = scale * mean_to_spread * normal(num_experts, WIDTH)
    outputs_RND = means_ND + scale * normal(rows, num_experts, WIDTH)
    predictions = {"mean": means_ND.expand_as(outputs_RND)}
    return Problem(logits_RN, outputs_RND, loss, predictions)


Points = Tuple[Tuple[float, float], ...]

METHODS: Dict[str, Points] = {
    "sparsemixer-1st": ((1.0, 1.0),),
    "sparsemixer": ((1.0, 0.5), (0.5, 0.5)),
    "sparsemixer-v2-star": ((1.0, 0.625), (1 / 3, 0.375)),
}
"""Evaluation points m with their probabilities, at factor 2 and without the override."""


def order_of_accuracy(scales: List[float], seed: int = 0) -> Dict[str, List[float]]:
    """Relative bias of each method for outputs of each scale, f a small network.

    The mean over all draws is formed by their probabilities and in float64, so there is no noise:
    f(h) - f(0) ~ f'(..) h has an error of one order more than the method's, and the bias relative
    to the gradient falls with the scale to the power of the method's order (1, 2, 3).
    """
    bias: Dict[str, List[float]] = {name: [] for name in METHODS}
    for scale in scales:
        problem = toy_problem("network", 4, 1.0, seed=seed, rows=256, scale=scale)
        problem.logits, problem.outputs = problem.logits.double(), problem.outputs.double()
        problem.predictions = {"mean": problem.predictions["mean"].double()}
        probs_RN = problem.logits.softmax(-1)
        exact_RN = problem.exact_gradient(probs_RN)
        for name, points in METHODS.items():
            mean_RN = _mean_estimate(problem, probs_RN, points)
            bias[name].append(((mean_RN - exact_RN).norm() / exact_RN.norm()).item())
    return bias


def _mean_estimate(problem: Problem, probs_RN: Tensor, points: Points) -> Tensor:
    """(R, N): 2 sum_i p_i sum_m P(m) f'(m h_i) . E_i dp_i."""
    slope_RN = torch.zeros_like(probs_RN)
    for point, probability in points:
        slope_RN += probability * problem.every_expert(point * probs_RN)[1]
    return through_softmax(2 * probs_RN * slope_RN, probs_RN)


def slopes(scales: List[float], bias: Dict[str, List[float]]) -> Dict[str, float]:
    """The order of each method: slope of log bias against log scale, by least squares."""
    return {
        name: float(np.polyfit(np.log(scales), np.log(values), 1)[0])
        for name, values in bias.items()
    }
