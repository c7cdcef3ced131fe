"""Fixtures of more than one test file."""

from support import triton_interpreter  # noqa: F401  (before anything imports Triton)

# isort: split

import shutil

import pytest
import torch
from support import browser, commands, small_run
from support.fork_server import ForkServer
from support.report_study import build_study
from support.run_folders import Place


@pytest.fixture(scope="session")
def shared(tmp_path_factory, request):
    """Directories built once for the session, also where xdist runs several workers."""
    root = tmp_path_factory.getbasetemp()
    if hasattr(request.config, "workerinput"):
        root = root.parent  # that of the session; each worker has a folder in it
    return commands.Shared(root / "shared")


@pytest.fixture(scope="session")
def server():
    """Forks commands of a process that has imported fairseq already."""
    with ForkServer() as server:
        yield server


@pytest.fixture(scope="module")
def one_thread():
    """Models this small only wait for a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def toy_corpus(shared):
    """A folder with ``raw``, ``joined`` and ``separate``."""
    return shared.directory("corpus", commands.build_corpus)


@pytest.fixture(scope="session")
def corpus(shared):
    """A prepared corpus: raw/, bin/, copy/ and record.json, as ``prepare`` leaves it."""
    return shared.directory("small_corpus", small_run.build_corpus)


@pytest.fixture(scope="session")
def run_dir(shared, corpus, tmp_path_factory):
    """150 updates of a Switch Transformer: checkpoints by update, by epoch and by loss."""
    built = shared.directory("small_run", lambda folder: small_run.train(corpus, folder))
    # A copy: what a test leaves in it by mistake is found, and no other process meets it.
    run = shutil.copytree(built, tmp_path_factory.mktemp("runs") / "run")
    yield run
    assert _files(run) == _files(built), "a test wrote into it; own_run is for that"


def _files(folder):
    return {(path.relative_to(folder), path.stat().st_size) for path in folder.rglob("*")}


@pytest.fixture
def own_run(run_dir, tmp_path):
    """A copy of ``run_dir`` to write into."""
    return shutil.copytree(run_dir, tmp_path / "run")


@pytest.fixture(scope="session")
def study(shared, corpus):
    """A real run, and fabricated ones: two seeds, dense, without points, diverged, unscored."""
    return shared.directory("report_study", lambda folder: build_study(corpus, folder))


@pytest.fixture(scope="session")
def driver(tmp_path_factory):
    """A browser."""
    if browser.find() is None:
        pytest.skip(browser.HOW_TO_INSTALL)
    with browser.start(tmp_path_factory.mktemp("profile")) as driver:
        yield driver


@pytest.fixture
def place(tmp_path):
    """Where run folders are written, and tabled."""
    return Place(tmp_path)
