"""Two commands in one place: the second waits, or says who is at work there."""

import functools
import os
import shutil
import time
from types import SimpleNamespace

import pytest
from fairseq import checkpoint_utils
from fairseq.dataclass.configs import CheckpointConfig
from support import commands, pairs, small_run
from support.busy import busy
from support.corpora import SPLITS, read_record

from fairseq_sparsemixer.corpora.folder import steps_in, unchanged
from fairseq_sparsemixer.errors import UserError
from fairseq_sparsemixer.files import (
    atomic_path,
    read_lines,
    scratch_folder,
    write_json,
    write_lines,
)
from fairseq_sparsemixer.laboratory import gradients
from fairseq_sparsemixer.locks import in_turn, sole_user
from fairseq_sparsemixer.report import build
from fairseq_sparsemixer.study import demo, runner
from fairseq_sparsemixer.training import launch


@pytest.fixture
def waited(capsys):
    """Says whether what was called waited for the other process."""

    def check(other):
        said = capsys.readouterr().err
        who = other if isinstance(other, str) else f"process {other} on "
        assert f"waiting for {who}" in said
        return True

    return check


def raw_text(folder, word):
    """Text in which a word is everywhere."""
    folder.mkdir()
    lines = small_run.sentences(60, seed=1)
    for split in SPLITS:
        for language, texts in zip(("en", "de"), lines):
            write_lines(folder / f"{split}.{language}", [f"{text} {word}" for text in texts])
    return folder


@pytest.mark.slow
def test_two_preparations_are_made_one_after_the_other(tmp_path, capfd):
    """The folder is the second's, as if the first had ended before."""
    texts = [raw_text(tmp_path / word, word) for word in ("first", "second")]
    flags = ["--output", tmp_path / "out", "--vocab-size", 60]
    first = os.fork()
    if not first:
        try:
            commands.command("prepare", "--raw-dir", texts[0], *flags)
        except BaseException:
            os._exit(1)
        os._exit(0)
    deadline = time.monotonic() + 60
    while not (tmp_path / "out" / "raw").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    commands.command("prepare", "--raw-dir", texts[1], *flags)
    assert os.waitpid(first, 0)[1] == 0
    assert f"waiting for process {first} on " in capfd.readouterr().err
    out = tmp_path / "out"
    assert read_record(out)["source"]["folder"] == str(texts[1])
    for split in SPLITS:
        assert all(line.endswith(" second") for line in read_lines(out / "raw" / f"{split}.en"))
        pieces = read_lines(out / "spm" / f"{split}.en")
        assert all("first" not in line.replace(" ", "") for line in pieces)
    assert not (out / ".lock").exists()


KILLED = pytest.mark.parametrize("killed", [False, True])
"""Whether who is at work ends in order, or is killed: it is waited for no longer, either way."""


@KILLED
def test_commands_that_write_wait_for_each_other(place, tmp_path, monkeypatch, waited, killed):
    place.run("a")
    place.run("b", router="hash")
    stem = tmp_path / "out" / "table.v1"
    with busy(lambda: in_turn(stem, beside=True), killed=killed) as other:
        place.table()
        assert waited(other)

    corpus = tmp_path / "corpus"
    with busy(lambda: steps_in(corpus, 1, "toy"), killed=killed) as other:
        with steps_in(corpus, 1, "toy"):
            pass
        assert waited(other)

    page = tmp_path / "page.html"
    monkeypatch.setattr(build, "gather_content", lambda *_: {})
    monkeypatch.setattr(build, "render", lambda _: "page")
    scratch = page.with_name(".page_figures.partial")
    with busy(lambda: scratch_folder(scratch), killed=killed) as other:
        build.build_report([place.runs], None, None, page)
        assert waited(other)
    assert read_lines(page) == ["page"]

    monkeypatch.setattr(gradients, "_measure_cases", lambda *_: [])
    monkeypatch.setattr(gradients, "_show", lambda *_: None)
    with busy(lambda: in_turn(tmp_path / "measured"), killed=killed) as other:
        gradients.measure_toys(1, tmp_path / "measured")
        assert waited(other)


@KILLED
def test_evaluations_with_one_output_wait_for_each_other(run_dir, tmp_path, waited, killed):
    source, reference = tmp_path / "x.en", tmp_path / "x.de"
    write_lines(source, ["the red house"])
    write_lines(reference, ["das rote Haus"])
    flags = ["--source", source, "--reference", reference, "--output", tmp_path / "o.json"]
    with busy(lambda: in_turn(tmp_path / "o", beside=True), killed=killed) as other:
        commands.command("evaluate", run_dir, *flags)
        assert waited(other)
    output = ["--output", tmp_path / "o.de"]
    with busy(lambda: atomic_path(tmp_path / "o.de"), killed=killed):
        commands.command("translate", run_dir, "--input", source, *output)
        assert waited("another process")
    inputs = ["--inputs", run_dir / "checkpoint_best.pt", "--output", tmp_path / "o.pt"]
    with busy(lambda: atomic_path(tmp_path / "o.pt"), killed=killed):
        commands.command("average", *inputs)
        assert waited("another process")
    assert {path.name for path in tmp_path.iterdir()} == {"x.en", "x.de", "o.json", "o.de", "o.pt"}


class _Begun(Exception):
    """The command has its place to itself."""


def _begin(*arguments, **options):
    raise _Begun


@KILLED
@pytest.mark.parametrize("command", ["demo", "train", "study", "fairseq-train"])
def test_who_trains_where_another_does_is_refused(command, killed, tmp_path, monkeypatch):
    """And is not, when the other has ended."""
    flag, options = "--runs", {}
    if command == "demo":
        monkeypatch.setattr(demo.preparation, "prepare_homeassistant", lambda _: None)
        monkeypatch.setattr(demo, "Engine", _begin)
        begin = demo.Demo([], tmp_path / "data", tmp_path, []).do
    elif command == "train":
        monkeypatch.setattr(launch.record, "read_record", _begin)
        begin = functools.partial(launch._train, SimpleNamespace(folder=tmp_path, batch=None))
    elif command == "study":
        flag = "--output"
        monkeypatch.setattr(runner, "lay_out", _begin)
        begin = functools.partial(runner.run, tmp_path / "plan.yaml", tmp_path)
    else:
        flag, options = "--save-dir", {"name": ".training.lock", "heirs": False}
        cfg = CheckpointConfig(save_dir=str(tmp_path), optimizer_overrides=None)
        trainer = SimpleNamespace(is_data_parallel_master=True)
        monkeypatch.setattr(checkpoint_utils.ast, "literal_eval", _begin)
        begin = functools.partial(checkpoint_utils.load_checkpoint, cfg, trainer)
    with (
        busy(lambda: sole_user(tmp_path, flag, **options), killed=killed) as other,
        pytest.raises(UserError, match=rf"^process {other} on .* is at work in .* {flag}$"),
    ):
        begin()
    with pytest.raises(_Begun):
        begin()


def test_a_corpus_that_is_made_anew_is_not_read(tmp_path):
    """Nothing tells then which of its files belong together."""
    record = tmp_path / "record.json"
    with steps_in(tmp_path, 1, "toy") as steps:
        write_json(record, {"corpus": "toy"})
        with unchanged(tmp_path):
            pass
        anew = pytest.raises(UserError, match="was prepared anew while it was read")
        with anew, unchanged(tmp_path):
            steps.run("first", {}, [], lambda: ([], {}))
        with pytest.raises(UserError, match="is not complete: wait for"), unchanged(tmp_path):
            pass


@pytest.mark.slow
def test_two_trainings_of_fairseq_do_not_share_a_folder(toy_corpus, tmp_path):
    command = commands.train_command(
        toy_corpus / "joined", tmp_path, arch={**commands.SIZE, "encoder-layers": 1}, max_update=1
    )

    def training():
        return sole_user(tmp_path, "--save-dir", name=".training.lock", heirs=False)

    with busy(training) as other:
        (result,) = commands.finish(commands.start("fairseq_cli.train", *command))
        assert result.returncode != 0
        assert f"\nerror: process {other} on " in result.stderr
        assert not list(tmp_path.glob("*.pt"))
    commands.run("fairseq_cli.train", *command)
    assert list(tmp_path.glob("checkpoint*.pt"))


@pytest.mark.slow
def test_the_script_that_tries_every_pair_sees_what_is_wrong(shared, tmp_path):
    """``scripts/two_at_once.py`` tries them all."""
    template = shared.directory("pairs", pairs.build_place)
    place = tmp_path / "place"
    assert pairs.try_pair("translate", "translate", template, place)[:2] == (pairs.OUTCOMES[1], "")
    assert pairs.try_killed("average", template, place)[:2] == (pairs.OUTCOMES[0], "")
    shutil.copytree(template, place)
    corpus, evaluation = place / "corpus", place / "s" / pairs.RUN / "evaluation"
    for name, path in (
        ("prepare", corpus / "raw" / "test.en"),
        ("prepare", corpus / "spm" / "valid.de"),
        ("prepare", corpus / "bin" / "train.en-de.en.bin"),
        ("evaluate", evaluation / "test.de"),
    ):
        assert not pairs.fault_of(name, place)
        whole = path.read_bytes()
        path.write_bytes(whole[:100] + whole[102:] + whole[:2])
        assert pairs.fault_of(name, place), path
        path.write_bytes(whole)
