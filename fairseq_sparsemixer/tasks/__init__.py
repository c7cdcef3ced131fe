"""fairseq tasks: translation whose validation also measures the routing."""

import fairseq  # noqa: F401  (registers all three, in whichever order they are imported)

from fairseq_sparsemixer.tasks import translation_with_routing  # noqa: F401
