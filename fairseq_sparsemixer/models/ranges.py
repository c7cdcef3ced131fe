"""Which numbers the settings of a training may be: fairseq itself takes any, NaN too."""

import math
import re
from typing import Any, Dict, Iterator, Tuple

from omegaconf import DictConfig

from fairseq_sparsemixer.models.config import ConfigError

_SHARE = (0, 1)
_COUNT = (1, math.inf)
_NUMBER = (0, math.inf)
_DROPOUTS = ("dropout", "attention_dropout", "activation_dropout", "relu_dropout", "pooler_dropout")
_LAYERS = ("adaptive_softmax_dropout", "encoder_layerdrop", "decoder_layerdrop")
RANGES: Dict[str, Tuple[float, float]] = {
    **{f"model.{name}": _SHARE for name in (*_DROPOUTS, *_LAYERS)},
    "common.seed": (0, 2**31 - 1),
    "common.log_interval": _COUNT,
    "common.min_loss_scale": _NUMBER,
    "criterion.label_smoothing": _SHARE,
    "criterion.watchdog_share": _SHARE,
    "criterion.watchdog_updates": _COUNT,
    "dataset.max_tokens": _COUNT,
    "dataset.batch_size": _COUNT,
    "dataset.required_batch_size_multiple": _COUNT,
    "dataset.validate_interval": _COUNT,
    "dataset.validate_interval_updates": _NUMBER,
    "dataset.num_workers": _NUMBER,
    "checkpoint.save_interval": _COUNT,
    "checkpoint.save_interval_updates": _NUMBER,
    "optimization.lr": (0, 1000),
    "optimization.clip_norm": _NUMBER,
    "optimization.update_freq": _COUNT,
    "optimization.max_update": _NUMBER,
    "optimization.max_epoch": _NUMBER,
    "optimization.stop_time_hours": _NUMBER,
    "optimization.stop_min_lr": (-math.inf, math.inf),
    "optimizer.adam_betas": (0, 1 - 1e-9),
    "optimizer.adam_eps": (0, 1000),
    "optimizer.momentum": _SHARE,
    "optimizer.weight_decay": (0, 1000),
    "lr_scheduler.warmup_updates": _NUMBER,
    "lr_scheduler.warmup_init_lr": (-1, 1000),
    "ema.ema_decay": _SHARE,
    "task.points_sentences": _NUMBER,
    "task.points_beam": _COUNT,
}
"""The least and the most of a setting; of each entry, where it is a list."""


def check_numbers(cfg: Any) -> None:
    """Refuse a number that makes no sense, or two precisions, before anything is trained with it.

    Args:
        cfg: fairseq's settings by group; a group may be a Namespace.

    Raises:
        ConfigError: names the setting, its flag and what it may be.
    """
    for key, (least, most) in RANGES.items():
        group, name = key.split(".")
        for value in _numbers(_entry(_entry(cfg, group), name)):
            if not least <= value <= most:
                flag = name.replace("_", "-")
                allowed = f"{least:g} to {most:g}" if most < math.inf else f"at least {least:g}"
                raise ConfigError(f"{key} (--{flag}) must be {allowed}, not {value:g}")
    given = [name for name in ("fp16", "bf16", "amp") if _entry(_entry(cfg, "common"), name)]
    if len(given) > 1:
        one, other = (f"common.{name} (--{name})" for name in given[:2])
        raise ConfigError(f"{one} and {other} are both set: set one of them to false")


def _entry(section: Any, name: str) -> Any:
    """None where there is none, or it is still to be given."""
    return section.get(name) if isinstance(section, DictConfig) else getattr(section, name, None)


def _numbers(value: Any) -> Iterator[float]:
    """Those of a setting; fairseq keeps some lists as text."""
    if isinstance(value, str):
        yield from map(float, re.findall(r"-?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?", value))
    elif isinstance(value, (int, float)):
        yield value
    elif value is not None:
        yield from value
