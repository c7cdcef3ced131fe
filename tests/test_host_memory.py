"""What malloc does once the extension is loaded."""

import os
import subprocess
import sys

import pytest
import torch

# Page faults of a block of 64 MB that is asked for again and again.
PROGRAM = """
import resource, fairseq, torch
import fairseq_sparsemixer
for _ in range(3):
    torch.ones(2**24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    torch.ones(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(**environment):
    kept = {key: os.environ[key] for key in os.environ if not key.startswith(("MALLOC_", "GLIBC_"))}
    env = {**kept, "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, "-c", PROGRAM]
    result = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    return int(result.stdout.split()[-1])


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU it is left alone")
def test_memory_that_is_released_is_kept():
    """Unless the user says otherwise; a block or two may find another place."""
    released = faults(MALLOC_TRIM_THRESHOLD_="131072")
    assert released > 100  # 160,000 pages, or 320 huge ones
    assert faults() < released / 4
