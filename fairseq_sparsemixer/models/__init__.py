"""The fairseq seam: configurations, layers, models and named architectures."""

import fairseq  # noqa: F401  (registers all three, in whichever order they are imported)

from fairseq_sparsemixer.models import architectures  # noqa: F401
from fairseq_sparsemixer.models.config import (
    SwitchElectraConfig,
    SwitchRobertaConfig,
    SwitchTransformerConfig,
    SwitchTransformerLanguageModelConfig,
)
from fairseq_sparsemixer.models.switch_electra import SwitchElectraModel
from fairseq_sparsemixer.models.switch_roberta import SwitchRobertaModel
from fairseq_sparsemixer.models.switch_transformer import SwitchTransformerModel
from fairseq_sparsemixer.models.switch_transformer_lm import SwitchTransformerLanguageModel

__all__ = [
    "SwitchElectraConfig",
    "SwitchElectraModel",
    "SwitchRobertaConfig",
    "SwitchRobertaModel",
    "SwitchTransformerConfig",
    "SwitchTransformerLanguageModel",
    "SwitchTransformerLanguageModelConfig",
    "SwitchTransformerModel",
]
