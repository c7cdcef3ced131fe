"""The wheel: downloaded with pip, cached, given."""

import os
import shutil

import pytest
from support.corpora import contents
from support.messages import VOCAB_SIZE, write_wheel

from fairseq_sparsemixer.corpora.homeassistant import extraction, preparation, wheels
from fairseq_sparsemixer.errors import UserError


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """Pip without an index; what lies in the returned folder can be downloaded."""
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))
    return shelf


def test_download_and_cache(fake, offline, tmp_path, monkeypatch):
    shutil.copy(fake, offline)
    folder = tmp_path / "download"
    path = wheels.obtain_wheel(extraction.WHEEL, folder)
    assert path == folder / fake.name
    assert path.read_bytes() == fake.read_bytes()
    assert list(folder.iterdir()) == [path]
    monkeypatch.setattr(wheels, "run_python", lambda *a, **k: pytest.fail("network used"))
    assert wheels.obtain_wheel(extraction.WHEEL, folder) == path
    assert wheels.obtain_wheel(extraction.WHEEL, tmp_path / "other", fake) == fake


def test_damaged_cache_is_downloaded_again(fake, offline, tmp_path, capsys):
    shutil.copy(fake, offline)
    path = tmp_path / "download" / fake.name
    path.parent.mkdir()
    path.write_bytes(fake.read_bytes()[:1000])
    assert wheels.obtain_wheel(extraction.WHEEL, path.parent) == path
    assert path.read_bytes() == fake.read_bytes()
    assert f"{path} is damaged" in capsys.readouterr().err


def test_no_network_says_what_to_do(fake, offline, tmp_path):
    output = tmp_path / "out"
    with pytest.raises(UserError) as caught:
        preparation.prepare_homeassistant(output)
    message = str(caught.value)
    assert "homeassistant==2026.2.3" in message
    assert str(output / "download" / "homeassistant-2026.2.3-py3-none-any.whl") in message
    assert "--wheel" in message
    assert "\n" not in message
    assert [*contents(output)] == [".steps/corpus"]


def test_wrong_file_from_the_index(fake, offline, tmp_path):
    other = [("lamp", {"k": "On"}, {"k": "An"})]
    write_wheel(offline / fake.name, other)
    with pytest.raises(UserError, match=extraction.WHEEL.sha256):
        wheels.obtain_wheel(extraction.WHEEL, tmp_path / "download")
    assert contents(tmp_path / "download") == {}


def test_given_wheel_must_be_whole_even_when_all_is_done(fake, corpus, tmp_path):
    damaged = tmp_path / fake.name
    damaged.write_bytes(fake.read_bytes()[:-1])
    for given, problem in [(damaged, "damaged"), (tmp_path / "no.whl", "no such file")]:
        with pytest.raises(UserError, match=problem) as caught:
            preparation.prepare_homeassistant(corpus, vocab_size=VOCAB_SIZE, wheel=given)
        assert f"--wheel {given}" in str(caught.value)
