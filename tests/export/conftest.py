"""Fixtures of this folder."""

import pytest
from support.commands import command


@pytest.fixture(scope="session")
def exported(shared, run_dir, corpus):
    """``run_dir`` as a folder of transformers."""

    def build(folder):
        command(
            "export", run_dir, "--data", corpus, "--to", "transformers", "--output", folder / "out"
        )

    return shared.directory("exported", build) / "out"


@pytest.fixture(scope="module")
def modules_cache(tmp_path_factory):
    """Where transformers copies code from such a folder before it runs, instead of at home."""
    folder = str(tmp_path_factory.mktemp("modules"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", folder)
        patch.setenv("HF_MODULES_CACHE", folder)
        yield folder
