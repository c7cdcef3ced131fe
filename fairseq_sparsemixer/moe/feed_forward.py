"""The layer that takes the place of a transformer's feed-forward network."""

from typing import Any, Optional, Tuple, Union

from torch import Tensor, nn

from fairseq_sparsemixer.moe.dispatch import check_backend, dispatch
from fairseq_sparsemixer.moe.experts import Activation, Experts
from fairseq_sparsemixer.moe.routing import Routing, build_router


class MoEFeedForward(nn.Module):
    """A mixture of experts: y = omega * sum_k gate_k E_{D_k}(x).

    omega is 1 for routers without an ``output_scale``.

    Args:
        embed_dim: width of the model.
        ffn_dim: inner width of one expert.
        num_experts: at least 1.
        router: a name in :data:`~fairseq_sparsemixer.moe.ROUTERS`.
        top_k: experts of each token.
        jitter_eps: see the router's docstring.
        activation_fn: a name ("relu", "gelu", ...) or a function from Tensor to Tensor.
        activation_dropout: probability of dropping an inner unit.
        backend: "auto" or a name in :data:`fairseq_sparsemixer.moe.dispatch.BACKENDS`.
        options: further arguments of the router (``bias``, ``init_scale``, ...).

    Raises:
        ValueError: for a value out of range or an unknown name.
    """

    def __init__(
        self,
        embed_dim: int,
        ffn_dim: int,
        num_experts: int,
        *,
        router: str = "sparsemixer",
        top_k: int = 1,
        jitter_eps: float = 0.1,
        activation_fn: Union[str, Activation] = "relu",
        activation_dropout: float = 0.0,
        backend: str = "auto",
        **options: Any,
    ) -> None:
        super().__init__()
        check_backend(backend)
        self.embed_dim = embed_dim
        self.backend = backend
        self.router = build_router(
            router,
            embed_dim=embed_dim,
            num_experts=num_experts,
            top_k=top_k,
            jitter_eps=jitter_eps,
            **options,
        )
        self.experts = Experts(embed_dim, ffn_dim, num_experts, activation_fn, activation_dropout)

    def forward(self, x: Tensor, padding_mask: Optional[Tensor] = None) -> Tuple[Tensor, Routing]:
        """Route each token and combine its experts' outputs.

        Args:
            x: (..., embed_dim).
            padding_mask: (...) bool, True at padding, which is neither routed nor counted.

        Returns:
            y, of the shape and dtype of x with rows of padding 0, and the :class:`Routing`.
        """
        if x.shape[-1] != self.embed_dim:
            raise ValueError(f"x must be (..., {self.embed_dim}), not {tuple(x.shape)}")
        if padding_mask is not None and padding_mask.shape != x.shape[:-1]:
            raise ValueError(
                f"padding_mask must be {tuple(x.shape[:-1])}, not {tuple(padding_mask.shape)}"
            )
        routing = self.router(x, padding_mask)
        y_TD = dispatch(x.reshape(-1, self.embed_dim), routing, self.experts, self.backend)
        if self.router.output_scale is not None:
            y_TD = y_TD * self.router.output_scale.to(y_TD.dtype)
        return y_TD.view(x.shape), routing
