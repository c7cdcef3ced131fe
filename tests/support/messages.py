"""A small wheel of our own sentences in place of Home Assistant's, and corpora made from it."""

import contextlib
import dataclasses
import json
import os
import random
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import fairseq_sparsemixer
from fairseq_sparsemixer import files
from fairseq_sparsemixer.corpora import splitting
from fairseq_sparsemixer.corpora.homeassistant import extraction, preparation
from support.phrases import ADVERBS, OBJECTS, SUBJECTS, VERBS

SPLIT = splitting.SplitSettings(
    held_out_share=0.3, salt="1", min_held_out_tokens=5, max_cosine=0.70
)
VOCAB_SIZE = 300


def component_messages():
    """For each of 40 components its English and German messages; the last has near duplicates."""
    generator = random.Random(7)
    for number in range(40):
        english, german = {}, {}
        for key in range(11):
            parts = [generator.choice(part) for part in (SUBJECTS, VERBS, OBJECTS, ADVERBS)]
            english[f"k{key}"] = " ".join(part[0] for part in parts) + "."
            german[f"k{key}"] = " ".join(part[1] for part in parts) + "."
        english["last"] = f"Program number {number} stopped: {SUBJECTS[number % 4][0]} is broken."
        german["last"] = f"Programm Nummer {number} hielt an: {SUBJECTS[number % 4][1]} ist kaputt."
        yield f"component{number:02}", {"config": english}, {"config": german}


def write_wheel(path, messages, reverse=False):
    """A wheel that pip accepts, for a Python newer than ours; same content, either order."""
    entries = {
        "homeassistant-2026.2.3.dist-info/METADATA": (
            "Metadata-Version: 2.1\nName: homeassistant\nVersion: 2026.2.3\n"
            "Requires-Python: >=3.13.2\n"
        ),
        "homeassistant-2026.2.3.dist-info/WHEEL": (
            "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        ),
        "homeassistant-2026.2.3.dist-info/RECORD": "",
    }
    for component, english, german in messages:
        folder = f"homeassistant/components/{component}/translations"
        entries[f"{folder}/en.json"] = json.dumps(english, ensure_ascii=False)
        if german is not None:
            entries[f"{folder}/de.json"] = json.dumps(german, ensure_ascii=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name in sorted(entries, reverse=reverse):
            archive.writestr(zipfile.ZipInfo(name), entries[name])
    return path


def wheel_for(path):
    return dataclasses.replace(extraction.WHEEL, sha256=files.sha256_of(path))


@contextlib.contextmanager
def in_place_of_the_real(path):
    """The wheel at ``path`` is the one that the corpus is made from."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(extraction, "WHEEL", wheel_for(path))
        patch.setattr(extraction, "SPLIT", SPLIT)
        yield


SECOND_RUN = """
import sys
from pathlib import Path
from fairseq_sparsemixer.corpora.homeassistant import preparation
from support import messages
wheel, output = Path(sys.argv[1]), Path(sys.argv[2])
with messages.in_place_of_the_real(wheel):
    preparation.prepare_homeassistant(output, vocab_size=messages.VOCAB_SIZE, wheel=wheel)
"""


def build(folder):
    """Two complete corpora: made here; made elsewhere from another zip with another hash seed."""
    wheel = write_wheel(folder / "wheel" / extraction.WHEEL.file, component_messages())
    second_wheel = folder / "reversed" / wheel.name
    write_wheel(second_wheel, component_messages(), reverse=True)
    first, second = corpora_in(folder)
    command = [sys.executable, "-c", SECOND_RUN, str(second_wheel), str(second)]
    paths = [Path(fairseq_sparsemixer.__file__).parents[1], Path(__file__).parents[1]]
    environment = {
        **os.environ,
        "PYTHONHASHSEED": "12345",
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
    }
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        with in_place_of_the_real(wheel):
            record = preparation.prepare_homeassistant(first, vocab_size=VOCAB_SIZE, wheel=wheel)
        _, errors = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 0, errors
    assert record == json.loads((first / "record.json").read_text(encoding="utf-8"))


def corpora_in(folder):
    """The two corpora of :func:`build`."""
    return folder / "first", folder / "second" / "a much longer name of the corpus"
