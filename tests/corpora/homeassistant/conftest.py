"""The small wheel in place of the real one, and corpora made from it."""

import shutil
from pathlib import Path

import pytest
from support import messages

from fairseq_sparsemixer.corpora.homeassistant import extraction


@pytest.fixture
def fake(messages_built):
    """The fake wheel in place of the real one: its path."""
    path = messages_built / "wheel" / extraction.WHEEL.file
    with messages.in_place_of_the_real(path):
        yield path


@pytest.fixture(scope="session")
def built(messages_built):
    """Two complete corpora, not to be written to."""
    return messages.corpora_in(messages_built)


@pytest.fixture
def corpus(built, tmp_path):
    """A copy of the finished corpus, to be tampered with."""
    return Path(shutil.copytree(built[0], tmp_path / "corpus"))
