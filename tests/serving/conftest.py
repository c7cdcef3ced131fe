"""A small trained model, inspected, and served."""

import contextlib
import threading

import pytest

from fairseq_sparsemixer.evaluation.translator import Translator
from fairseq_sparsemixer.serving.inspector import Inspector
from fairseq_sparsemixer.serving.server import Server


@pytest.fixture(scope="session")
def translator(run_dir, corpus):
    return Translator(str(run_dir), data=corpus)


@pytest.fixture(scope="session")
def inspector(translator):
    return Inspector(translator, beam=3, lenpen=1.0)


@contextlib.contextmanager
def served(inspector):
    """A server of it that answers, for as long as the block lasts."""
    server = Server("127.0.0.1", 0)
    server.begin(inspector)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture(scope="module")
def serving(inspector):
    with served(inspector) as server:
        yield server
