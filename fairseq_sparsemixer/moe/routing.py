"""What a router is, what it returns, and the registry of routers by name.

Shape suffixes: see :mod:`fairseq_sparsemixer.moe`.
"""

import dataclasses
import difflib
import math
from typing import Any, Callable, Dict, Optional, Type

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclasses.dataclass
class Routing:
    """The experts chosen for T tokens, and how much each of them counts.

    Rows of padding are kept, so that row t always belongs to token t of the flattened batch; they
    have ``expert_index`` -1 and ``gate`` 0.
    """

    expert_index: Tensor
    """(T, K) int64: the chosen experts, -1 at padding."""
    gate: Tensor
    """(T, K) float32: differentiable multiplier of the expert's output, 0 at padding."""
    logits: Tensor
    """(T, N) float32: router logits z, jitter included."""
    probs: Tensor
    """(T, N) float32: p = softmax(z)."""
    sampling_probs: Tensor
    """(T, N) float32: the distribution that the gate is read from; the masked softmax p~ for
    SparseMixer, ``probs`` for routers that mask nothing."""
    padding_mask: Optional[Tensor] = None
    """(T,) bool, True at padding; None where there is none."""


class Router(nn.Module):
    """Maps tokens to experts; a subclass supplies the gradient estimator in :meth:`select`.

    The arithmetic is float32 whatever the model's dtype, under autocast too: half-precision
    logits flip choices (selective precision, arXiv 2101.03961).

    Args:
        embed_dim: D, the width of a token.
        num_experts: N, at least 1.
        top_k: K, experts of each token, 1 to N.
        jitter_eps: strength of the jitter; a router says in its own docstring what it does.
        bias: whether the logits have a bias b.
        init_scale: factor on the initial weights, which are those of :class:`torch.nn.Linear`.

    Raises:
        ValueError: for a value out of range; the message names it and what is allowed.
    """

    max_top_k: Optional[int] = 1
    """The largest top_k that the estimator is defined for; None where there is no limit."""

    output_scale: Optional[nn.Parameter]
    """(D,) the learned factor omega of the experts' output; None for routers without one."""

    name = ""
    """The name in :data:`ROUTERS`, set by :func:`register_router`."""

    def __init__(
        self,
        *,
        embed_dim: int,
        num_experts: int,
        top_k: int = 1,
        jitter_eps: float = 0.1,
        bias: bool = True,
        init_scale: float = 1.0,
    ) -> None:
        super().__init__()
        if embed_dim < 1:
            raise ValueError(f"embed_dim must be at least 1, not {embed_dim}")
        if num_experts < 1:
            raise ValueError(f"num_experts must be at least 1, not {num_experts}")
        if not 1 <= top_k <= num_experts:
            raise ValueError(f"top_k must be 1 to num_experts ({num_experts}), not {top_k}")
        if self.max_top_k is not None and top_k > self.max_top_k:
            raise ValueError(
                f"router {self.name!r} gives each token {self.max_top_k} expert: "
                f"top_k must be {self.max_top_k}, not {top_k}"
            )
        if not (jitter_eps >= 0 and math.isfinite(jitter_eps)):
            raise ValueError(f"jitter_eps must be a number of at least 0, not {jitter_eps}")
        if not (init_scale >= 0 and math.isfinite(init_scale)):
            raise ValueError(f"init_scale must be a number of at least 0, not {init_scale}")
        self.embed_dim = embed_dim
        self.num_experts = num_experts
        self.top_k = top_k
        self.jitter_eps = jitter_eps
        self.init_scale = init_scale
        self.weight = nn.Parameter(torch.empty(num_experts, embed_dim))
        self.bias = nn.Parameter(torch.empty(num_experts)) if bias else None
        self.register_parameter("output_scale", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as :class:`torch.nn.Linear` does, times ``init_scale``."""
        bound = self.init_scale / math.sqrt(self.embed_dim)
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor, padding_mask: Optional[Tensor] = None) -> Routing:
        """Route tokens.

        Args:
            x: (..., D), any floating dtype.
            padding_mask: (...) bool, True at padding, which goes to no expert.
        """
        with torch.autocast(device_type=x.device.type, enabled=False):
            x_TD = x.reshape(-1, self.embed_dim).float()
            bias_N = None if self.bias is None else self.bias.float()
            logits_TN = F.linear(x_TD, self.weight.float(), bias_N)
            return self.route(logits_TN, None if padding_mask is None else padding_mask.reshape(-1))

    def route(self, logits: Tensor, padding_mask: Optional[Tensor] = None) -> Routing:
        """The estimator alone.

        Args:
            logits: (T, N), never changed in place.
            padding_mask: (T,) bool, True at padding.
        """
        routing = self.select(logits.float())
        if padding_mask is None:
            return routing
        mask_T1 = padding_mask.unsqueeze(-1)
        return dataclasses.replace(
            routing,
            expert_index=routing.expert_index.masked_fill(mask_T1, -1),
            gate=routing.gate.masked_fill(mask_T1, 0.0),
            padding_mask=padding_mask,
        )

    def select(self, logits_TN: Tensor) -> Routing:
        """Choose experts for every row of float32 logits, as if there were no padding."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        """The settings shown by ``print(model)``."""
        return (
            f"{self.embed_dim}, num_experts={self.num_experts}, top_k={self.top_k}, "
            f"jitter_eps={self.jitter_eps}, bias={self.bias is not None}"
        )


ROUTERS: Dict[str, Type[Router]] = {}
"""The registered routers by name."""


def register_router(name: str) -> Callable[[Type[Router]], Type[Router]]:
    """Class decorator that makes a router available under ``name``."""

    def register(cls: Type[Router]) -> Type[Router]:
        if name in ROUTERS:
            raise ValueError(f"a router named {name!r} is registered already")
        cls.name = name
        ROUTERS[name] = cls
        return cls

    return register


def build_router(
    name: str,
    *,
    embed_dim: int,
    num_experts: int,
    top_k: int = 1,
    jitter_eps: float = 0.1,
    **options: Any,
) -> Router:
    """Build the router registered as ``name``.

    Args:
        name: one of :data:`ROUTERS`.
        embed_dim: D.
        num_experts: N.
        top_k: K.
        jitter_eps: see the router's docstring.
        options: ``bias``, ``init_scale``, and what the router's own constructor takes.

    Raises:
        ValueError: for an unknown name (the message gives the nearest) or a value out of range.
        TypeError: for an option that the router does not have.
    """
    if name not in ROUTERS:
        near = difflib.get_close_matches(name, ROUTERS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"unknown router {name!r}; {hint}choose from {', '.join(ROUTERS)}")
    return ROUTERS[name](
        embed_dim=embed_dim,
        num_experts=num_experts,
        top_k=top_k,
        jitter_eps=jitter_eps,
        **options,
    )
