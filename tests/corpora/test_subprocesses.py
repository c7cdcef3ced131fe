"""Programs run beside this one."""

import os

import pytest

from fairseq_sparsemixer import disk
from fairseq_sparsemixer.corpora import subprocesses


@pytest.mark.parametrize("number", disk.NO_SPACE)
def test_full_disk_in_a_subprocess(number):
    """A disk, a quota, or a limit on the size of a file."""
    program = f"import sys; sys.exit('pip: ERROR: {os.strerror(number)}')"
    with pytest.raises(OSError) as caught:
        subprocesses.run_python(["-c", program])
    assert caught.value.errno == number


def test_other_faults_of_a_subprocess():
    with pytest.raises(subprocesses.ProgramError, match="some other fault"):
        subprocesses.run_python(["-c", "import sys; sys.exit('some other fault')"])
