"""Models of transformers from fairseq's, without a folder between them."""

from fairseq_sparsemixer.export.description import describe
from fairseq_sparsemixer.export.exporting import fill, untied
from fairseq_sparsemixer.export.modeling_sparsemixer import (
    SparseMixerConfig,
    SparseMixerForSeq2SeqLM,
)
from support.models import Task


def exported(model):
    """The model of transformers with the parameters of fairseq's."""
    converted = SparseMixerForSeq2SeqLM(SparseMixerConfig(**describe(model, Task()))).eval()
    fill(converted, untied(model.state_dict(), converted), "model.pt")
    return converted
