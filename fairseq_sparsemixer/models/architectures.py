"""Named architectures: fairseq's sizes with experts in every other layer."""

import argparse
from typing import Any, Mapping

from fairseq.models import MODEL_REGISTRY, register_model_architecture, transformer_lm
from fairseq.models.roberta import model as roberta
from fairseq.models.transformer import transformer_legacy

from fairseq_sparsemixer.models import (  # noqa: F401  (registers them)
    switch_electra,
    switch_roberta,
    switch_transformer,
    switch_transformer_lm,
)
from fairseq_sparsemixer.models.building import Fill, Settings, fill_gaps


def demo_architecture(args: argparse.Namespace) -> None:
    """3 + 3 layers of width 192: what two CPU cores train in some minutes."""
    _default(args, "encoder_embed_dim", 192)
    _default(args, "encoder_ffn_embed_dim", 768)
    for side in ("encoder", "decoder"):
        _default(args, f"{side}_layers", 3)
        _default(args, f"{side}_attention_heads", 4)
        _default(args, f"{side}_normalize_before", True)
    transformer_legacy.base_architecture(args)


def _default(args: argparse.Namespace, name: str, value: Any) -> None:
    if not hasattr(args, name):
        setattr(args, name, value)


def roberta_tiny_architecture(args: argparse.Namespace) -> None:
    """4 layers of width 128: what two CPU cores pre-train in some minutes."""
    _default(args, "encoder_embed_dim", 128)
    _default(args, "encoder_ffn_embed_dim", 512)
    _default(args, "encoder_layers", 4)
    _default(args, "encoder_attention_heads", 2)
    roberta.base_architecture(args)


def electra_tiny_architecture(args: argparse.Namespace) -> None:
    """:func:`roberta_tiny_architecture`, and a generator of half that width."""
    _default(args, "generator_embed_dim", 64)
    roberta_tiny_architecture(args)


def electra_small_architecture(args: argparse.Namespace) -> None:
    """ELECTRA-Small, but for embeddings that are as wide as the layers."""
    _default(args, "encoder_embed_dim", 256)
    _default(args, "encoder_ffn_embed_dim", 1024)
    _default(args, "encoder_attention_heads", 4)
    _default(args, "generator_embed_dim", 64)
    roberta.base_architecture(args)


def electra_base_architecture(args: argparse.Namespace) -> None:
    """ELECTRA-Base: the generator has a third of the discriminator's width."""
    _default(args, "generator_embed_dim", 256)
    roberta.base_architecture(args)


def lm_demo_architecture(args: argparse.Namespace) -> None:
    """4 layers of width 192: what two CPU cores train in some minutes."""
    _default(args, "decoder_embed_dim", 192)
    _default(args, "decoder_ffn_embed_dim", 768)
    _default(args, "decoder_layers", 4)
    _default(args, "decoder_attention_heads", 4)
    _default(args, "share_decoder_input_output_embed", True)
    transformer_lm.base_lm_architecture(args)


_OF_MODEL: Mapping[str, Mapping[str, Fill]] = {
    "switch_transformer": {
        "switch_transformer_demo": demo_architecture,
        "switch_transformer_iwslt_de_en": transformer_legacy.transformer_iwslt_de_en,
        "switch_transformer_wmt_en_de": transformer_legacy.base_architecture,
        "switch_transformer_wmt_en_de_big": transformer_legacy.transformer_wmt_en_de_big,
        "switch_transformer_vaswani_wmt_en_de_big": (
            transformer_legacy.transformer_vaswani_wmt_en_de_big
        ),
    },
    "switch_roberta": {
        "switch_roberta_tiny": roberta_tiny_architecture,
        "switch_roberta_base": roberta.roberta_base_architecture,
        "switch_roberta_large": roberta.roberta_large_architecture,
    },
    "switch_electra": {
        "switch_electra_tiny": electra_tiny_architecture,
        "switch_electra_small": electra_small_architecture,
        "switch_electra_base": electra_base_architecture,
    },
    "switch_transformer_lm": {
        "switch_transformer_lm_demo": lm_demo_architecture,
        "switch_transformer_lm_gpt": transformer_lm.transformer_lm_gpt,
        "switch_transformer_lm_big": transformer_lm.transformer_lm_big,
    },
}
ARCHITECTURES: Mapping[str, Fill] = {
    name: fill for fills in _OF_MODEL.values() for name, fill in fills.items()
}


def _register(model: str, name: str, fill: Fill) -> None:
    @register_model_architecture(model, name)
    def architecture(args: Settings) -> None:
        fill_gaps(args, MODEL_REGISTRY[model].config, fill)


for _model, _fills in _OF_MODEL.items():
    for _name, _fill in _fills.items():
        _register(_model, _name, _fill)
