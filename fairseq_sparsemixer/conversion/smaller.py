"""Layers of fewer experts, and of none."""

import copy
from typing import Any, List

import torch
from torch import Tensor, nn

from fairseq_sparsemixer.conversion.usage import Usage
from fairseq_sparsemixer.moe import MoEFeedForward

FOR_ALL = "output_scale"
"""The one parameter of a router that its experts share; all others have a row for each."""


def keep_experts(mixture: MoEFeedForward, kept: List[int]) -> MoEFeedForward:
    """A mixture of some experts of another; their tokens go to the best of those that are left.

    Args:
        mixture: stays as it is.
        kept: the numbers of experts, at least as many as a token takes.
    """
    smaller = copy.deepcopy(mixture)
    experts = mixture.router.num_experts
    rows = torch.tensor(kept, device=mixture.experts.w1.device)
    for module in smaller.modules():
        stores: Any = (module._parameters, module._buffers)
        for store in stores:
            for name, value in store.items():
                if value is None or name == FOR_ALL or not value.dim() or len(value) != experts:
                    continue
                own = value.detach()[rows].clone()
                store[name] = nn.Parameter(own) if isinstance(value, nn.Parameter) else own
    smaller.experts.packed = None
    smaller.router.num_experts = smaller.experts.num_experts = len(kept)
    return smaller


def scale_outputs(mixture: MoEFeedForward, factor: float) -> None:
    """Multiply what each expert puts out."""
    with torch.no_grad():
        mixture.experts.w2.mul_(factor)
        mixture.experts.b2.mul_(factor)
    if mixture.router.expert_means is not None:
        mixture.router.expert_means.scale_outputs(factor)


def as_dense(mixture: MoEFeedForward, usage: Usage, weights_N: Tensor) -> MoEFeedForward:
    """The feed-forward network with the weighted mean of the experts' parameters.

    Its output takes the place of the mixture's, so that omega and the mean sum of a token's gates
    are part of its second product.

    Args:
        mixture: stays as it is.
        usage: of the mixture.
        weights_N: of the experts, with sum 1: one of them to keep that one, their shares to merge.

    Returns:
        A mixture of one expert with gate 1.
    """
    experts = mixture.experts
    dense = MoEFeedForward(
        mixture.embed_dim,
        experts.w1.shape[1],
        1,
        router="random",
        activation_fn=experts.activation_fn,
        activation_dropout=experts.activation_dropout,
    ).to(experts.w1.device)
    scale = mixture.router.output_scale
    omega_D = experts.w2.new_ones(mixture.embed_dim) if scale is None else scale
    with torch.no_grad():
        for name, merged in dense.experts.named_parameters():
            own = getattr(experts, name)
            merged[0] = torch.tensordot(weights_N, own, dims=1)
        dense.experts.w2[0].mul_(usage.gate * omega_D.unsqueeze(-1))
        dense.experts.b2[0].mul_(usage.gate * omega_D)
    return dense.eval()
