"""fairseq tasks: translation whose validation also measures the routing."""

from fairseq_sparsemixer.tasks import translation_with_routing  # noqa: F401
