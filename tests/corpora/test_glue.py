"""GLUE from miniatures of its archives."""

import io
import json
import os
import shutil
import subprocess
import sys
import zipfile

import pytest
from support import commands, glue

from fairseq_sparsemixer.corpora import binarise
from fairseq_sparsemixer.corpora.glue import TASKS, prepare_glue
from fairseq_sparsemixer.errors import UserError
from fairseq_sparsemixer.files import read_lines


@pytest.fixture
def published(server, monkeypatch):
    """The server with the archives; fairseq-preprocess, which takes seconds, is left out."""
    server.files.update(glue.published())
    made = []

    def build(folder, texts, destination, dictionary=None):
        made.append((texts, destination, dictionary))
        return []

    monkeypatch.setattr(binarise, "build_one_text", build)
    server.made = made
    return server


def prepare(server, corpus, output, *arguments):
    flags = ["--mirror", server.url, "--vocabulary", corpus, "--output", output, *arguments]
    commands.command("prepare", "glue", *flags)
    return json.loads((output / "record.json").read_text())


def test_every_task_has_its_text_and_labels(published, messages_corpus, tmp_path):
    out = tmp_path / "out"
    record = prepare(published, messages_corpus, out)
    assert list(record["tasks"]) == list(TASKS)
    for task in TASKS:
        tables = {"train": "train", "valid": "dev"}
        if task == "MNLI":
            tables = {"train": "train", "valid": "dev_matched", "valid1": "dev_mismatched"}
        single = task in ("CoLA", "SST-2")
        for split, table in tables.items():
            expected = list(zip(*glue.rows(task, table)))
            columns = ["input0", "label"] if single else ["input0", "input1", "label"]
            if single:
                del expected[1]
            for column, lines in zip(columns, expected):
                assert read_lines(out / "raw" / task / f"{split}.{column}") == list(lines), task
            # Cut as the corpus is.
            pieces = read_lines(out / "spm" / task / f"{split}.input0")
            text = ["".join(line.split()).replace("\u2581", " ").strip() for line in pieces]
            assert text == list(expected[0])
        assert record["tasks"][task]["sentences"] == {
            split: glue.SIZES[table] for split, table in tables.items()
        }
    assert (out / "spm" / "dict.txt").read_bytes() == (
        messages_corpus / "spm" / "dict.txt"
    ).read_bytes()
    for texts, destination, dictionary in published.made:
        assert dictionary == (None if destination.endswith("/label") else "spm/dict.txt")
        assert list(texts) in (["train", "valid"], ["train", "valid", "valid1"])
    assert len(published.made) == 2 * 2 + 5 * 3 + 2  # STS-B has no classes
    assert read_lines(out / "bin" / "STS-B" / "label" / "train.label")[:3] == ["0.0", "0.5", "1.0"]


def test_what_is_done_is_not_done_again(published, messages_corpus, tmp_path, capsys):
    out = tmp_path / "out"
    record = prepare(published, messages_corpus, out, "--tasks", "RTE,MRPC")
    assert list(record["tasks"]) == ["RTE", "MRPC"]
    assert sorted(path.name for path in (out / "bin").glob("*")) == []  # all of it is left out
    published.requests.clear()
    assert prepare(published, messages_corpus, out, "--tasks", "RTE,MRPC") == record
    assert published.requests == [] and capsys.readouterr().err.count("already done") == 3


def test_another_vocabulary_cuts_anew(published, messages_corpus, tmp_path):
    out = tmp_path / "out"
    prepare(published, messages_corpus, out, "--tasks", "RTE")
    other = tmp_path / "other"
    shutil.copytree(messages_corpus / "spm", other / "spm")
    with (other / "spm" / "dict.txt").open("a") as file:
        file.write("new 1\n")
    calls = len(published.made)
    prepare(published, other, out, "--tasks", "RTE")
    assert len(published.made) == 2 * calls
    record = prepare(published, other, out, "--tasks", "MRPC")
    assert list(record["tasks"]) == ["RTE", "MRPC"]
    with pytest.raises(UserError, match="holds RTE in another vocabulary: name another folder"):
        prepare_glue(out, messages_corpus, tasks=["MRPC"])


def test_what_was_made_before_an_interruption_is_remembered(
    published, messages_corpus, tmp_path, monkeypatch
):
    out = tmp_path / "out"
    before = prepare(published, messages_corpus, out, "--tasks", "RTE")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("fairseq_sparsemixer.corpora.glue._build", interrupted)
        prepare(published, messages_corpus, out, "--tasks", "MRPC")
    assert not (out / "record.json").exists()
    record = prepare(published, messages_corpus, out, "--tasks", "MRPC")
    assert list(record["tasks"]) == ["RTE", "MRPC"]
    assert record["tasks"]["RTE"] == before["tasks"]["RTE"]


def interrupted(*_):
    raise KeyboardInterrupt


def changed(task, name, content):
    files = {**glue.members(task), name: content}
    return glue.zipped({key: value for key, value in files.items() if value is not None})


def encrypted(content):
    """A zip whose members say that they are."""
    content = bytearray(content)
    for signature, place in ((b"PK\x01\x02", 8), (b"PK\x03\x04", 6)):
        start = content.find(signature)
        while start >= 0:
            content[start + place] |= 1
            start = content.find(signature, start + 4)
    return bytes(content)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no archive", r"RTE\.zip is damaged .* it was removed"),
        (encrypted(changed("RTE", "x", b"")), r"RTE\.zip is damaged .*encrypted"),
        (changed("RTE", "RTE/dev.tsv", None), r"RTE\.zip .* has no member RTE/dev\.tsv"),
        (changed("RTE", "RTE/dev.tsv", b""), r"dev\.tsv is .* no column 'sentence1'"),
        (changed("RTE", "RTE/dev.tsv", b"index\tsentence1\tsentence2\n"), "no column 'label'"),
        (
            changed("RTE", "RTE/train.tsv", b"index\tsentence1\tsentence2\tlabel\n1\t2\n"),
            "the table train of RTE has no row",
        ),
    ],
)
def test_another_archive(published, messages_corpus, tmp_path, content, message):
    published.files[f"{glue.DATA}/RTE.zip"] = content
    with pytest.raises(UserError, match=message):
        prepare(published, messages_corpus, tmp_path / "out", "--tasks", "RTE")
    assert not (tmp_path / "out" / "record.json").exists()


def test_names_in_a_zip_decide_nothing(published, messages_corpus, tmp_path):
    evil = changed("RTE", "../../evil", b"x")
    assert "../../evil" in zipfile.ZipFile(io.BytesIO(evil)).namelist()
    published.files[f"{glue.DATA}/RTE.zip"] = evil
    prepare(published, messages_corpus, tmp_path / "a" / "out", "--tasks", "RTE")
    assert not list(tmp_path.rglob("evil"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "say with --vocabulary which corpus"),
        (["--vocabulary", "nowhere"], r"--vocabulary nowhere: there is no spm/spm\.model; give"),
        (["--vocabulary", "{corpus}", "--tasks", "RTE,COLA"], "--tasks COLA: GLUE has the tasks"),
        (["--vocabulary", "{corpus}", "--vocab-size", "9"], "--vocab-size: such flags belong"),
        (["--source-lang", "fr"], "only go with --raw-dir"),
    ],
)
def test_flags_that_do_not_go_together(messages_corpus, tmp_path, arguments, message):
    arguments = [each.format(corpus=messages_corpus) for each in arguments]
    with pytest.raises(UserError, match=message):
        commands.command("prepare", "glue", "--output", tmp_path / "out", *arguments)
    assert not (tmp_path / "out").exists()


ENVIRONMENT = f"""
cd "$(dirname "${{BASH_SOURCE[0]}}")/.."
environment="{commands.PACKAGE.parent}/scripts/environment.sh"
source <(sed -n '/^\\(fail\\|quoted\\)()/,/^}}/p' "$environment")
"""
"""Without what installs."""


def script(place, name, *arguments, **environment):
    """Run one of the scripts where nothing is installed for it; its output."""
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
    result = subprocess.run(
        [place / "scripts" / name, *map(str, arguments)],
        env={**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout


@pytest.mark.slow
def test_from_pre_training_to_scores(server, messages_corpus, tmp_path):
    """By the scripts, with fairseq's own commands: a task of each kind, and each twice."""
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "environment.sh").write_text(ENVIRONMENT)
    root = commands.PACKAGE.parent
    for name in ("pretrain.sh", "glue.sh", "glue_scores.py"):
        (tmp_path / "scripts" / name).symlink_to(root / "scripts" / name)
    for name in ("configs", "fairseq_sparsemixer"):
        (tmp_path / name).symlink_to(root / name)
    data, short = (
        tmp_path / "data of jürgen's",
        ["optimization.max_update=3", "lr_scheduler.warmup_updates=1"],
    )
    shutil.copytree(messages_corpus, data)
    script(tmp_path, "pretrain.sh", data, "en", "run", *short, OBJECTIVE="electra")
    server.files.update(glue.published())
    tasks = ["CoLA", "MRPC", "STS-B", "MNLI"]
    prepare(server, data, data / "glue", "--tasks", ",".join(tasks))
    for _ in range(2):
        output = script(
            tmp_path,
            "glue.sh",
            data,
            "run/checkpoint_best.pt",
            "scores",
            *short,
            TASKS=" ".join(tasks),
        )
    lines = [line.split() for line in output.splitlines()[-7:]]
    assert [(words[0], " ".join(words[1:-1])) for words in lines] == [
        ("CoLA", "Matthews correlation"),
        ("MRPC", "F1"),
        ("MRPC", "accuracy"),
        ("STS-B", "Pearson correlation"),
        ("STS-B", "Spearman's"),
        ("MNLI", "accuracy, matched"),
        ("MNLI", "accuracy, mismatched"),
    ]
    assert all(-100 <= float(words[-1]) <= 100 for words in lines)
    trained = commands.parameters(tmp_path / "scores" / "STS-B" / "checkpoint_best.pt")
    assert (
        trained["classification_heads.sentence_classification_head.out_proj.weight"].shape[0] == 1
    )
    log = (tmp_path / "scores" / "MNLI" / "hydra_train.log").read_text()
    assert "Loaded checkpoint run/checkpoint_best.pt" in log
