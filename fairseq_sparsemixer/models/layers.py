"""fairseq's transformer layers with a mixture of experts for their feed-forward network.

fairseq's layer computes ``fc2(activation_dropout(activation(fc1(x))))``. Here ``fc1`` is the whole
mixture and the rest are identities, so that no forward has to be copied.
"""

import functools
import itertools
from typing import Any, Callable, Dict, Iterator, Optional, Tuple

import torch
from fairseq import utils
from fairseq.models.transformer import TransformerConfig
from fairseq.modules.layer_drop import LayerDropModuleList
from fairseq.modules.transformer_layer import (
    TransformerDecoderLayerBase,
    TransformerEncoderLayerBase,
)
from torch import Tensor, nn

from fairseq_sparsemixer.moe import MoEFeedForward, RoutingStatistics
from fairseq_sparsemixer.moe.parallel import ExpertParallel

STATISTICS = "routing_statistics"
"""The key under which encoder and decoder put out the sums (3 + 4N,) of each layer, by its name."""


class Call:
    """A module as one call sees it: its attributes, and those that a subclass adds.

    fairseq's forward is run on it in place of the module. What belongs to a call thus lies on no
    module: not in another thread's way, nor in that of a copy, and ``torch.compile`` sees it.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


class Recorded(Call):
    """A module whose last output its caller keeps to itself."""

    output: Any

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's output."""
        self.output = self._module(*args, **kwargs)
        return self.output


class _LayerCall(Call):
    """Of a layer: its feed-forward network is the mixture."""

    def __init__(
        self,
        layer: nn.Module,
        padding_mask: Optional[Tensor],
        token_ids: Optional[Tensor],
        with_statistics: bool = True,
    ) -> None:
        super().__init__(layer)
        self._padding_mask = padding_mask
        self._token_ids = token_ids
        self._with_statistics = with_statistics
        self._sums: Optional[Tensor] = None

    def fc1(self, x: Tensor) -> Tensor:
        """The mixture, which fairseq calls with (length, batch, width)."""
        mask = self._padding_mask  # (batch, length)
        y, routing = self.moe(x, None if mask is None else mask.t(), self._token_ids)
        if self._with_statistics:
            self._sums = RoutingStatistics.packed(routing)
        return y

    def beside(self, outputs: Any) -> Tuple:
        """fairseq's outputs of the layer, with the sums (3 + 4N,) or None appended."""
        return (*outputs, self._sums) if isinstance(outputs, tuple) else (outputs, self._sums)


class Layers:
    """fairseq's list of layers, in one call of an encoder or decoder.

    Hands its token ids to the layers with experts, and keeps what these have beside their outputs.

    Args:
        layers: iterated over when fairseq does so, since that draws LayerDrop.
        token_ids: (length, batch) int64, None where no router reads them.
        parallel: where the experts are spread over workers, which then leave out the same layers.
    """

    def __init__(
        self,
        layers: nn.ModuleList,
        token_ids: Optional[Tensor],
        parallel: Optional[ExpertParallel] = None,
    ) -> None:
        self._layers = layers
        self._token_ids = token_ids
        self._parallel = parallel
        self.statistics: Dict[str, Tensor] = {}
        """(3 + 4N,) of each layer that ran, with gradient, by its name."""

    def __iter__(self) -> Iterator[Callable[..., Any]]:
        drawn = isinstance(self._layers, LayerDropModuleList) and self._layers.training
        together = drawn and self._parallel is not None
        for layer in self._drawn_together() if together else self._layers:
            # What fairseq wraps a layer in has its attributes.
            name = getattr(layer, "layer_name", None)
            yield layer if name is None else functools.partial(self._run, layer, name)

    def _drawn_together(self) -> Iterator[nn.Module]:
        """Those that the first worker of the group has drawn: all call the same exchanges."""
        assert self._parallel is not None
        drawn = set(self._layers)
        every = list(self._layers.children())
        device = next(self._layers.parameters()).device
        runs = torch.tensor([layer in drawn for layer in every], device=device)
        return itertools.compress(every, self._parallel.agree(runs).tolist())

    def _run(self, layer: nn.Module, name: str, *args: Any, **kwargs: Any) -> Any:
        *outputs, sums = layer(*args, **kwargs, token_ids=self._token_ids)
        if sums is not None:
            self.statistics[name] = sums
        return outputs[0] if len(outputs) == 1 else tuple(outputs)


class SwitchLayer(nn.Module):
    """What encoder and decoder layers share.

    The sums that the routing losses need leave the layer beside its output, as a tensor
    (:meth:`~fairseq_sparsemixer.moe.RoutingStatistics.pack`): fairseq's activation checkpointing
    runs the forward without gradient, so that only what is put out has one.

    Args:
        cfg: fairseq's settings, with the :class:`ExpertSettings` as ``cfg.experts``, and as
            ``cfg.init_experts`` what initialises :class:`Experts` (None: as they do themselves).
        layer_name: "encoder.0", "decoder.2", ...: the place of the layer, for logs.
    """

    def __init__(self, cfg: TransformerConfig, *args: Any, layer_name: str, **kwargs: Any) -> None:
        self.cfg = cfg  # build_fc1, which fairseq's constructor calls, is not given it
        super().__init__(cfg, *args, **kwargs)
        self.layer_name = layer_name
        self.activation_fn = _identity
        self.activation_dropout_module = nn.Identity()

    def build_fc1(self, input_dim: int, output_dim: int, *_: Any) -> None:
        """The mixture, kept as ``moe``; what fairseq calls as ``fc1`` is that of the call."""
        cfg, experts = self.cfg, self.cfg.experts
        dropout = experts.activation_dropout
        if dropout is None:
            dropout = cfg.activation_dropout or cfg.relu_dropout or 0.0
        linear = cfg.activation_fn == "linear"  # fairseq's is a lambda, which cannot be pickled
        self.moe = MoEFeedForward(
            input_dim,
            output_dim,
            experts.num_experts,
            router=experts.router,
            top_k=experts.top_k,
            jitter_eps=experts.jitter_eps,
            activation_fn="linear" if linear else utils.get_activation_fn(cfg.activation_fn),
            activation_dropout=float(dropout),
            output_masking=experts.output_masking,
            backend=experts.backend,
            recompute=experts.recompute,
            **experts.router_options,
        )
        if cfg.init_experts is not None:
            cfg.init_experts(self.moe.experts)
        if cfg.expert_parallel is not None:
            self.moe.experts.spread(cfg.expert_parallel)

    def build_fc2(self, *_: Any) -> nn.Module:
        """Nothing is left to do."""
        return nn.Identity()

    def make_generation_fast_(self, **_: Any) -> None:
        """Called by fairseq's generate, interactive and from_pretrained before they translate."""
        self.moe.prepare_for_inference(self.cfg.experts.inference_dtype)


def switch_layers(model: nn.Module) -> Dict[str, SwitchLayer]:
    """The layers with experts by name ("encoder.0", ...)."""
    return {m.layer_name: m for m in model.modules() if isinstance(m, SwitchLayer)}


def routing_statistics(model: nn.Module, output: Any) -> Dict[str, Tensor]:
    """The packed statistics (3 + 4N,) of each layer with experts, by its name, with gradient.

    A layer that LayerDrop left out has zeros, as one without tokens: on the CPU workers leave out
    different layers, and what they add up must have one form.

    Args:
        model: maybe wrapped, by ``torch.compile`` too.
        output: of ``model(**net_input)``.
    """
    layers = switch_layers(model)
    if not layers:
        return {}
    ran = output[1][STATISTICS]
    return {
        name: ran[name]
        if name in ran
        else output[0].new_zeros(3 + 4 * layer.moe.router.num_experts, dtype=torch.float32)
        for name, layer in layers.items()
    }


def _identity(x: Tensor) -> Tensor:
    return x


class SwitchTransformerEncoderLayer(SwitchLayer, TransformerEncoderLayerBase):
    """fairseq's encoder layer with experts."""

    def forward(
        self,
        x: Tensor,
        encoder_padding_mask: Optional[Tensor],
        attn_mask: Optional[Tensor] = None,
        token_ids: Optional[Tensor] = None,
    ) -> Tuple:
        """See fairseq; the last output is the packed routing statistics.

        Args:
            token_ids: (length, batch) int64, for routers that read them.
        """
        call: Any = _LayerCall(self, encoder_padding_mask, token_ids)
        outputs = TransformerEncoderLayerBase.forward(
            call, x, encoder_padding_mask, attn_mask=attn_mask
        )
        return call.beside(outputs)


class SwitchTransformerDecoderLayer(SwitchLayer, TransformerDecoderLayerBase):
    """fairseq's decoder layer with experts."""

    def make_generation_fast_(self, **kwargs: Any) -> None:
        """Called by fairseq before it translates, see there."""
        SwitchLayer.make_generation_fast_(self)
        TransformerDecoderLayerBase.make_generation_fast_(self, **kwargs)

    def forward(
        self,
        x: Tensor,
        encoder_out: Optional[Tensor] = None,
        encoder_padding_mask: Optional[Tensor] = None,
        incremental_state: Optional[Dict[str, Dict[str, Optional[Tensor]]]] = None,
        *args: Any,
        self_attn_padding_mask: Optional[Tensor] = None,
        token_ids: Optional[Tensor] = None,
        **kwargs: Any,
    ) -> Tuple:
        """See fairseq; the last output is the packed routing statistics, None when decoding.

        Args:
            token_ids: (length, batch) int64, for routers that read them.
        """
        call: Any = _LayerCall(
            self, self_attn_padding_mask, token_ids, with_statistics=incremental_state is None
        )
        outputs = TransformerDecoderLayerBase.forward(
            call,
            x,
            encoder_out,
            encoder_padding_mask,
            incremental_state,
            *args,
            self_attn_padding_mask=self_attn_padding_mask,
            **kwargs,
        )
        return call.beside(outputs)
