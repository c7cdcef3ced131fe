"""Reading what ``prepare`` leaves in a corpus' folder."""

import contextlib
import json

import pytest

from fairseq_sparsemixer import files
from fairseq_sparsemixer.corpora import split_step

SPLITS = ("train", "valid", "test")


def contents(folder, *, without=()):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.relative_to(folder).as_posix() not in without
    }


def lines_of(folder, split, language, kind="raw"):
    text = (folder / kind / f"{split}.{language}").read_bytes().decode("utf-8")
    assert text.endswith("\n")
    return text[:-1].split("\n")


def partial_files(folder):
    return [path for path in folder.rglob("*") if "partial" in path.name]


def read_record(folder):
    return json.loads((folder / "record.json").read_text())


def build_binary(folder, *_, **__):
    """In place of fairseq-preprocess, which takes seconds to start."""
    files.write_lines(folder / "bin" / "stub", ["binary"])
    return [folder / "bin" / "stub"], {}


@contextlib.contextmanager
def split_interrupted(monkeypatch, written):
    """Inside, the split is interrupted once it has written so many files; yields which."""
    paths = []

    def write_lines(path, lines):
        if len(paths) == written:
            raise KeyboardInterrupt
        paths.append(path)
        files.write_lines(path, lines)

    with monkeypatch.context() as patch:
        patch.setattr(split_step, "write_lines", write_lines)
        with pytest.raises(KeyboardInterrupt):
            yield paths
    assert len(paths) == written
