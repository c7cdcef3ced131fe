"""fairseq's translation task, whose validation also measures.

``translation_with_routing``  the task: when to measure, and where points go
``measuring``                 what a point holds
"""

import fairseq  # noqa: F401  (registers all three, in whichever order they are imported)

from fairseq_sparsemixer.tasks import translation_with_routing  # noqa: F401
