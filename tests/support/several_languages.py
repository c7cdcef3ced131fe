"""A prepared corpus of two target languages, and models trained on it with fairseq's commands."""

from pathlib import Path

import pytest

from fairseq_sparsemixer.corpora import binarise
from support import debian, one_text
from support.one_text import LANGUAGE_MODEL

ENCODER = {
    name.replace("decoder", "encoder"): size
    for name, size in LANGUAGE_MODEL.items()
    if name.startswith("decoder")
}
MODEL = {**LANGUAGE_MODEL, **ENCODER, "arch": "switch_transformer_demo"}
PAIRS = [f"en-{language}" for language in debian.LANGUAGES]
LANGUAGES = {
    "lang_pairs": ",".join(PAIRS),
    "langs": ",".join(["en", *debian.LANGUAGES]),
    "encoder_langtok": "tgt",
    "decoder_langtok": True,
}
SETTINGS = {
    "task": "translation_multi_simple_epoch",
    **LANGUAGES,
    "arch": {**MODEL, "router": "language", "num-experts": 2},
    "share_all_embeddings": True,
    "sampling_method": "temperature",
    "sampling_temperature": 5,
    "max_tokens": 1500,
}


def build(server, directory):
    """``downloads`` and ``data``, a prepared corpus."""
    directory.mkdir()
    downloads = debian.write_downloads(
        directory / "downloads", indices=debian.several_index_texts()
    )

    def run_python(arguments, cwd):
        module, *words = arguments[1:]
        inside = ("spm/", ".bin.partial")
        words = [Path(cwd, word) if word.startswith(inside) else word for word in words]
        one_text.run(server, directory, module, *words)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(binarise, "run_python", run_python)
        debian.build_several(directory / "data", downloads, binary=True)
