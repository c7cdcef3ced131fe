"""Adam in one kernel for all parameters, as ``--optimizer fused_adam``."""

from typing import Any

import torch
from fairseq.optim import FairseqOptimizer, register_optimizer
from fairseq.optim.adam import FairseqAdam, FairseqAdamConfig

from fairseq_sparsemixer.models.config import ConfigError


@register_optimizer("fused_adam", dataclass=FairseqAdamConfig)
class FusedAdam(FairseqAdam):
    """fairseq's ``adam`` by :class:`torch.optim.AdamW` with ``fused=True``; the same flags.

    fairseq's own goes through the parameters one by one, twelve operations for each, unless they
    lie in one piece, as under fp16 (but not under bf16 or float32), or Apex is installed. Two
    things differ: epsilon is added behind the correction of the bias, and moments are kept as
    exact as the parameters are.

    Raises:
        ConfigError: for ``fp16_adam_stats``, a TPU or memory-efficient half precision, which only
            fairseq's own has.
    """

    def __init__(self, cfg: FairseqAdamConfig, params: Any) -> None:
        for name in ("fp16_adam_stats", "tpu"):
            if getattr(cfg, name):
                raise _not_here(name.replace("_", "-"))
        FairseqOptimizer.__init__(self, cfg)
        self._optimizer = torch.optim.AdamW(params, fused=True, **self.optimizer_config)

    @property
    def supports_memory_efficient_fp16(self) -> bool:
        """Asked where half precision is to do without parameters in float32."""
        raise _not_here("memory-efficient-fp16 and --memory-efficient-bf16")

    @property
    def supports_flat_params(self) -> bool:
        """Whether parameters may lie in one piece: each element is treated alike."""
        return True


def _not_here(flags: str) -> ConfigError:
    return ConfigError(f"--optimizer fused_adam does not go with --{flags}: take adam")
