"""A report of a few runs."""

import pytest
from support.report_study import make_report


@pytest.fixture(scope="module")
def report(shared, study):
    """The page of the study; where it ran, the data are not."""

    def build(folder):
        folder.mkdir()
        make_report(study, "--output", folder / "study.v1.html")

    return shared.directory("report", build) / "study.v1.html"
