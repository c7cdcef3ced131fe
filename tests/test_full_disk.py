"""Commands that run out of space say so in one line, leave nothing half written, and go on."""

import subprocess
import sys

import pytest
import torch
from support.full_disk import room_for

from fairseq_sparsemixer import cli, plotting
from fairseq_sparsemixer.disk import FullDiskError
from fairseq_sparsemixer.files import atomic_path, write_lines


def test_what_does_not_fit_leaves_the_file_before(tmp_path):
    path = tmp_path / "state.pt"
    write_lines(path, ["before"])
    with (
        room_for(5000),
        pytest.raises(FullDiskError, match=r"cannot write .*state\.pt \(File too large\): make"),
        # torch tells of another error than that of the disk.
        atomic_path(path) as partial,
        partial.open("wb") as file,
    ):
        torch.save(torch.zeros(10_000), file)
    assert [each.name for each in tmp_path.iterdir()] == ["state.pt"]
    assert path.read_text() == "before\n"


@pytest.mark.parametrize("size", [0, 3000, 12_000])
def test_a_figure_is_whole_or_missing(size, tmp_path):
    pyplot = pytest.importorskip("matplotlib") and plotting.pyplot()

    def draw():
        figure, axes = pyplot.subplots()
        axes.plot(range(200), [n**2 % 7 for n in range(200)])
        return plotting.save(figure, tmp_path, "squares")

    with room_for(size), pytest.raises(FullDiskError, match=r"squares\.(svg|png) \(File too large"):
        draw()
    assert not list(tmp_path.glob("*.svg"))
    svg, png = draw()
    assert svg.read_text().endswith("</svg>\n") and png.read_bytes()[:4] == b"\x89PNG"
    assert png.read_bytes()[-8:-4] == b"IEND"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["squares.png", "squares.svg"]


def sentences(path, count):
    write_lines(path, ["the red house is here"] * count)
    return path


@pytest.mark.parametrize(
    ("name", "ending", "size"),
    [("average", ".pt", 5000), ("translate", ".de", 100), ("evaluate", ".json", 400),
     ("report", ".html", 5000), ("prune", ".pt", 5000)],
)  # fmt: skip
def test_a_command_says_so_and_goes_on(
    name, ending, size, run_dir, corpus, study, tmp_path, capsys
):
    arguments = {
        "average": ["--inputs", run_dir, "--last", 2],
        "translate": [run_dir, "--input", sentences(tmp_path / "source", 50), "--beam", 1],
        "evaluate": [run_dir, "--data", corpus, "--beam", 1],
        "report": [study],
        "prune": [run_dir, "--data", corpus, "--beam", 1, "--sentences", 2, "--experts", 3],
    }[name]
    output = tmp_path / f"output{ending}"
    command = [name, *map(str, arguments), "--output", str(output)]
    before = {path.name for path in output.parent.iterdir()}
    with room_for(size):
        assert cli.main(command) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(f"fairseq-sparsemixer {name}: error: cannot write ")
    assert {path.name for path in output.parent.iterdir()} == before
    assert cli.main(command) == 0
    assert output.is_file()


def test_translations_to_a_full_stdout(run_dir, tmp_path):
    command = [sys.executable, "-m", "fairseq_sparsemixer.cli", "translate", run_dir]
    source = sentences(tmp_path / "source", 3)
    with open("/dev/full", "w") as full:
        result = subprocess.run(
            [*map(str, command), "--input", str(source), "--beam", "1"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert result.returncode == 2
    assert "cannot write the output (No space left on device)" in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr
