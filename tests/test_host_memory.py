"""What malloc does once the extension is loaded."""

import os
import subprocess
import sys

import pytest
import torch

# Page faults of a block of 64 MB that is asked for again and again.
PROGRAM = """
import resource, sys, torch
if sys.argv[1] == "loaded":
    import fairseq
    import fairseq_sparsemixer
for _ in range(3):
    torch.ones(2**24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    torch.ones(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(what, **environment):
    kept = {key: os.environ[key] for key in os.environ if not key.startswith(("MALLOC_", "GLIBC_"))}
    command = [sys.executable, "-c", PROGRAM, what]
    env = {**kept, "OMP_NUM_THREADS": "1", **environment}
    result = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    return int(result.stdout.split()[-1])


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU it is left alone")
def test_memory_that_is_released_is_kept():
    """Unless the user says otherwise."""
    without = faults("alone")
    assert without > 1000
    assert faults("loaded") < without / 100
    assert faults("loaded", MALLOC_TRIM_THRESHOLD_="131072") > without / 2
