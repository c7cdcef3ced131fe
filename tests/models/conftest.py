"""Fixtures of this folder."""

import pytest
from support import commands, training


@pytest.fixture(scope="session")
def trained(shared, toy_corpus):
    """64 updates with a joined dictionary: ``log``, ``tensorboard`` and the checkpoints."""

    def build(directory):
        result = commands.train(
            toy_corpus / "joined",
            directory,
            share_all_embeddings=True,
            max_update=64,
            save_interval_updates=10,
            save_interval=1000,
            validate_interval=1000,
            tensorboard_logdir=directory / "tensorboard",
        )
        (directory / "log").write_text(result.stdout)

    return shared.directory("trained", build)


@pytest.fixture(scope="session")
def stopped(shared, toy_corpus):
    """The first 10 updates of :func:`trained`, which end within an epoch: the same files."""

    def build(directory):
        result = commands.train(
            toy_corpus / "joined",
            directory,
            share_all_embeddings=True,
            max_update=10,
            validate_interval=1000,
            save_interval=1000,
        )
        (directory / "log").write_text(result.stdout)

    return shared.directory("stopped", build)


@pytest.fixture
def build_trainer(toy_corpus, tmp_path):
    """fairseq's trainer with batches of four sentences; the router's name and more settings."""

    def build(*router, **settings):
        cfg = training.configure(toy_corpus / "joined", tmp_path, *router, batch_size=4, **settings)
        return training.build_trainer(cfg)

    return build
