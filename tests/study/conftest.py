"""A corpus and a study of it."""

import shutil

import pytest
from support.small_study import DOMAINS, study, write_plan

from fairseq_sparsemixer.corpora.folder import CORPUS_RECORD
from fairseq_sparsemixer.files import read_lines, write_json, write_lines


@pytest.fixture(scope="session")
def prepared(corpus, tmp_path_factory):
    """The toy corpus with a record and with domains."""
    folder = shutil.copytree(corpus, tmp_path_factory.mktemp("corpus") / "corpus")
    write_json(folder / CORPUS_RECORD, {"corpus": "toy"})
    for split in ("valid", "test"):
        lines = read_lines(folder / "raw" / f"{split}.en")
        write_lines(folder / "raw" / f"{split}.domain", (DOMAINS[n % 2] for n in range(len(lines))))
    return folder


@pytest.fixture(scope="session")
def finished(shared, prepared):
    """A study that nothing disturbed."""

    def build(folder):
        folder.mkdir()
        study(write_plan(folder / "p.yaml", prepared), "--output", folder / "study")

    return shared.directory("finished_study", build) / "study"
