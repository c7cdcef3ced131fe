"""The command line: help, version, errors."""

import pytest

import fairseq_sparsemixer
from fairseq_sparsemixer import cli
from fairseq_sparsemixer.errors import UserError


@pytest.mark.parametrize("command", sorted(cli.COMMANDS))
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as info:
        cli.main([command, "--help"])
    assert info.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith(f"usage: fairseq-sparsemixer {command}")
    assert len(out.splitlines()) > 10


def test_version_and_list_of_commands(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert fairseq_sparsemixer.__version__ in capsys.readouterr().out
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    out = capsys.readouterr().out
    assert all(command in out for command in cli.COMMANDS)


def test_a_user_error_is_one_line_and_status_2(monkeypatch, capsys):
    from fairseq_sparsemixer.commands import translate

    def fail(args):
        raise UserError("--beam must be at least 1")

    monkeypatch.setattr(translate, "run", fail)
    assert cli.main(["translate", "somewhere"]) == 2
    assert capsys.readouterr().err == (
        "fairseq-sparsemixer translate: error: --beam must be at least 1\n"
    )


def test_what_turns_a_terminal_is_shown_as_escapes(capsys, tmp_path):
    name = "a\x1b[2Jb\tc\u202ed\x9be é 日"
    assert cli.main(["translate", str(tmp_path / name)]) == 2
    assert r"/a\x1b[2Jb\tc\u202ed\x9be é 日;" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["translate", "run", f"--{name}"])
    assert r"--a\x1b[2Jb\tc" in capsys.readouterr().err


def test_an_error_of_the_flags_is_one_line_whatever_it_quotes(capsys):
    for words in (["translate", "run", "--odd\nflag"], ["table", "run", "--x", "a\r\nb"]):
        with pytest.raises(SystemExit) as info:
            cli.main(words)
        assert info.value.code == 2
        *usage, last = capsys.readouterr().err.splitlines()
        assert usage[0].startswith("usage: ") and ": error: " in last


LONG = "x" * 300


@pytest.mark.parametrize(
    "command",
    [
        "study {plan} --output {file}/study",
        "study {long}",
        "train --runs {file}",
        "average --inputs {long} --last 1 --output {folder}/a.pt",
        "translate {long}",
        "table {long} --baseline dense --output {folder}/t",
        "gradients --output {folder}/{long}",
        "prepare --raw-dir {long} --output {folder}/corpus",
        "prepare --raw-dir {raw} --output {folder}",
        "export {long} --to transformers --output {folder}/a",
        "export {folder} --to transformers --output {folder}/{long}",
        "export {folder} --to transformers --output {file}/a",
        "import {long} --output {folder}/a",
    ],
)
def test_places_that_cannot_be_used_are_one_line(command, tmp_path, capsys):
    """What is denied to others is to root only where a file or a folder is in the way."""
    (tmp_path / "file").touch()
    (tmp_path / "text").mkdir()
    for split in ("train", "valid", "test"):
        for language in ("en", "de"):
            (tmp_path / "text" / f"{split}.{language}").write_text("a b\nc d\n")
    (tmp_path / "raw").touch()
    (tmp_path / "plan.yaml").write_text("{}")
    places = {name: tmp_path / name for name in ("file", "text")}
    places.update(plan=tmp_path / "plan.yaml", folder=tmp_path, raw=tmp_path / "text", long=LONG)
    assert cli.main(command.format(**places).split()) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"fairseq-sparsemixer {command.split()[0]}: error: ")


def test_errors_of_no_place_stay_what_they_are(monkeypatch):
    from fairseq_sparsemixer.commands import translate

    def fail(args):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(translate, "run", fail)
    with pytest.raises(OSError, match="Input/output"):
        cli.main(["translate", "somewhere"])


@pytest.mark.parametrize(
    "flags",
    [
        "train --seed {}",
        "train --experts {}",
        "train --max-tokens {}",
        "demo --seed {}",
        "prepare --vocab-size {}",
        "translate run --beam {}",
        "gradients --seed {}",
        "study plan --jobs {}",
        "average --inputs a --output b --last {}",
        "export run --to onnx --output a --beam {}",
    ],
)
def test_numbers_that_are_too_large_are_refused_at_once(flags, capsys):
    for value in (10**30, 2**31, "9" * 5000):
        with pytest.raises(SystemExit) as info:
            cli.main(flags.format(value).split())
        assert info.value.code == 2
        assert f"argument {flags.split()[-2]}: " in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("value", ["nan", "inf", "1e999", "x"])
def test_numbers_that_are_none_are_refused_at_once(value, capsys):
    for flags in ("translate run --lenpen", "study plan --minutes"):
        with pytest.raises(SystemExit):
            cli.main([*flags.split(), value])
        assert "invalid float value" in capsys.readouterr().err
