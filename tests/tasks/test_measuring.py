"""What a point of measurement holds, by hand."""

import math

import numpy as np
import pytest
import torch

from fairseq_sparsemixer.models.watching import choices_of_batch
from fairseq_sparsemixer.moe import Routing
from fairseq_sparsemixer.tasks import measuring


def test_figures_of_layers_by_hand():
    choices = {0: [[0], [1], [1]], 3: [[2], [2]], 5: [[-1], [0], [0]]}
    sentences = {
        line: measuring.Sentence(2.0, 4, {"encoder.0": np.array(rows, dtype=np.int16)})
        for line, rows in choices.items()
    }
    before = {"encoder.0": np.array([[0], [0], [1], [2], [0], [1], [0], [0]])}
    domains = ["a", "-", "-", "b", "-", "a"]
    stats = {"router_entropy/encoder.0": 0.5}
    figures = measuring.layer_figures(sentences, domains, {"encoder.0": 4}, stats, before)
    assert figures == {
        "encoder.0": {
            "load": [round(3 / 7, 6), round(2 / 7, 6), round(2 / 7, 6), 0.0],
            "entropy": 0.5,
            "drift": round(2 / 7, 6),
            "load_by_domain": {"a": [0.6, 0.4, 0.0, 0.0], "b": [0.0, 0.0, 1.0, 0.0]},
        }
    }
    assert measuring.domain_losses(sentences, domains) == {
        "a": {"nll_loss": round(4 / 8 / math.log(2), 4), "tokens": 8},
        "b": {"nll_loss": round(2 / 4 / math.log(2), 4), "tokens": 4},
    }
    diverged = measuring.layer_figures(
        sentences, domains, {"encoder.0": 4}, {"router_entropy/encoder.0": math.nan}, before
    )
    assert diverged["encoder.0"]["entropy"] is None
    other = {"encoder.0": np.zeros((9, 1))}  # another validation set
    del figures["encoder.0"]["load_by_domain"]
    figures["encoder.0"].update(drift=None, entropy=None)
    assert measuring.layer_figures(sentences, None, {"encoder.0": 4}, {}, other) == figures


def test_choices_of_two_experts_drift_by_the_share_that_is_new():
    one, two = (np.array(rows) for rows in ([[0, 1], [2, 3]], [[1, 0], [3, 0]]))
    sentences = {0: measuring.Sentence(1.0, 1, {"encoder.0": two})}
    figures = measuring.layer_figures(sentences, None, {"encoder.0": 4}, {}, {"encoder.0": one})
    assert figures["encoder.0"]["drift"] == 0.25


def test_choices_leave_out_padding_on_either_side():
    pad, length, batch = 1, 4, 2
    tokens = torch.tensor([[pad, 5, 6, 2], [7, 8, 9, 2]])
    index = torch.arange(length * batch).view(length, batch)  # the layer's order
    index[0, 0] = -1
    routing = Routing(index.view(-1, 1), *[torch.zeros(8, 1)] * 4)
    net_input = {"src_tokens": tokens, "prev_output_tokens": tokens.flip(1)}
    first, second = choices_of_batch({"encoder.0": routing}, net_input, pad)
    assert first["encoder.0"].tolist() == [[2], [4], [6]]
    assert second["encoder.0"].tolist() == [[1], [3], [5], [7]]
    flipped, _ = choices_of_batch({"decoder.0": routing}, net_input, pad)
    assert flipped["decoder.0"].tolist() == [[-1], [2], [4]]


@pytest.mark.parametrize(
    ("count", "expected"),
    [(1, [0, 1]), (4, [0, 1, 2, 5]), (6, [0, 1, 2, 3, 4, 6]), (99, range(8))],
)
def test_lines_are_spread_over_domains(count, expected):
    domains = ["a", "b", "a", "b", "a", "b", "b", "b"]
    assert measuring.choose_lines(count, dict.fromkeys(range(8)), domains) == list(expected)
