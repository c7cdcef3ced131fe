"""fairseq's tasks, whose validation also measures.

``measured``      when to measure, and where points go
``measuring``     what a point holds
``..._with_routing``  one of fairseq's tasks each
"""

import fairseq  # noqa: F401  (registers all three, in whichever order they are imported)

from fairseq_sparsemixer.tasks import (  # noqa: F401
    language_modeling_with_routing,
    masked_lm_with_routing,
    sentence_prediction_with_routing,
    translation_with_routing,
)
