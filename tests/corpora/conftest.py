"""Corpora that are built once, and fairseq-preprocess left out of others."""

import pytest
from support import debian, messages, statmt
from support.corpora import build_binary

from fairseq_sparsemixer.corpora import binarise, downloads


@pytest.fixture(scope="session")
def messages_built(shared):
    """A small wheel and two corpora made from it; see :func:`.messages.build`."""
    return shared.directory("homeassistant", messages.build)


@pytest.fixture(scope="session")
def messages_corpus(messages_built):
    """A finished corpus of them."""
    return messages.corpora_in(messages_built)[0]


@pytest.fixture(scope="session")
def shelf(shared):
    """Downloads for ``debian``, not to be written to."""
    return shared.directory("debian_downloads", debian.write_downloads)


@pytest.fixture(scope="session")
def debian_built(shared, shelf):
    """A finished corpus ``debian``."""
    return shared.directory("debian", lambda folder: debian.build(folder, shelf))


@pytest.fixture
def no_binary(monkeypatch):
    """Leave out fairseq-preprocess, which takes seconds to start; counts its calls."""
    calls = []

    def counted(folder, *_, **__):
        calls.append(folder)
        return build_binary(folder)

    monkeypatch.setattr(binarise, "build_binary", counted)
    return calls


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(downloads.time, "sleep", lambda seconds: None)
    with statmt.serving() as running:
        yield running


@pytest.fixture
def quick(server, no_binary):
    """The server, where fairseq-preprocess (seconds each time) is left out."""
    return server
