"""The kernels compile for GPUs that are not here, and fit them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]
SLOW = pytest.mark.slow
SHARED_BYTES = {80: 163 * 1024, 86: 99 * 1024, 90: 227 * 1024}
"""What a program may take, by compute capability (CUDA C++ programming guide)."""


@pytest.mark.parametrize(
    "capability", [pytest.param(80, marks=SLOW), pytest.param(86, marks=SLOW), 90]
)
def test_kernels_compile_for_a_gpu(tmp_path, capability):
    path = tmp_path / "kernels.json"
    command = [sys.executable, "-m", "benchmarks.kernels", "--capability", str(capability)]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    result = subprocess.run(
        [*command, "--output", str(path)], capture_output=True, text=True, env=environment
    )
    assert result.returncode == 0, result.stderr
    rows = {row["kernel"]: row for row in json.loads(path.read_text())["rows"]}
    assert len(rows) == (25 if capability == 90 else 19)
    for name, row in rows.items():
        assert f"| {name} " in result.stdout
        assert row["shared_bytes"] <= SHARED_BYTES[capability], name
        assert row["spilled_bytes"] == 0, name
        assert 0 < row["registers"] <= 255, name
    products = [name for name in rows if "product" in name or "gradient of the" in name]
    products.remove("gradient of the biases")
    for name in products:
        expected = ["wgmma"] if capability == 90 else []
        expected.append("bulk" if "descriptors" in name else "async")
        assert rows[name]["uses"] == expected, name


LAUNCHED = """
import json, torch
from benchmarks import host, kernels
from benchmarks.layer import Case, build

case = Case("forward+backward", 16384, 8, 512, 1024, "bfloat16")
with host.no_launches() as launched:
    arm = host.WithLosses(build(case, "sparsemixer", "triton").bfloat16())
    x = torch.randn(case.tokens, case.embed_dim).bfloat16()
    arm.prepare(case, x.requires_grad_(), torch.randn_like(x))
    arm.step()
known = [
    (each.kernel.__name__, {**each.constants, "num_warps": each.warps, "num_stages": each.stages})
    for each in kernels.launches(80)
]
print(json.dumps([launched, known]))
"""


def test_what_is_compiled_is_what_a_layer_launches():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-c", LAUNCHED], capture_output=True, text=True, env=environment, cwd=ROOT
    )
    assert result.returncode == 0, result.stderr
    launched, known = json.loads(result.stdout)
    assert len(launched) == 18
    for name, constants in launched:
        constants = {"num_warps": 4, "num_stages": 3, **constants}  # Triton's own
        alike = [each for kernel, each in known if kernel == name]
        assert any(constants.items() <= each.items() for each in alike), (name, constants)


def test_the_hosts_time_is_counted_without_launching(tmp_path):
    path = tmp_path / "host.json"
    command = [sys.executable, "-m", "benchmarks.host", "--repetitions", "2", "--output", str(path)]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    dense, *experts = json.loads(path.read_text())["rows"]
    assert dense["arm"] == "dense" and dense["forward+backward launches"] == 0
    assert [row["arm"] for row in experts] == [
        *("switch", "switch, with losses", "sparsemixer", "sparsemixer, with losses")
    ]
    for row in experts:
        assert f"| {row['arm']} " in result.stdout
        launches = 18 if row["arm"].endswith("with losses") else 16
        assert (row["forward launches"], row["forward+backward launches"]) == (6, launches)
        assert 0 < row["forward seconds"] < row["forward+backward seconds"]
