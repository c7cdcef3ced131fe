"""``fairseq-sparsemixer check``: what it finds, and that it tells what does not work."""

import importlib.metadata
import re

import pytest
import torch
from packaging.requirements import Requirement

from fairseq_sparsemixer import cli
from fairseq_sparsemixer.errors import UserError
from fairseq_sparsemixer.installation import parts, round_trip
from fairseq_sparsemixer.moe.dispatch import BACKENDS
from fairseq_sparsemixer.training.process import Process


@pytest.fixture
def no_steps(monkeypatch):
    monkeypatch.setattr(round_trip, "run", lambda folder: iter([("train", 1.0)]))


@pytest.mark.slow
def test_everything_once(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert cli.main(["check"]) == 0
    printed = capsys.readouterr().out
    done = re.findall(r"^  (\w+) +\d+\.\d s$", printed, re.M)
    assert done == ["prepare", "train", "resume", "validate", "translate"]
    assert printed.endswith("all is well\n")
    assert f"torch {torch.__version__}" in re.sub(" +", " ", printed)
    for backend in BACKENDS:
        assert re.search(rf"^  {backend} +\S", printed, re.M)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["train", "resume", "validate", "translate"])
def test_a_step_that_goes_wrong(name, tmp_path):
    """Each step's own check fails where its command does nothing, or another thing."""
    (step,) = (each for each in round_trip.steps(tmp_path) if each.name == name)
    logs = {
        "train": '| valid | {"valid_loss": "1.0"}\n| valid | {"valid_loss": "1.1"}\n',
        "resume": "| valid | {}\n",
        "validate": '| valid | {"loss": "2.5"}\n',
    }
    for each, text in logs.items():
        round_trip.log_of(tmp_path, each).write_text(text)
    if name == "validate":
        round_trip.log_of(tmp_path, "resume").write_text('| valid | {"valid_loss": "2.4"}\n')
    round_trip.write_text(tmp_path / "text")
    (tmp_path / "translation").write_text("one line\n")
    assert step.fault()


def test_a_command_that_fails(tmp_path, monkeypatch):
    command = [*round_trip.PYTHON, "no_such_module"]
    step = round_trip.Step("train", command, lambda: "")
    monkeypatch.setattr(round_trip, "steps", lambda folder: [step])
    with pytest.raises(UserError, match=r"^train: .*no_such_module .*train\.log\)$"):
        list(round_trip.run(tmp_path))


@pytest.mark.parametrize("error", [KeyboardInterrupt, UserError("train: no")])
def test_what_it_wrote_is_kept_only_where_something_is_wrong(monkeypatch, tmp_path, error):
    def run(folder):
        (folder / "train.log").touch()
        raise error
        yield

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(round_trip, "run", run)
    assert cli.main(["check"]) == (130 if error is KeyboardInterrupt else 2)
    assert bool(list(tmp_path.iterdir())) == (error is not KeyboardInterrupt)


def test_interrupted_it_leaves_no_process(tmp_path, monkeypatch):
    started = []

    class Interrupted(Process):
        def ended(self, seconds=0):
            if not started:
                started.append(self)
                raise KeyboardInterrupt
            return super().ended(seconds)

    waiting = round_trip.Step("train", ["sleep", "60"], str)
    monkeypatch.setattr(round_trip, "steps", lambda _: [waiting])
    monkeypatch.setattr(round_trip, "Process", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(round_trip.run(tmp_path))
    assert started[0].ended() is not None


def test_packages_that_are_missing_or_too_old(monkeypatch, capsys, no_steps):
    texts = ["torch>=99", "no-such-package>=1", "tqdm", "jinja2; extra == 'report'",
             "nothing; python_version < '3'", "absent; extra == 'wmt'"]  # fmt: skip
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: texts)
    found = parts.installed()
    assert found["torch"] == f"{importlib.metadata.version('torch')}, which is not >=99"
    assert found["no-such-package"] == "missing"
    assert found["tqdm"] == importlib.metadata.version("tqdm")
    assert not {"jinja2", "nothing", "absent"} & found.keys()
    assert parts.extras()["report"] == f"jinja2 {importlib.metadata.version('jinja2')}"
    assert parts.extras()["wmt"].endswith("(pip install 'fairseq-sparsemixer[wmt]')")
    assert cli.main(["check"]) == 2
    assert re.search(r"but torch is .*, no-such-package is missing$", capsys.readouterr().err)


def test_what_setup_requires_is_what_is_looked_for():
    found = parts.installed()
    required = [Requirement(text) for text in importlib.metadata.requires(parts.DISTRIBUTION)]
    always = {each.name for each in required if "extra" not in str(each.marker)}
    assert {"hydra-core", "sacrebleu", "sentencepiece", "torch"} <= always
    assert always - found.keys() <= {"fairseq", "ve-fairseq"}  # by the version of Python


def test_a_checkout_that_is_not_installed(monkeypatch, capsys):
    monkeypatch.setattr(parts, "DISTRIBUTION", "fairseq-sparsemixer-that-is-not-there")
    assert cli.main(["check"]) == 2
    assert "pip install -e ." in capsys.readouterr().err
