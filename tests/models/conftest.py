"""Fixtures of this folder."""

import pytest
from support import commands


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
