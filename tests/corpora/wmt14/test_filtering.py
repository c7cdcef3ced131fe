"""Which training pairs are kept."""

import pytest

from fairseq_sparsemixer.corpora.wmt14 import preparation


@pytest.mark.parametrize("pipeline", preparation.PIPELINES)
def test_what_is_cleaned_away(built, pipeline):
    record, folder = built[pipeline]
    assert record["cleaning"]["dropped"] == {"empty": 2, "length_ratio": 1, "too_long": 1}
    kept = 504 + 200 + 102 - 4
    assert record["cleaning"]["pairs"] == kept
    assert record["splits"]["train"]["en"]["sentences"] == kept
    # Nothing is cleaned away from what is scored.
    assert record["splits"]["valid"]["de"]["sentences"] == 24
    assert record["splits"]["test"]["de"]["sentences"] == 30
    assert not list(folder.rglob("*.partial"))
