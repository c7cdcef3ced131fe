"""``run.json``."""

import pytest

from fairseq_sparsemixer.errors import UserError
from fairseq_sparsemixer.runs import record


def test_record_of_a_checkout(tmp_path):
    assert record.git_state(tmp_path) is None
    assert record.read_record(tmp_path) == {}
    (tmp_path / record.RECORD).write_text("{")
    with pytest.raises(UserError, match=r"cannot read .*run\.json"):
        record.read_record(tmp_path)
