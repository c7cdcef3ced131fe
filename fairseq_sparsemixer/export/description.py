"""What a model of fairseq is, in the words of ``SparseMixerConfig``."""

from typing import Any, Dict, List

from fairseq.models.transformer import TransformerModelBase
from fairseq.tasks import FairseqTask
from omegaconf import DictConfig, OmegaConf

from fairseq_sparsemixer.errors import UserError
from fairseq_sparsemixer.models.config import SIDES, SwitchTransformerConfig
from fairseq_sparsemixer.moe import Router

WEIGHTS = ("weight", "bias", "projection", "output_scale", "balance_bias.bias")
"""What a router may hold that evaluation reads, besides the means of one that adds them."""


def describe(model: TransformerModelBase, task: FairseqTask) -> Dict[str, Any]:
    """The settings of the exported model.

    Args:
        model: fairseq's, with experts or without.
        task: has the dictionaries.

    Raises:
        UserError: no rule says how its router chooses.
    """
    cfg = model.cfg
    mixtures = {
        side: [getattr(layer, "moe", None) for layer in getattr(model, side).layers]
        for side in SIDES
    }
    found = [each for side in mixtures.values() for each in side if each is not None]
    return {
        **_side("encoder", model.encoder, mixtures["encoder"], cfg.encoder),
        **_side("decoder", model.decoder, mixtures["decoder"], cfg.decoder),
        "source_vocab_size": len(task.source_dictionary),
        "vocab_size": len(task.target_dictionary),
        "shared_embeddings": _shared(model),
        "decoder_input_dim": model.decoder.embed_tokens.embedding_dim,
        "decoder_output_dim": model.decoder.output_embed_dim,
        **{
            name: getattr(cfg, name)
            for name in (
                "max_source_positions",
                "max_target_positions",
                "no_token_positional_embeddings",
                "layernorm_embedding",
                "no_scale_embedding",
            )
        },
        "activation_fn": str(cfg.activation_fn),
        "num_experts": found[0].router.num_experts if found else 1,
        "router": describe_router(found[0].router) if found else None,
    }


def _side(name: str, side: Any, mixtures: List[Any], cfg: Any) -> Dict[str, Any]:
    """Of the encoder or the decoder."""
    return {
        f"{name}_embed_dim": cfg.embed_dim,
        f"{name}_ffn_embed_dim": cfg.ffn_embed_dim,
        f"{name}_layers": len(mixtures),
        f"{name}_attention_heads": cfg.attention_heads,
        f"{name}_normalize_before": cfg.normalize_before,
        f"{name}_final_norm": side.layer_norm is not None,
        f"{name}_learned_pos": cfg.learned_pos,
        f"{name}_moe_layers": [i for i, each in enumerate(mixtures) if each is not None],
    }


def _shared(model: Any) -> str:
    """Which embeddings are one matrix."""
    source, target = model.encoder.embed_tokens.weight, model.decoder.embed_tokens.weight
    projection = getattr(model.decoder.output_projection, "weight", None)
    if target is not projection:
        return "none"
    return "all" if source is target else "decoder"


def describe_router(router: Router) -> Dict[str, Any]:
    """How it chooses in evaluation, and what it holds for that.

    Raises:
        UserError: no rule says what it does.
    """
    rule = router.evaluation_rule()
    if rule is None:
        raise UserError(
            f"router {router.name!r} cannot be exported: a token's experts do not depend on that "
            "token alone"
            if not router.causal
            else f"router {router.name!r} cannot be exported: it has no evaluation_rule"
        )
    names = [*WEIGHTS, *["expert_means.mean"] * router.adds_means]
    held = router.state_dict()
    return {
        "top_k": router.top_k,
        **rule._asdict(),
        "tensors": [name for name in names if name in held],
    }


def settings_of(model: Any) -> Dict[str, Any]:
    """What a checkpoint says of its model, without settings of other parts."""
    if isinstance(model, DictConfig):
        values: Any = OmegaConf.to_container(model, resolve=True, enum_to_str=True)
    else:
        values = vars(model)
    names = ("_name", "arch", *SwitchTransformerConfig.__dataclass_fields__)
    return {name: values[name] for name in names if values.get(name) is not None}
