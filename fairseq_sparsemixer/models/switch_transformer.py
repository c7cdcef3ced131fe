"""The Switch Transformer for translation: fairseq's transformer with experts in some layers."""

import argparse
from typing import Any, Callable, Dict, Optional, Union

import torch
import torch.distributed as dist
from fairseq.checkpoint_utils import prune_state_dict
from fairseq.data import Dictionary
from fairseq.dataclass.utils import gen_parser_from_dataclass, merge_with_parent
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
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor, nn
from torch.nn.parallel.distributed import DistributedDataParallel

from fairseq_sparsemixer.models.config import (
    ConfigError,
    SwitchTransformerConfig,
    check_workers,
    expert_settings,
)
from fairseq_sparsemixer.models.layers import (
    STATISTICS,
    Call,
    Layers,
    SwitchTransformerDecoderLayer,
    SwitchTransformerEncoderLayer,
)
from fairseq_sparsemixer.moe import ROUTERS
from fairseq_sparsemixer.moe.parallel import ExpertParallel, is_spread

Settings = Union[argparse.Namespace, DictConfig]


def _given(settings: Settings) -> argparse.Namespace:
    """The settings that are not None."""
    if isinstance(settings, DictConfig):
        values: Any = OmegaConf.to_container(settings, resolve=True, enum_to_str=True)
    else:
        values = vars(settings)
    return argparse.Namespace(**{k: v for k, v in values.items() if v is not None})


def fill_gaps(settings: Settings, fill: Callable[[argparse.Namespace], Any]) -> None:
    """Give the settings that are missing or None what one of fairseq's architectures says.

    Args:
        settings: flags or hydra's node, changed in place.
        fill: sets the attributes that its argument does not have.
    """
    filled = _given(settings)
    fill(filled)
    for name in SwitchTransformerConfig.__dataclass_fields__:
        value = getattr(filled, name, None)
        if value is not None and not name.startswith("_"):
            setattr(settings, name, value)


def _expand(settings: Settings) -> TransformerConfig:
    """fairseq's nested settings, with those of the experts as ``experts``.

    Raises:
        ConfigError: for a setting that is unknown, out of range or not supported.
    """
    if getattr(settings, "scale_fc", False):
        raise ConfigError("--scale-fc must be off: experts have no inner layer norm")
    if isinstance(settings, DictConfig):
        # hydra builds the node before it knows this dataclass: fill in and refuse unknown keys.
        try:
            settings = merge_with_parent(SwitchTransformerConfig(), settings)
        except OmegaConfBaseException as error:
            raise ConfigError(f"model settings: {str(error).splitlines()[0]}") from None
    args = _given(SwitchTransformerConfig.from_namespace(settings))
    transformer_legacy.base_architecture(args)
    for name, field in SwitchTransformerConfig.__dataclass_fields__.items():
        if not hasattr(args, name):
            setattr(args, name, field.default)
    experts = expert_settings(args)
    cfg = TransformerConfig.from_namespace(_given(args))
    cfg.experts = experts
    cfg.expert_parallel = _expert_parallel(experts.parallel_size)
    return cfg


def _expert_parallel(size: int) -> Optional[ExpertParallel]:
    """What spreads the experts, where several workers train; else whoever reads them has all."""
    if size == 1 or not (dist.is_available() and dist.is_initialized()):
        return None
    check_workers(size, dist.get_world_size())
    return ExpertParallel(size)


@register_model("switch_transformer", dataclass=SwitchTransformerConfig)
class SwitchTransformerModel(TransformerModelBase):
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

    @classmethod
    def add_args(cls, parser: argparse.ArgumentParser) -> None:
        """Add a flag for every field of :class:`SwitchTransformerConfig`."""
        # Without defaults: a flag that is not given is for the architecture to fill.
        gen_parser_from_dataclass(
            parser, SwitchTransformerConfig(), delete_default=True, with_prefix=""
        )

    @classmethod
    def build_model(cls, settings: Settings, task: FairseqTask) -> "SwitchTransformerModel":
        """Build the model from flags or from hydra's node.

        Raises:
            ConfigError: for a setting that is unknown, out of range or not supported.
        """
        cfg = _expand(settings)
        try:
            model = super().build_model(cfg, task)
        except ValueError as error:
            # fairseq's own checks of flags that do not fit together
            raise ConfigError(str(error)) from error
        if cfg.expert_parallel is not None:
            DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(
                model, [name for name, value in model.named_parameters() if is_spread(value)]
            )
        return model

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

    def load_state_dict(
        self,
        state_dict: Dict[str, Tensor],
        strict: bool = True,
        model_cfg: Optional[Settings] = None,
        args: Optional[argparse.Namespace] = None,
    ) -> Any:
        """Load parameters, of the layers to keep.

        Raises:
            ConfigError: for a checkpoint of another shape, naming the first parameter that differs.
        """
        if model_cfg is not None:
            _keep_the_other_side(model_cfg, state_dict)
            # Here rather than in fairseq, so that a difference is looked for in what is loaded.
            state_dict = prune_state_dict(state_dict, model_cfg)
        try:
            return super().load_state_dict(state_dict, strict, model_cfg, args)
        except RuntimeError as error:
            difference = _first_difference(self._whole_shapes(), state_dict)
            if difference is None:
                raise
            raise ConfigError(
                f"the checkpoint does not fit the model: {difference}; give the --arch, --router, "
                "--num-experts and layer flags that it was trained with, or another --save-dir"
            ) from error

    def _whole_shapes(self) -> Dict[str, torch.Size]:
        """Of what a checkpoint holds of it, whichever worker's experts these are."""
        size = self.cfg.experts.parallel_size
        spread = {name for name, value in self.named_parameters() if is_spread(value)}
        return {
            name: torch.Size([size * len(value), *value.shape[1:]])
            if name in spread
            else value.shape
            for name, value in self.state_dict().items()
        }


def _keep_the_other_side(settings: Settings, state_dict: Dict[str, Tensor]) -> None:
    """Keep all layers of the encoder where only the decoder is pruned, and the other way round.

    fairseq drops every layer of a side without ``layers_to_keep`` where the other has one.
    """
    sides = ("encoder", "decoder")
    kept = [getattr(settings, f"{side}_layers_to_keep", None) for side in sides]
    if not any(kept):
        return
    for side, layers in zip(sides, kept):
        if not layers:
            prefix = f"{side}.layers."
            numbers = {n[len(prefix) :].split(".")[0] for n in state_dict if n.startswith(prefix)}
            setattr(settings, f"{side}_layers_to_keep", ",".join(sorted(numbers, key=int)))


def _first_difference(here: Dict[str, torch.Size], there: Dict[str, Tensor]) -> Optional[str]:
    """Which parameter of the model differs from the checkpoint's in name or shape."""
    for name, shape in here.items():
        if name not in there:
            return f"it has no {name}"
        if there[name].shape != shape:
            return f"{name} is {tuple(there[name].shape)} there and {tuple(shape)} here"
    extra = [name for name in there if name not in here]
    return f"the model has no {extra[0]}" if extra else None


def _has_experts(cfg: TransformerConfig) -> bool:
    """Whether a layer of either side holds experts; without any the model is fairseq's own."""
    return bool(cfg.experts.encoder_layers or cfg.experts.decoder_layers)


def _wrap_layer(layer: nn.Module, cfg: TransformerConfig) -> nn.Module:
    """Activation checkpointing and sharding, as fairseq applies them to its own layers."""
    if cfg.checkpoint_activations:
        layer = checkpoint_wrapper(layer, offload_to_cpu=cfg.offload_activations)
    min_params = 0 if cfg.checkpoint_activations else cfg.min_params_to_wrap
    return fsdp_wrap(layer, min_num_params=min_params)


class _SideCall(Call):
    """Of an encoder or decoder, whose layers it hands the ids of the tokens that they see.

    Args:
        side: the encoder or decoder.
        tokens: (batch, length) int64, entries of the vocabulary.
    """

    def __init__(self, side: Any, tokens: Tensor) -> None:
        super().__init__(side)
        reads_them = ROUTERS[side.cfg.experts.router].needs_token_ids
        token_ids = tokens.t() if reads_them else None
        self.layers = Layers(side.layers, token_ids, side.cfg.expert_parallel)


class SwitchTransformerEncoder(TransformerEncoderBase):
    """fairseq's encoder; the layers in ``cfg.experts.encoder_layers`` hold experts.

    Puts out their routing statistics, too, as ``routing_statistics``.
    """

    def __init__(self, cfg: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        # fairseq builds its layers in order, without telling which one it wants.
        self._to_build = list(cfg.experts.encoder_kept)
        super().__init__(cfg, *args, **kwargs)

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
        super().__init__(cfg, *args, **kwargs)

    def extract_features(
        self,
        prev_output_tokens: Tensor,
        encoder_out: Optional[Dict[str, Any]] = None,
        incremental_state: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """See fairseq."""
        new_tokens = prev_output_tokens if incremental_state is None else prev_output_tokens[:, -1:]
        call: Any = _SideCall(self, new_tokens)
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
