"""The layer that takes the place of a transformer's feed-forward network."""

import functools
import logging
from typing import Any, Iterator, Optional, Tuple, Union

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fairseq_sparsemixer.moe.adaptation import AllReduce
from fairseq_sparsemixer.moe.backends.products import (
    PackedWeights,
    has_bfloat16,
    has_int8,
    obstacle,
)
from fairseq_sparsemixer.moe.dispatch import check_backend, dispatch
from fairseq_sparsemixer.moe.experts import Activation, Experts
from fairseq_sparsemixer.moe.limits import check_call
from fairseq_sparsemixer.moe.routing import Routing, build_router, rows

logger = logging.getLogger(__name__)


class MoEFeedForward(nn.Module):
    """A mixture of experts: y = omega * (sum_k gate_k E_{D_k}(x) + sum_i mean_gate_i m_i).

    omega is 1 for routers without an ``output_scale``; the second sum, over the experts' running
    mean outputs m_i, is there for routers that use them (``default-moe``, ``sparsemixer-cv``).
    Call :meth:`end_update` after each update of the parameters: those means and a balance bias
    change then.

    Args:
        embed_dim: width of the model.
        ffn_dim: inner width of one expert.
        num_experts: at least 1.
        router: a name in :data:`~fairseq_sparsemixer.moe.ROUTERS`.
        top_k: experts of each token.
        jitter_eps: see the router's docstring.
        activation_fn: a name ("relu", "gelu", ...) or a function from Tensor to Tensor; see
            :class:`~fairseq_sparsemixer.moe.Experts`.
        activation_dropout: probability of dropping an inner unit ("expert dropout" in arXiv
            2101.03961).
        output_masking: probability of leaving out an expert's whole output for a token in
            training; what is kept is scaled by 1 / (1 - probability) (expert output masking of
            NLLB, arXiv 2207.04672).
        backend: "auto" or a name in :data:`fairseq_sparsemixer.moe.dispatch.BACKENDS`, of the
            experts; router and statistics have kernels for "auto" and "triton" alone.
        recompute: compute the experts' inner layers again in the backward pass instead of keeping
            them: less memory, about a sixth more products.
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
        output_masking: float = 0.0,
        backend: str = "auto",
        recompute: bool = False,
        **options: Any,
    ) -> None:
        super().__init__()
        check_backend(backend)
        if not 0 <= output_masking < 1:
            raise ValueError(f"output_masking must be at least 0 and below 1, not {output_masking}")
        self.embed_dim = embed_dim
        self.output_masking = output_masking
        self.observing = True
        """Whether training batches count for the balance bias and the running means."""
        self.router = build_router(
            router,
            embed_dim=embed_dim,
            num_experts=num_experts,
            top_k=top_k,
            jitter_eps=jitter_eps,
            **options,
        )
        self.router.backend = backend
        self.experts = Experts(
            embed_dim, ffn_dim, num_experts, activation_fn, activation_dropout, recompute
        )

    @property
    def backend(self) -> str:
        """ "auto" or a name in :data:`fairseq_sparsemixer.moe.dispatch.BACKENDS`, for all parts."""
        return self.router.backend

    @backend.setter
    def backend(self, name: str) -> None:
        check_backend(name)
        self.router.backend = name

    def forward(
        self,
        x: Tensor,
        padding_mask: Optional[Tensor] = None,
        token_ids: Optional[Tensor] = None,
    ) -> Tuple[Tensor, Routing]:
        """Route each token and combine its experts' outputs.

        Args:
            x: (..., embed_dim).
            padding_mask: (...) bool, True at padding, which is neither routed nor counted; x is
                finite there, too, or the router's gradient is not.
            token_ids: (...) int64, see :meth:`Router.forward`.

        Returns:
            y, of the shape and dtype of x with rows of padding 0, and the :class:`Routing`.

        Raises:
            ValueError: shapes that do not fit, or see :func:`.limits.check_call`.
        """
        if x.shape[-1] != self.embed_dim:
            raise ValueError(f"x must be (..., {self.embed_dim}), not {tuple(x.shape)}")
        for name, value in (("padding_mask", padding_mask), ("token_ids", token_ids)):
            if value is not None and value.shape != x.shape[:-1]:
                raise ValueError(f"{name} must be {tuple(x.shape[:-1])}, not {tuple(value.shape)}")
        check_call(x, self.experts, self.backend)
        router = self.router
        routing = router(x, padding_mask, token_ids)
        if self.output_masking > 0:
            routing.gate = F.dropout(routing.gate, self.output_masking, self.training)
        # Under fairseq's activation checkpointing the forward runs twice, once without gradient.
        learning = self.observing and self.training and torch.is_grad_enabled()
        means, bias = router.expert_means, router.balance_bias
        observe = means.observe if learning and means is not None else None
        x_TD = rows(x)
        scale_D = router.output_scale
        if means is None or routing.mean_gate is None:
            y_TD = dispatch(x_TD, routing, self.experts, router.backend, observe, scale_D)
        else:
            y_TD = dispatch(x_TD, routing, self.experts, router.backend, observe)
            y_TD = means.add(y_TD, routing.mean_gate, x_TD)
            y_TD = y_TD if scale_D is None else y_TD * scale_D.to(y_TD.dtype)
        if learning and bias is not None:
            bias.observe(routing.chosen)
        return y_TD if x.dim() == 2 else y_TD.view(x.shape), routing

    def prepare_for_inference(self, dtype: torch.dtype = torch.float32) -> None:
        """Lay the experts' weights out for decoding on a CPU; elsewhere this changes nothing.

        Products of a few rows get about 1.7 times as fast; the memory of the experts' weights
        doubles. Used by forward passes without gradient, until the layer is set to training, an
        optimiser makes a step, or a parameter changes in another way (but not through its
        ``data``).

        Args:
            dtype: float32, or bfloat16 to read half as much: faster, and results rounded to 8 bits.
                Where that cannot be had, a warning says why. Or int8, to read a quarter: inputs
                and weights are rounded to 8 bits.

        Raises:
            ValueError: for another dtype.
        """
        if dtype not in (torch.float32, torch.bfloat16, torch.int8):
            raise ValueError(
                f"dtype must be torch.float32, torch.bfloat16 or torch.int8, not {dtype}"
            )
        reason = self._packing_obstacle()
        if dtype != torch.float32 and (why := reason or _dtype_obstacle(dtype)) is not None:
            _warn_of_float32(dtype, why)
            dtype = torch.float32
        self.experts.packed = PackedWeights(self.experts, dtype) if reason is None else None

    def _packing_obstacle(self) -> Optional[str]:
        if self.backend not in ("auto", "sorted"):
            return f"backend {self.backend!r} has no use for it"
        if isinstance(self.experts.activation_fn, nn.Module):
            return "an activation that is a Module takes backend 'loop'"
        return obstacle(self.experts)

    def end_update(self, all_reduce: Optional[AllReduce] = None) -> None:
        """Adapt the balance bias and the running means; see :meth:`Router.end_update`."""
        self.router.end_update(all_reduce)

    def drop_update(self) -> None:
        """Forget the batches since the last :meth:`end_update`; see :meth:`Router.drop_update`."""
        self.router.drop_update()


def _dtype_obstacle(dtype: torch.dtype) -> Optional[str]:
    if dtype == torch.bfloat16 and not has_bfloat16():
        return "this CPU has no products of bfloat16"
    if dtype == torch.int8 and not has_int8():
        return "this PyTorch has no products of 8-bit numbers"
    return None


@functools.cache
def _warn_of_float32(dtype: torch.dtype, reason: str) -> None:
    """Once for each reason, not for each layer."""
    name = str(dtype).replace("torch.", "")
    logger.warning("the experts' weights are not laid out in %s: %s", name, reason)


def moe_layers(model: nn.Module) -> Iterator[MoEFeedForward]:
    """The mixtures of experts in a model."""
    return (module for module in model.modules() if isinstance(module, MoEFeedForward))
