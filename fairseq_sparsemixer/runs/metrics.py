"""What is measured of a model besides its loss in training: keys, and how they are shown."""

from typing import NamedTuple


class Metric(NamedTuple):
    """A score of the evaluation.

    Attributes:
        key: in the JSON file of an evaluation, and in points.
        title: in tables.
        decimals: in tables.
        lower_is_better: whether it is a loss.
    """

    key: str
    title: str
    decimals: int
    lower_is_better: bool = False


NLL = Metric("nll", "test nll", 3, lower_is_better=True)
"""In bits, a token, masked token or sentence, as that of validation."""
MAIN = (
    Metric("bleu", "BLEU", 2),
    Metric("chrf", "chrF2", 2),
    Metric("accuracy", "accuracy (%)", 1),
    Metric("acc_and_f1", "accuracy and F1", 3),
    Metric("mcc", "Matthews corr.", 3),
    Metric("pearson_and_spearman", "Pearson and Spearman", 3),
    Metric("discriminator_loss", "replaced tokens, bits", 4, lower_is_better=True),
    Metric("bits_per_byte", "bits per byte", 3, lower_is_better=True),
    Metric("ppl", "perplexity", 2, lower_is_better=True),
    NLL,
)
"""The first of them that a task has is what its models are ranked by."""
