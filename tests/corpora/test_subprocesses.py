"""Programs run beside this one."""

import errno

import pytest

from fairseq_sparsemixer.corpora import subprocesses


def test_full_disk_in_a_subprocess(tmp_path):
    program = "import os, sys; sys.exit('pip: ERROR: ' + os.strerror(28))"
    with pytest.raises(OSError) as caught:
        subprocesses.run_python(["-c", program])
    assert caught.value.errno == errno.ENOSPC
    with pytest.raises(subprocesses.ProgramError, match="some other fault"):
        subprocesses.run_python(["-c", "import sys; sys.exit('some other fault')"])
