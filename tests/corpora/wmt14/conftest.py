"""Corpora made from miniature archives."""

import json

import pytest
from support import statmt

from fairseq_sparsemixer.corpora.wmt14 import preparation


@pytest.fixture(scope="session")
def built(shared):
    """Both pipelines from the same archives: (record, folder) by name."""

    def build(folder):
        with statmt.serving() as server:
            for pipeline in preparation.PIPELINES:
                output = folder / pipeline
                statmt.prepare(server, output, "--pipeline", pipeline, "--workers", "1")

    folder = shared.directory("wmt14", build)
    records = {
        pipeline: json.loads((folder / pipeline / "record.json").read_text())
        for pipeline in preparation.PIPELINES
    }
    return {pipeline: (record, folder / pipeline) for pipeline, record in records.items()}
