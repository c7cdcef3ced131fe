"""Operators one by one, and their kernels launched in other ways. In Triton's interpreter."""

import re

import pytest
import torch
from support import triton_interpreter  # noqa: F401  (before Triton is imported)

from benchmarks.gpu import exact, sweep, table
from benchmarks.gpu.sweep import Setting
from fairseq_sparsemixer.moe.kernels import products

pytestmark = pytest.mark.skipif(
    products.obstacle(torch.device("cpu"), torch.float32) is not None or torch.cuda.is_available(),
    reason="needs Triton, for its interpreter",
)
FLOAT = torch.float32


def first(result):
    return result if isinstance(result, torch.Tensor) else result[0]


@pytest.mark.parametrize("name", sweep.KERNELS)
@pytest.mark.parametrize("described", [False, True])
def test_another_launch_computes_the_same(name, described):
    if described and products.TensorDescriptor is None:
        pytest.skip("Triton before 3.4 has no descriptors")
    layer = sweep.build((16, 32, 3), 40, FLOAT, "cpu")
    launch = sweep.launched(layer, name, Setting(16, 16, 16, 4, 3, described))
    wanted = first(sweep.operators(layer)[name]()).double()
    assert wanted.norm() > 0
    assert exact.error(launch(), wanted) < 1e-6


def test_descriptors_are_tried_where_there_is_an_engine_for_them(monkeypatch):
    for has_engine in (False, True):
        monkeypatch.setattr(products, "describable", lambda device, answer=has_engine: answer)
        found = sweep.settings("cpu")
        assert {name for name, _ in found} == {*sweep.KERNELS}
        assert {setting.described for _, setting in found} == {False, has_engine}


def test_every_operator_has_a_time_and_failures_are_counted(monkeypatch):
    layer = sweep.build((16, 32, 2), 40, FLOAT, "cpu")
    about = {"embed_dim": 16, "num_experts": 2}
    rows = [{**about, "operator": n, "microseconds": 8.0} for n in sweep.operators(layer)]
    assert table.headline("operators", {"rows": rows}) == "18 operators, 0 other launches"
    tried = [(Setting(16, 16, 16, 4, 3, False), 4.0), (Setting(32, 16, 16, 8, 2, True), 2.0)]
    more = [
        {**about, "operator": "up", "setting": str(setting), "error": 0.001, "microseconds": time}
        for setting, time in tried
    ]
    more.append({**about, "operator": "up", "setting": "huge", "failed": "OutOfResources"})
    assert table.headline("sweep", {"rows": [*rows, *more]}) == (
        "18 operators, 3 other launches, 1 of them failed"
    )
    text = sweep.table([*rows, *more])
    lines = [line for line in text.splitlines() if "stages" in line]
    assert re.search(r"32x16x16, 8 warps, 2 stages, described *\| *2\.0 \| *0\.25 \|", lines[0])
    assert re.search(r"16x16x16, 4 warps, 3 stages, pointers *\| *4\.0 \| *0\.50 \|", lines[1])
    assert "huge" not in text and re.search(r"\| up with dropout *\| *8\.0 \|", text)


def test_a_sweep_tells_what_fails(monkeypatch):
    """Too large a setting costs its row alone."""
    layer = sweep.build((16, 32, 2), 40, FLOAT, "cpu")
    good, bad = Setting(16, 16, 16, 4, 3, False), Setting(16, 16, 17, 4, 3, False)
    monkeypatch.setattr(sweep, "settings", lambda device: [("up", good), ("up", bad)])
    (_, one), (_, other) = sweep._sweep(layer, sweep.operators(layer), "cpu")
    assert one["microseconds"] > 0 and one["error"] < 1e-6
    assert "failed" in other and "microseconds" not in other
