"""Fixtures of more than one test file."""

import commands
import pytest


@pytest.fixture(scope="session")
def shared(tmp_path_factory, request):
    """Directories built once for the session, also where xdist runs several workers."""
    root = tmp_path_factory.getbasetemp()
    if hasattr(request.config, "workerinput"):
        root = root.parent  # that of the session; each worker has a folder in it
    return commands.Shared(root / "shared")


@pytest.fixture(scope="session")
def toy_corpus(shared):
    """A folder with ``raw``, ``joined`` and ``separate``."""
    return shared.directory("corpus", commands.build_corpus)
