"""The flags of ``prepare``."""

import subprocess
import sys

import pytest
from support import commands

from fairseq_sparsemixer.errors import UserError


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "say what to prepare"),
        (["homeassistant", "--raw-dir", "x"], "leave out the corpus"),
        (["--wheel", "x", "--raw-dir", "x"], "leave out the corpus and --wheel"),
        (["homeassistant", "--source-lang", "fr"], "only go with --raw-dir"),
        (["debian", "--wheel", "x"], "--wheel: such flags go with the corpus homeassistant only"),
        (["debian", "--raw-dir", "x"], "leave out the corpus"),
        (["debian", "--downloads", __file__], "--downloads .* is not a folder"),
        (["debian", "--mirror", "x"], "--mirror: .* corpora wmt14, iwslt14, glue only"),
        (["iwslt14", "--pipeline", "moses"], "--pipeline: .* the corpus wmt14 only"),
        (["iwslt14", "--vocab-size", "100"], r"--vocab-size: .*iwslt14 has --merges"),
        (["iwslt14", "--workers", "0"], "--workers 0 does nothing"),
        (["iwslt14", "--source-lang", "de"], "only go with --raw-dir"),
        (["homeassistant", "--downloads", "x"], "corpora debian, wmt14, iwslt14, glue only"),
        (["--raw-dir", "x", "--downloads", "x"], "corpora debian, wmt14, iwslt14, glue only"),
    ],
)
def test_flags_that_do_not_go_together(tmp_path, arguments, message):
    with pytest.raises(UserError, match=message):
        commands.command("prepare", *arguments, "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--wheel", "x"], "--wheel: such flags go with the corpus homeassistant only"),
        (["--source-lang", "fr"], "wmt14 is English-German"),
        (["--workers", "0"], "--workers 0 does nothing"),
        (["--pipeline", "moses", "--vocab-size", "10"], "--vocab-size: such flags belong to"),
        (["--merges", "10"], "--merges: such flags belong to --pipeline moses"),
        (["--vocab-size", "0"], "--vocab-size 0 makes no vocabulary"),
        (["--mirror", "foo"], "--mirror foo is no address"),
        (["--downloads", __file__], "is not a folder"),
        (["--checksums", "/"], "--checksums / is a folder"),
        (["--raw-dir", "x", "--mirror", "http://x"], "--mirror: such flags belong to the archives"),
        (["--raw-dir", "nowhere"], "--raw-dir nowhere: there is no file train.en"),
    ],
)
def test_flags_of_wmt14_that_do_not_go_together(tmp_path, arguments, message):
    with pytest.raises(UserError, match=message):
        commands.command("prepare", "wmt14", "--output", tmp_path / "out", *arguments)


def test_its_flags_are_read_without_what_building_takes():
    code = (
        "import sys, fairseq_sparsemixer.commands.prepare\n"
        "slow = {'torch', 'fairseq', 'numpy', 'sklearn', 'sacrebleu', 'sentencepiece'}\n"
        "print(slow & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout == "set()\n", result.stderr
