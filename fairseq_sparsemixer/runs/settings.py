"""The settings of a run that decide how it trains."""

import dataclasses
import json
from typing import Any, Dict

from fairseq.models import ARCH_MODEL_REGISTRY

from fairseq_sparsemixer.criterions.routing_losses import RoutingLossesConfig
from fairseq_sparsemixer.models.config import EXPERT_FIELDS, SIDES

_WHOLE_SECTIONS = (
    "model",
    "criterion",
    "task",
    "optimizer",
    "lr_scheduler",
    "optimization",
    "ema",
)
_PARTS = {
    "dataset": (
        "train_subset",
        "valid_subset",
        "max_tokens",
        "batch_size",
        "required_batch_size_multiple",
        "curriculum",
    ),
    "common": ("fp16", "memory_efficient_fp16", "bf16", "memory_efficient_bf16", "amp"),
    "checkpoint": ("finetune_from_model",),
}
"""What else decides how a model trains. The rest says where files are, or what is logged."""
SECTIONS = (*_WHOLE_SECTIONS, *_PARTS)
"""The groups of settings that are read."""
BY_MACHINE = (
    "criterion.watchdogs",
    "criterion.watchdog_share",
    "criterion.watchdog_updates",
    "model.moe_backend",
    "model.moe_recompute",
    "model.expert_parallel_size",
    "model.moe_inference_dtype",
    "model.deterministic",
)
"""How the same is computed, and what is warned of; a run may go on with others."""
_WITHOUT_EFFECT = (
    *BY_MACHINE,
    "task.points_file",
    "task.points_text",
    "task.points_sentences",
    "task.points_beam",
    "optimization.stop_time_hours",
)


def read_settings(config: Dict[str, Any]) -> Dict[str, Any]:
    """What decides how a run trains, its seed aside, as ``{"model.dropout": 0.1, ...}``.

    Settings of the experts that the config does not mention have their defaults; a dense model
    has none. The batch of an update is a setting, how it is spread over workers is not: in place of
    ``update_freq`` and ``max_tokens`` stands ``optimization.tokens_per_update``.
    """
    sections = {name: dict(config.get(name) or {}) for name in _WHOLE_SECTIONS}
    for section, keys in _PARTS.items():
        values = config.get(section) or {}
        sections[section] = {key: values.get(key) for key in keys}
    workers = (config.get("distributed_training") or {}).get("distributed_world_size") or 1
    # Else it is a reference to another setting, or what fairseq does without it.
    if (config.get("dataset") or {}).get("update_epoch_batch_itr") is True:
        sections["dataset"]["update_epoch_batch_itr"] = True
    tokens = sections["dataset"].pop("max_tokens")
    frequencies = sections["optimization"].pop("update_freq", [1])
    size = "tokens_per_update" if tokens else "update_freq"  # batches of so many sentences
    sections["optimization"][size] = [workers * each * (tokens or 1) for each in frequencies]
    dense = _is_dense(sections["model"])
    for section, defaults in expert_fields().items():
        values = sections[section]
        if dense:
            sections[section] = {key: values[key] for key in values if key not in defaults}
        elif section == "model" or "with_routing" in str(values.get("_name")):
            sections[section] = {**defaults, **values}
    flat = {
        f"{section}.{key}": value
        for section, values in sections.items()
        for key, value in values.items()
    }
    return {
        key: value
        for key, value in flat.items()
        if value is not None and key not in _WITHOUT_EFFECT
    }


def _is_dense(model: Dict[str, Any]) -> bool:
    """Whether the model has no experts, be it one of fairseq's own."""
    name = str(model.get("_name"))
    if "router" not in model and not name.startswith("switch_"):
        return True
    sides = getattr(ARCH_MODEL_REGISTRY.get(name), "sides", SIDES)
    return all(model.get(f"{side}_moe_layers") == "none" for side in sides)


def expert_fields() -> Dict[str, Dict[str, Any]]:
    """The settings of this package, by section, with their defaults."""
    losses = RoutingLossesConfig.__annotations__
    return {
        "model": {name: field.default for name, field in EXPERT_FIELDS.items()},
        "criterion": {
            field.name: field.default
            for field in dataclasses.fields(RoutingLossesConfig)
            if field.name in losses
        },
    }


def label(key: str) -> str:
    """The short name of a setting: that of hydra without its group."""
    group, _, name = key.partition(".")
    return ("arch" if group == "model" else group) if name == "_name" else name


def as_text(value: Any) -> str:
    """A value of a setting, as a table shows it."""
    if value is None:
        return "unset"
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
