"""Downloads, a finished corpus, and a machine with no programs."""

import shutil
from pathlib import Path

import pytest
from support import debian

from fairseq_sparsemixer.corpora.debian import extraction


@pytest.fixture(autouse=True)
def small(monkeypatch, no_binary):
    """Few sentences held out, and no fairseq-preprocess, which takes seconds to start."""
    monkeypatch.setattr(extraction, "SPLIT", debian.SPLIT)


@pytest.fixture
def downloads(shelf, tmp_path):
    """Downloads to be tampered with."""
    return Path(shutil.copytree(shelf, tmp_path / "downloads"))


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """An empty folder that alone is searched for programs."""
    folder = tmp_path / "programs"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    return folder


@pytest.fixture
def built(debian_built):
    """A finished corpus, not to be written to."""
    return debian_built
