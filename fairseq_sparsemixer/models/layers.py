"""fairseq's transformer layers with a mixture of experts for their feed-forward network.

fairseq's layer computes ``fc2(activation_dropout(activation(fc1(x))))``. Here ``fc1`` is the whole
mixture and the rest are identities, so that no forward has to be copied.
"""

import functools
import logging
import threading
from typing import Any, Callable, Dict, Optional, Tuple

import torch
from fairseq import utils
from fairseq.models.transformer import TransformerConfig
from fairseq.modules.transformer_layer import (
    TransformerDecoderLayerBase,
    TransformerEncoderLayerBase,
)
from torch import Tensor, nn

from fairseq_sparsemixer.moe import MoEFeedForward, RoutingStatistics

logger = logging.getLogger(__name__)


class _Call(threading.local):
    """What one forward pass of a layer hands to its feed-forward network; each thread has its own.

    Copies and pickles as a fresh one.
    """

    padding_mask: Optional[Tensor] = None
    """(batch, length)."""
    with_statistics = True
    routing_sums: Optional[Tensor] = None
    """What comes back: (3 + 4N,)."""

    def __reduce__(self) -> Tuple[Any, ...]:
        return _Call, ()


class SwitchLayer(nn.Module):
    """What encoder and decoder layers share.

    The sums that the routing losses need leave the layer beside its output, as a tensor
    (:meth:`~fairseq_sparsemixer.moe.RoutingStatistics.pack`), and are taken off in ``__call__``.
    That is outside of ``forward``, which fairseq's activation checkpointing replaces by one that
    runs without gradient, so the losses keep theirs.

    Args:
        cfg: fairseq's settings, with the :class:`ExpertSettings` as ``cfg.experts``.
        layer_name: "encoder.0", "decoder.2", ...: the place of the layer, for logs.
    """

    routing_statistics: Optional[Tensor]
    """(3 + 4N,) of the last forward, until the criterion takes it."""
    token_ids: Optional[Tensor]
    """(length, batch) int64 of the batch at hand, set by the model where the router needs it."""

    def __init__(self, cfg: TransformerConfig, *args: Any, layer_name: str, **kwargs: Any) -> None:
        self.cfg = cfg  # build_fc1, which fairseq's constructor calls, is not given it
        super().__init__(cfg, *args, **kwargs)
        self.layer_name = layer_name
        self.activation_fn = _identity
        self.activation_dropout_module = nn.Identity()
        self.routing_statistics = None
        self.token_ids: Optional[Tensor] = None
        self._call = _Call()

    def build_fc1(self, input_dim: int, output_dim: int, *_: Any) -> Callable[[Tensor], Tensor]:
        """The mixture, kept as ``moe``; what fairseq calls as ``fc1`` is a method."""
        cfg, experts = self.cfg, self.cfg.experts
        dropout = experts.activation_dropout
        if dropout is None:
            dropout = cfg.activation_dropout or cfg.relu_dropout or 0.0
        self.moe = MoEFeedForward(
            input_dim,
            output_dim,
            experts.num_experts,
            router=experts.router,
            top_k=experts.top_k,
            jitter_eps=experts.jitter_eps,
            activation_fn=utils.get_activation_fn(cfg.activation_fn),
            activation_dropout=float(dropout),
            output_masking=experts.output_masking,
            backend=experts.backend,
            recompute=experts.recompute,
            **experts.router_options,
        )
        return self._feed_forward

    def build_fc2(self, *_: Any) -> nn.Module:
        """Nothing is left to do."""
        return nn.Identity()

    def make_generation_fast_(self, **_: Any) -> None:
        """Called by fairseq's generate, interactive and from_pretrained before they translate."""
        self.moe.prepare_for_inference(self.cfg.experts.inference_dtype)

    def _feed_forward(self, x: Tensor) -> Tensor:
        # fairseq's layers are (length, batch, width), their masks (batch, length).
        call = self._call
        mask = None if call.padding_mask is None else call.padding_mask.t()
        y, routing = self.moe(x, mask, self.token_ids)
        if call.with_statistics:
            call.routing_sums = RoutingStatistics.from_routing(routing).pack()
        return y

    def _run(
        self, padding_mask: Optional[Tensor], with_statistics: bool, *args: Any, **kwargs: Any
    ) -> Tuple:
        """fairseq's forward, with the routing statistics (or None) appended to its outputs."""
        call = self._call
        call.padding_mask, call.with_statistics = padding_mask, with_statistics
        try:
            outputs = super().forward(*args, **kwargs)
            sums = call.routing_sums
        finally:
            call.padding_mask = call.routing_sums = None
        return (*outputs, sums) if isinstance(outputs, tuple) else (outputs, sums)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the layer, keep its statistics for the criterion, return what fairseq expects."""
        if self.training and self.routing_statistics is not None:
            _warn_unused_statistics()
        *outputs, self.routing_statistics = super().__call__(*args, **kwargs)
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    def take_routing_statistics(self) -> Tensor:
        """(3 + 4N,) float32 of the last forward, zeros if there was none; clears it."""
        sums, self.routing_statistics = self.routing_statistics, None
        if sums is None:
            device = self.moe.experts.w1.device
            sums = torch.zeros(3 + 4 * self.moe.router.num_experts, device=device)
        return sums


@functools.cache
def _warn_unused_statistics() -> None:
    """Once: a criterion that does not know of experts leaves them without a balance loss."""
    logger.warning(
        "the criterion ignores the routing losses, so nothing balances the experts; "
        "use --criterion label_smoothed_cross_entropy_with_routing"
    )


def switch_layers(model: nn.Module) -> Dict[str, SwitchLayer]:
    """The layers with experts by name ("encoder.0", ...)."""
    return {m.layer_name: m for m in model.modules() if isinstance(m, SwitchLayer)}


def _identity(x: Tensor) -> Tensor:
    return x


class SwitchTransformerEncoderLayer(SwitchLayer, TransformerEncoderLayerBase):
    """fairseq's encoder layer with experts."""

    def forward(
        self,
        x: Tensor,
        encoder_padding_mask: Optional[Tensor],
        attn_mask: Optional[Tensor] = None,
    ) -> Tuple:
        """See fairseq; the last output is the packed routing statistics."""
        return self._run(encoder_padding_mask, True, x, encoder_padding_mask, attn_mask=attn_mask)


class SwitchTransformerDecoderLayer(SwitchLayer, TransformerDecoderLayerBase):
    """fairseq's decoder layer with experts."""

    def forward(
        self,
        x: Tensor,
        encoder_out: Optional[Tensor] = None,
        encoder_padding_mask: Optional[Tensor] = None,
        incremental_state: Optional[Dict[str, Dict[str, Optional[Tensor]]]] = None,
        *args: Any,
        self_attn_padding_mask: Optional[Tensor] = None,
        **kwargs: Any,
    ) -> Tuple:
        """See fairseq; the last output is the packed routing statistics, None when decoding."""
        return self._run(
            self_attn_padding_mask,
            incremental_state is None,
            x,
            encoder_out,
            encoder_padding_mask,
            incremental_state,
            *args,
            self_attn_padding_mask=self_attn_padding_mask,
            **kwargs,
        )
