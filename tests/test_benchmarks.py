"""The benchmarks run; what they measure is nobody's test."""

import json

import commands


def test_cost_of_routers(tmp_path):
    output = tmp_path / "routers.json"
    result = commands.run(
        "benchmarks.routers",
        *("--tokens", 40, "--length", 5, "--repetitions", 1, "--device", "cpu"),
        *("--routers", "reinmax,gshard,expert-choice", "--output", output),
        cwd=commands.PACKAGE.parent,
    )
    results = json.loads(output.read_text())
    rows = results["routers"]
    assert list(rows) == ["switch", "reinmax", "gshard", "expert-choice"]
    assert rows["gshard"]["top_k"] == 2
    # Every expert's inner layer is kept, not one expert's.
    assert rows["reinmax"]["kept_bytes"] > rows["switch"]["kept_bytes"]
    assert all(len(row["seconds"]) == 1 for row in rows.values())
    assert result.stdout.count("\n| `") == 4
