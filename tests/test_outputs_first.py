"""Commands find out before their work, not after it, that a result cannot be written."""

import pytest

from benchmarks import measuring
from fairseq_sparsemixer import cli
from fairseq_sparsemixer.corpora import downloads
from fairseq_sparsemixer.corpora.homeassistant import preparation
from fairseq_sparsemixer.errors import UserError
from fairseq_sparsemixer.evaluation import average
from fairseq_sparsemixer.evaluation.translator import Translator
from fairseq_sparsemixer.files import check_writable


@pytest.fixture
def no_work(monkeypatch):
    def fail(*args, **kwargs):
        pytest.fail("it worked before it looked")

    monkeypatch.setattr(Translator, "translate", fail)
    monkeypatch.setattr(average, "load_state", fail)
    monkeypatch.setattr(downloads, "_download", fail)
    monkeypatch.setattr(preparation, "prepare_homeassistant", fail)


def refused(capsys, *arguments):
    """What a command says that must fail."""
    capsys.readouterr()
    assert cli.main(list(map(str, arguments))) == 2
    return capsys.readouterr().err.splitlines()[-1]


@pytest.mark.usefixtures("no_work")
def test_evaluate(own_run, corpus, tmp_path, capsys):
    """A file stands for a folder that cannot be written to: nothing is denied to root."""
    (own_run / "evaluation").touch()
    command = ["evaluate", own_run, "--data", corpus]
    cure = "choose another place with --output"
    assert refused(capsys, *command).endswith(f"cannot write into {own_run / 'evaluation'}; {cure}")
    scores = tmp_path / "scores.json"
    for name in ("scores.de", "scores.baseline.de"):
        (tmp_path / name).mkdir()
        arguments = ["--baseline", own_run, "--output", scores]
        assert f"{tmp_path / name} is a folder" in refused(capsys, *command, *arguments)
        (tmp_path / name).rmdir()
    long = tmp_path / f"{'x' * 245}.json"
    assert "File name too long" in refused(capsys, *command, "--output", long)


@pytest.mark.usefixtures("no_work")
def test_other_commands(run_dir, tmp_path, capsys):
    (tmp_path / "file").touch()
    inside = tmp_path / "file" / "x"
    for command in (
        ["translate", run_dir, "--input", __file__, "--output"],
        ["average", "--inputs", run_dir, "--last", 2, "--output"],
        ["upcycle", run_dir, "--experts", 2, "--output"],
        ["prune", run_dir, "--experts", 2, "--output"],
        ["table", tmp_path, "--baseline", "dense", "--output"],
        ["demo", "--runs"],
        ["gradients", "--output"],
    ):
        assert f"cannot write into {tmp_path / 'file'}" in refused(capsys, *command, inside)
    page = ["report", tmp_path, "--output", f"{inside}.html"]
    assert f"cannot write into {tmp_path / 'file'}" in refused(capsys, *page)
    arguments = ["--output", tmp_path / "out", "--checksums", inside]
    assert "another place with --checksums" in refused(capsys, "prepare", "wmt14", *arguments)


def test_names_of_files_leave_room_for_what_is_not_whole_yet(tmp_path):
    check_writable(tmp_path / ("x" * 246))
    with pytest.raises(UserError, match="File name too long"):
        check_writable(tmp_path / ("x" * 247))


def test_benchmarks(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(measuring.argparse.ArgumentTypeError, match="cannot write into"):
        measuring.output_file(str(tmp_path / "file" / "x.json"))
    assert measuring.output_file(str(tmp_path / "x.json")) == tmp_path / "x.json"
