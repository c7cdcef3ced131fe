"""A dense model."""

import pytest
from support import dense


@pytest.fixture(scope="session")
def dense_run(shared, corpus):
    """60 updates of fairseq's own transformer: checkpoint_last.pt."""
    return shared.directory("dense_run", lambda folder: dense.train(corpus, folder))
