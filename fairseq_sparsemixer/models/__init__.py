"""The fairseq seam: configuration, layers, model and named architectures."""

import fairseq  # noqa: F401  (registers all three, in whichever order they are imported)

from fairseq_sparsemixer.models import architectures, switch_transformer  # noqa: F401
from fairseq_sparsemixer.models.config import SwitchTransformerConfig
from fairseq_sparsemixer.models.switch_transformer import SwitchTransformerModel

__all__ = ["SwitchTransformerConfig", "SwitchTransformerModel"]
