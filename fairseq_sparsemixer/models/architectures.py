"""Named architectures: fairseq's transformer sizes with experts in every other layer."""

import argparse
from typing import Any, Callable, Mapping

from fairseq.models import register_model_architecture
from fairseq.models.transformer import transformer_legacy

from fairseq_sparsemixer.models.switch_transformer import Settings, fill_gaps

Fill = Callable[[argparse.Namespace], Any]


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


ARCHITECTURES: Mapping[str, Fill] = {
    "switch_transformer_demo": demo_architecture,
    "switch_transformer_iwslt_de_en": transformer_legacy.transformer_iwslt_de_en,
    "switch_transformer_wmt_en_de": transformer_legacy.base_architecture,
    "switch_transformer_wmt_en_de_big": transformer_legacy.transformer_wmt_en_de_big,
    "switch_transformer_vaswani_wmt_en_de_big": (
        transformer_legacy.transformer_vaswani_wmt_en_de_big
    ),
}


def _register(name: str, fill: Fill) -> None:
    @register_model_architecture("switch_transformer", name)
    def architecture(args: Settings) -> None:
        fill_gaps(args, fill)


for _name, _fill in ARCHITECTURES.items():
    _register(_name, _fill)
