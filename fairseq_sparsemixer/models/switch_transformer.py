"""The Switch Transformer for translation: fairseq's transformer with experts in some layers."""

import contextlib
import functools
from typing import Any, Callable, Dict, Optional, Sequence, Tuple

import torch
from fairseq.data import Dictionary
from fairseq.distributed import fsdp_wrap
from fairseq.models import register_model
from fairseq.models.transformer import (
    TransformerConfig,
    TransformerDecoderBase,
    TransformerEncoderBase,
    TransformerModelBase,
    transformer_legacy,
)
from fairseq.modules.checkpoint_activations import checkpoint_wrapper
from fairseq.modules.transformer_layer import (
    TransformerDecoderLayerBase,
    TransformerEncoderLayerBase,
)
from fairseq.tasks import FairseqTask
from omegaconf import DictConfig
from torch import Tensor, nn

from fairseq_sparsemixer.models.building import (
    INPUTS,
    TEXTS,
    Settings,
    SwitchModel,
    naming_conflicts,
)
from fairseq_sparsemixer.models.config import SwitchTransformerConfig
from fairseq_sparsemixer.models.laid_out import SIDE_TYPES, lay_out
from fairseq_sparsemixer.models.languages import keep_tags, of_side, tokens_and_languages
from fairseq_sparsemixer.models.layers import (
    STATISTICS,
    Call,
    Layers,
    SwitchTransformerDecoderLayer,
    SwitchTransformerEncoderLayer,
)
from fairseq_sparsemixer.moe import ROUTERS


@register_model("switch_transformer", dataclass=SwitchTransformerConfig)
class SwitchTransformerModel(SwitchModel, TransformerModelBase):
    """Switch Transformer (Fedus et al. 2021, arXiv 2101.03961) for translation.

    fairseq's encoder-decoder transformer whose layers 0, 2, 4, ... have experts for their
    feed-forward network, routed with SparseMixer (arXiv 2310.00811) or another of
    :data:`fairseq_sparsemixer.moe.ROUTERS`. Everything that fairseq's transformer can do, it can
    do, apart from quantization noise and ``scale_fc``.

    >>> model = SwitchTransformerModel.from_pretrained(
    ...     "runs/demo/sparsemixer", "checkpoint_best.pt", bpe="sentencepiece"
    ... )
    >>> model.translate("The device is not available.")
    """

    base_architecture = staticmethod(transformer_legacy.base_architecture)
    tasks = "translation or translation_with_routing"
    refused_tasks = (*TEXTS, *INPUTS)

    @classmethod
    def build_model(cls, settings: Settings, task: FairseqTask) -> "SwitchTransformerModel":
        """Build the model from flags or from hydra's node.

        Raises:
            ConfigError: for a setting that is unknown, out of range or not supported.
        """
        cfg = cls._expand(cls._read(settings, task), task)
        with naming_conflicts():
            return cls._finished(super().build_model(cfg, task), cfg)

    def prepare_for_inference_(self, cfg: DictConfig) -> None:
        """Called by fairseq's generate, interactive and from_pretrained before they translate."""
        super().prepare_for_inference_(cfg)
        if getattr(self, "layout", None) is None:  # one of 8 bits stays
            lay_out(self)

    @classmethod
    def build_encoder(
        cls, cfg: TransformerConfig, src_dict: Dictionary, embed_tokens: nn.Embedding
    ) -> TransformerEncoderBase:
        """The encoder, called by fairseq's ``build_model``."""
        kind = SwitchTransformerEncoder if _has_experts(cfg) else TransformerEncoderBase
        return kind(cfg, src_dict, embed_tokens)

    @classmethod
    def build_decoder(
        cls, cfg: TransformerConfig, tgt_dict: Dictionary, embed_tokens: nn.Embedding
    ) -> TransformerDecoderBase:
        """The decoder, called by fairseq's ``build_model``."""
        kind = SwitchTransformerDecoder if _has_experts(cfg) else TransformerDecoderBase
        return kind(cfg, tgt_dict, embed_tokens, no_encoder_attn=cfg.no_cross_attention)


def _has_experts(cfg: TransformerConfig) -> bool:
    """Whether a layer of either side holds experts; without any the model is fairseq's own."""
    return bool(cfg.experts.encoder_layers or cfg.experts.decoder_layers)


def _wrap_layer(layer: nn.Module, cfg: TransformerConfig) -> nn.Module:
    """Activation checkpointing and sharding, as fairseq applies them to its own layers."""
    if cfg.checkpoint_activations:
        # Partial functions are copied with their layer, as closures are not.
        layer.forward = functools.partial(_compute, layer.forward)
        layer = checkpoint_wrapper(layer, offload_to_cpu=cfg.offload_activations)
        layer.forward = functools.partial(_call, layer.forward)
    min_params = 0 if cfg.checkpoint_activations else cfg.min_params_to_wrap
    return fsdp_wrap(layer, min_num_params=min_params)


def _call(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Tell a layer under what it is computed, for when it is computed again.

    fairseq does that without autocast: near ties of a router's logits would go to other experts.
    """
    autocast = [
        (device, torch.get_autocast_dtype(device))
        for device in ("cpu", "cuda")
        if torch.is_autocast_enabled(device)
    ]
    return forward(*args, autocast=autocast, **kwargs)


def _compute(
    forward: Callable[..., Any],
    *args: Any,
    autocast: Sequence[Tuple[str, torch.dtype]] = (),
    **kwargs: Any,
) -> Any:
    with contextlib.ExitStack() as stack:
        for device, dtype in autocast:
            stack.enter_context(torch.autocast(device, dtype))
        return forward(*args, **kwargs)


class _SideCall(Call):
    """Of an encoder or decoder, whose layers it hands the ids of the tokens that they see.

    Args:
        side: the encoder or decoder.
        tokens: (batch, length) int64, entries of the vocabulary.
        causal: whether a token may know of those before it alone.
        last_alone: whether the layers see the last token of each sentence alone.
    """

    def __init__(
        self, side: Any, tokens: Tensor, causal: bool = False, last_alone: bool = False
    ) -> None:
        super().__init__(side)
        token_ids = None
        if ROUTERS[side.cfg.experts.router].needs_token_ids:
            if side.language_tags is not None:
                tokens = tokens_and_languages(tokens, side.language_tags, so_far=causal)
            token_ids = (tokens[:, -1:] if last_alone else tokens).t()
        self.layers = Layers(side.layers, token_ids, side.cfg.expert_parallel)


class SwitchTransformerEncoder(TransformerEncoderBase):
    """fairseq's encoder; the layers in ``cfg.experts.encoder_layers`` hold experts.

    Puts out their routing statistics, too, as ``routing_statistics``.
    """

    def __init__(self, cfg: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        # fairseq builds its layers in order, without telling which one it wants.
        self._to_build = list(cfg.experts.encoder_kept)
        super().__init__(of_side(cfg, "encoder"), *args, **kwargs)
        keep_tags(self, cfg.language_tags, "encoder")

    def forward(self, src_tokens: Tensor, *args: Any, **kwargs: Any) -> Dict[str, Any]:
        """See fairseq."""
        call: Any = _SideCall(self, src_tokens)
        outputs = TransformerEncoderBase.forward_scriptable(call, src_tokens, *args, **kwargs)
        return {**outputs, STATISTICS: call.layers.statistics}

    def build_encoder_layer(self, cfg: TransformerConfig) -> nn.Module:
        """The next layer, with experts or dense."""
        number = self._to_build.pop(0)
        if number not in cfg.experts.encoder_layers:
            return _wrap_layer(TransformerEncoderLayerBase(cfg, return_fc=self.return_fc), cfg)
        layer = SwitchTransformerEncoderLayer(
            cfg, return_fc=self.return_fc, layer_name=f"encoder.{number}"
        )
        return _wrap_layer(layer, cfg)


class SwitchTransformerDecoder(TransformerDecoderBase):
    """fairseq's decoder; the layers in ``cfg.experts.decoder_layers`` hold experts.

    The second of its outputs holds as ``routing_statistics`` those of the encoder's layers and of
    its own, so that they reach the criterion with the model's output. Not when decoding step by
    step.
    """

    def __init__(self, cfg: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        self._to_build = list(cfg.experts.decoder_kept)
        super().__init__(of_side(cfg, "decoder"), *args, **kwargs)
        keep_tags(self, cfg.language_tags, "decoder")

    def extract_features(
        self,
        prev_output_tokens: Tensor,
        encoder_out: Optional[Dict[str, Any]] = None,
        incremental_state: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """See fairseq."""
        call: Any = _SideCall(
            self, prev_output_tokens, causal=True, last_alone=incremental_state is not None
        )
        x, extra = TransformerDecoderBase.extract_features_scriptable(
            call, prev_output_tokens, encoder_out, incremental_state, *args, **kwargs
        )
        if incremental_state is None:
            of_encoder = {} if encoder_out is None else encoder_out.get(STATISTICS, {})
            extra = {**extra, STATISTICS: {**of_encoder, **call.layers.statistics}}
        return x, extra

    def build_decoder_layer(
        self, cfg: TransformerConfig, no_encoder_attn: bool = False
    ) -> nn.Module:
        """The next layer, with experts or dense."""
        number = self._to_build.pop(0)
        if number not in cfg.experts.decoder_layers:
            return _wrap_layer(TransformerDecoderLayerBase(cfg, no_encoder_attn), cfg)
        layer = SwitchTransformerDecoderLayer(cfg, no_encoder_attn, layer_name=f"decoder.{number}")
        return _wrap_layer(layer, cfg)


SIDE_TYPES.update((SwitchTransformerEncoder, SwitchTransformerDecoder))
