"""``scripts/test.sh`` where nothing can be installed; results of the long ones."""

import json
import runpy
import shutil
import subprocess

import pytest
from support import commands

ROOT = commands.PACKAGE.parent
# Has PyTorch for a GPU, fairseq and pytest, and neither ruff nor mypy nor pytest-xdist.
PYTHON = """\
#!/bin/sh
case "$*" in
*find_spec*) exit 1 ;;
*torch*) exit 0 ;;
esac
echo "pytest got: $*"
"""


def test_on_a_gpu_without_network(tmp_path):
    python = tmp_path / "python"
    python.write_text(PYTHON)
    python.chmod(0o755)
    result = subprocess.run(
        [ROOT / "scripts" / "test.sh", "--gpu", "--maxfail=1"],
        env={"PATH": "/usr/bin:/bin", "PYTHON": str(python)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    head, *left_out, command = result.stdout.splitlines()
    assert head == f"== Testing with {python} as it is; nothing is installed"
    for each in ("the tests that need no GPU", "ruff", "mypy", "a second process"):
        assert any(line.startswith(f"== Left out: {each}") for line in left_out)
    assert command.startswith("pytest got: -m pytest -m not slow and gpu --maxfail=1 tests/")
    assert "tests/moe/test_gpu.py" in command and "tests/test_cli.py" not in command


@pytest.mark.parametrize(
    ("model", "average"),
    [
        ("run", " --last 5"),
        ("run --source run/a.pt", " --last 5"),  # another file is no model
        ("run/a.pt", ""),
        ("run/a.pt:run/b.pt", ""),
    ],
)
def test_the_mean_of_checkpoints_is_that_of_a_folder(model, average, tmp_path):
    for part in ("scripts", "run", "bin"):
        (tmp_path / part).mkdir()
    (tmp_path / "run" / "a.pt").touch()
    (tmp_path / "scripts" / "environment.sh").touch()
    script = shutil.copy(ROOT / "scripts" / "evaluate_wmt14.sh", tmp_path / "scripts")
    command = tmp_path / "bin" / "fairseq-sparsemixer"
    command.write_text('#!/bin/sh\necho "$*"\n')
    command.chmod(0o755)
    environment = {"PATH": f"{command.parent}:/usr/bin:/bin"}
    result = subprocess.run(
        [script, *model.split()], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert result.stdout == f"evaluate --beam 4 --lenpen 0.6{average} {model}\n"


def test_results_of_a_script_that_was_killed_in_the_middle_of_a_line(tmp_path):
    path = tmp_path / "results.jsonl"
    script = runpy.run_path(str(ROOT / "scripts" / "result_lines.py"))
    assert script["read_results"](path, "key") == {}
    lines = [{"key": "é\u2028", "n": 1}, {"key": "b"}, {"key": "é\u2028", "n": 2}]
    for line in lines:
        script["add_result"](path, line)
    with path.open("a") as file:
        file.write('{"key": "c", "n')
    found = script["read_results"](path, "key")
    assert found == {"é\u2028": lines[2], "b": lines[1]}
    script["add_result"](path, {"key": "c"})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [*lines, {"key": "c"}]
