"""Adam in one kernel for all parameters, as ``--optimizer fused_adam``."""

from typing import Any

import torch
from fairseq.optim import FairseqOptimizer, register_optimizer
from fairseq.optim.adam import FairseqAdam, FairseqAdamConfig


@register_optimizer("fused_adam", dataclass=FairseqAdamConfig)
class FusedAdam(FairseqAdam):
    """fairseq's ``adam`` by :class:`torch.optim.AdamW` with ``fused=True``; the same flags.

    fairseq's own goes through the parameters one by one, twelve operations for each, unless they
    lie in one piece, as under fp16 (but not under bf16 or float32), or Apex is installed. Two
    things differ: epsilon is added behind the correction of the bias, and what needs Apex or a TPU
    (``fp16_adam_stats``, ``tpu``) is not there.
    """

    def __init__(self, cfg: FairseqAdamConfig, params: Any) -> None:
        FairseqOptimizer.__init__(self, cfg)
        self._optimizer = torch.optim.AdamW(params, fused=True, **self.optimizer_config)

    @property
    def supports_flat_params(self) -> bool:
        """Whether parameters may lie in one piece: each element is treated alike."""
        return True
