"""Corpora with odd names: training and translating work with them, or the first command refuses."""

import pytest
from support import commands
from support.commands import SIZE, command
from support.corpora import SPLITS

from fairseq_sparsemixer import cli
from fairseq_sparsemixer.evaluation.translator import find_checkpoints
from fairseq_sparsemixer.files import read_lines, write_lines


def own_text(folder, corpus, *languages):
    """The small corpus under other names."""
    folder.mkdir()
    for split in SPLITS:
        for old, new in zip(("en", "de"), languages):
            write_lines(folder / f"{split}.{new}", read_lines(corpus / "raw" / f"{split}.{old}"))
    return folder


@pytest.mark.slow
def test_hyphens_colons_and_long_paths_work(corpus, tmp_path):
    raw = own_text(tmp_path / "raw", corpus, "zh-tw", "pt-br")
    output = tmp_path / "a: 1,2 (ü)" / ("x" * 200) / ("y" * 150)
    languages = ["--source-lang", "zh-tw", "--target-lang", "pt-br"]
    command("prepare", "--raw-dir", raw, "--output", output, "--vocab-size", 60, *languages)
    run = tmp_path / "run:2"
    arch = {**SIZE, "share-all-embeddings": True, "encoder-layers": 1, "decoder-layers": 1}
    commands.train(output / "bin", run, arch=arch, max_update=2)
    command("evaluate", run, "--checkpoint", "checkpoint_last.pt", "--data", output, "--beam", 1)
    translations = read_lines(run / "evaluation" / "test.checkpoint_last.pt-br")
    assert len(translations) == len(read_lines(output / "raw" / "test.pt-br"))
    assert find_checkpoints(f"{run}/checkpoint_last.pt", "") == [run / "checkpoint_last.pt"]


@pytest.mark.parametrize("language", ["a.b", "domain", "", "x" * 51, "-x", "a b", "a:b", "a/b"])
def test_languages_that_cannot_be_in_names_are_refused(language, corpus, tmp_path, capsys):
    own_text(tmp_path / "raw", corpus, "en", "de")
    flags = ["--raw-dir", str(tmp_path / "raw"), "--output", str(tmp_path / "out")]
    assert cli.main(["prepare", *flags, f"--target-lang={language}"]) == 2
    assert f"error: --target-lang {language}: a language has" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("output", ["x" * 300, "a/" + "x" * 300])
def test_names_that_are_too_long_are_refused(output, corpus, tmp_path, capsys):
    own_text(tmp_path / "raw", corpus, "en", "de")
    flags = ["--raw-dir", str(tmp_path / "raw"), "--output", str(tmp_path / output)]
    assert cli.main(["prepare", *flags]) == 2
    assert "File name too long" in capsys.readouterr().err.splitlines()[-1]
