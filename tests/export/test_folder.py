"""The exported folder, where fairseq cannot be imported, against our translations."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import commands, without_fairseq
from support.full_disk import room_for
from support.small_run import MAX_POSITIONS
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from fairseq_sparsemixer import cli
from fairseq_sparsemixer.errors import UserError
from fairseq_sparsemixer.evaluation.translator import Translator
from fairseq_sparsemixer.files import read_lines

pytestmark = pytest.mark.usefixtures("one_thread", "modules_cache")

ODD = [
    "a",
    "</s> the <unk> red <s> house <pad>",
    "  the\tred   house \u00a0 is\u200b here ",
    "\u2581the \u2581 red",
    "the\0house",
    "日本 Ünïcode e\u0301 \ufb01 \U0001f600",
    "the " * 50,
    "zzz qqq xyz!?",
]


@pytest.fixture(scope="module")
def translator(run_dir, corpus):
    return Translator(str(run_dir), data=corpus)


@pytest.fixture(scope="module")
def lines(corpus):
    return [*read_lines(corpus / "raw" / "test.en"), *ODD]


@pytest.fixture(scope="module")
def elsewhere(exported, lines, modules_cache):
    """What :mod:`support.without_fairseq` says, greedily, and with the beam of the folder."""
    result = subprocess.run(
        [sys.executable, without_fairseq.__file__, str(exported)],
        input=json.dumps({"lines": lines, "searches": [{"num_beams": 1}, {}, {"num_beams": 3}]}),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_pieces_are_ours(elsewhere, lines, translator):
    ours = [translator._encode_source(line) for line in lines]
    assert elsewhere["pieces"] == [line.tolist() for line in ours]


@pytest.mark.parametrize(("search", "beam"), [(0, 1), (1, 5), (2, 3)])
def test_translations_are_ours(elsewhere, lines, translator, search, beam):
    ours = translator.translate(lines, beam=beam)
    found = elsewhere["results"][search]
    assert [line.replace("<unk>", "") for line in (each.text for each in ours)] == found["text"]
    if beam > 1:
        scores = torch.tensor([each.score for each in ours])
        torch.testing.assert_close(torch.tensor(found["scores"]), scores, atol=1e-4, rtol=1e-4)


@pytest.fixture(scope="module")
def loaded(exported, modules_cache):
    tokenizer = AutoTokenizer.from_pretrained(exported, trust_remote_code=True)
    return tokenizer, AutoModelForSeq2SeqLM.from_pretrained(exported, trust_remote_code=True)


def test_what_generate_can_be_told(loaded, lines):
    tokenizer, model = loaded
    batch = tokenizer(lines[:6], return_tensors="pt", padding=True)
    usual = model.generate(**batch)
    assert torch.equal(model.generate(**batch, use_cache=False), usual)
    for row, line in enumerate(lines[:6]):
        alone = model.generate(**tokenizer(line, return_tensors="pt"))[0]
        assert alone.tolist() == [token for token in usual[row].tolist() if token != 1]
    four = model.generate(**batch, num_beams=4, num_return_sequences=4)
    assert len(four) == 24 and len({tuple(row) for row in four[:4].tolist()}) == 4
    short = model.generate(**batch, max_length=4)
    assert short.shape[1] <= 4 and (short[:, -1] <= 2).all()
    torch.manual_seed(1)
    sampled = model.generate(**batch, do_sample=True, num_beams=1, top_k=0)
    assert (sampled[:, 1:] != 1).any()
    forced = torch.tensor([[2, 7]] * 6)
    assert (model.generate(**batch, decoder_input_ids=forced)[:, 1] == 7).all()


def test_what_is_saved_again_is_the_same(loaded, exported, tmp_path):
    tokenizer, model = loaded
    for each in loaded:
        each.save_pretrained(tmp_path / "again")
    again = AutoTokenizer.from_pretrained(tmp_path / "again", trust_remote_code=True)
    assert again("the red house").input_ids == tokenizer("the red house").input_ids
    assert again.model_max_length == MAX_POSITIONS
    copy = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "again", trust_remote_code=True)
    state = model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in copy.state_dict().items())
    assert {path.name for path in exported.iterdir()} == {
        path.name for path in (tmp_path / "again").iterdir()
    }


def test_targets_are_numbered_by_their_own_dictionary(exported, tmp_path):
    for path in exported.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    lines = read_lines(tmp_path / "dict.target.txt")
    (tmp_path / "dict.target.txt").write_text("".join(f"{line}\n" for line in lines[::-1]))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=True)
    source = tokenizer("the red house").input_ids
    both = tokenizer("the red house", text_target="the red house")
    last = 4 + len(lines) - 1
    assert both.input_ids == source and both.labels == [last + 4 - n for n in source[:-1]] + [2]
    assert tokenizer.decode(both.labels, skip_special_tokens=True) == "the red house"


def export(run, output, *flags):
    return cli.main(
        ["export", *map(str, [run, *flags, "--to", "transformers"]), "--output", str(output)]
    )


def test_a_folder_is_whole_or_missing_and_never_someone_elses(run_dir, corpus, tmp_path, capsys):
    output = tmp_path / "out"
    with room_for(20_000):
        assert export(run_dir, output, "--data", corpus) == 2
    assert "cannot write" in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.iterdir())
    output.mkdir()
    (output / "mine").touch()
    assert export(run_dir, output, "--data", corpus) == 2
    assert "holds something else; give --output" in capsys.readouterr().err
    (output / "mine").unlink()
    (tmp_path / "file").touch()
    assert export(run_dir, tmp_path / "file", "--data", corpus) == 2
    assert "is no folder; give --output" in capsys.readouterr().err
    (tmp_path / "file").unlink()
    for _ in range(2):
        assert export(run_dir, output, "--data", corpus, "--beam", 2, "--lenpen", 0.6) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    search = json.loads((output / "generation_config.json").read_text())
    assert (search["num_beams"], search["length_penalty"], search["max_length"]) == (2, 0.6, 41)
    (output / "README.md").touch()
    assert export(run_dir, output, "--data", corpus) == 2
    assert (output / "README.md").is_file()
    modes = {path.stat().st_mode for path in output.iterdir()}
    assert len(modes) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--checkpoint", "none.pt"], "there is no checkpoint"),
        (["--checkpoint", "checkpoint_best.pt:checkpoint_last.pt"], "an ensemble cannot be"),
        (["--beam", "0"], "--beam 0 makes no search"),
    ],
)
def test_errors_name_the_cure(change, message, run_dir, corpus, tmp_path, capsys):
    assert export(run_dir, tmp_path / "out", "--data", corpus, *change) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_bpe_of_moses_tokens_is_refused(own_run, corpus, tmp_path, capsys):
    for path in (corpus / "bin").glob("dict.*.txt"):
        (own_run / path.name).write_bytes(path.read_bytes())
    (own_run / "bpecodes").write_text("#version: 0.2\na b\n")
    pytest.importorskip("subword_nmt")
    assert export(own_run, tmp_path / "out") == 2
    assert "reads Moses tokens" in capsys.readouterr().err


def test_without_transformers_the_cure_is_named(run_dir, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "fairseq_sparsemixer.export.modeling_sparsemixer", None)
    with pytest.raises(UserError, match=r"pip install 'fairseq-sparsemixer\[export\]'"):
        commands.command("export", run_dir, "--to", "transformers", "--output", tmp_path / "o")


def test_the_files_that_go_along_import_nothing_of_ours(exported):
    for name in ("modeling_sparsemixer.py", "tokenization_sparsemixer.py"):
        text = Path(exported, name).read_text()
        assert "import fairseq" not in text and "from fairseq" not in text
