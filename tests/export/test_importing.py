"""A folder of transformers as a run of fairseq again."""

import json
import shutil

import pytest
import torch
from support import commands
from support.full_disk import room_for
from support.small_run import USER_DIR, python
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from fairseq_sparsemixer import cli
from fairseq_sparsemixer.evaluation.translator import Translator
from fairseq_sparsemixer.files import read_lines
from fairseq_sparsemixer.runs.reading import read

pytestmark = pytest.mark.usefixtures("one_thread", "modules_cache")


@pytest.fixture(scope="module")
def imported(exported, tmp_path_factory):
    run = tmp_path_factory.mktemp("imported") / "run"
    commands.command("import", exported, "--output", run)
    return run


def test_state_dictionaries_and_pieces_are_bit_for_bit_those_before(imported, run_dir, corpus):
    before, after = (read(folder / "checkpoint_best.pt") for folder in (run_dir, imported))
    assert list(after["model"]) == list(before["model"])
    for name, value in before["model"].items():
        assert (
            torch.equal(after["model"][name], value) and after["model"][name].dtype == value.dtype
        )
    tied = [after["model"][f"{side}.embed_tokens.weight"] for side in ("encoder", "decoder")]
    assert tied[0].data_ptr() == tied[1].data_ptr()
    updates = [state["optimizer_history"][-1]["num_updates"] for state in (before, after)]
    assert updates[0] == updates[1] > 0
    limits = [(state["cfg"]["task"], "max_source_positions") for state in (before, after)]
    assert [task[name] for task, name in limits] == [30, 30]
    for name in ("dict.en.txt", "dict.de.txt", "sentencepiece.bpe.model"):
        assert (imported / name).read_bytes() == (corpus / "bin" / name).read_bytes()


def test_it_translates_as_before(imported, run_dir, corpus):
    lines = read_lines(corpus / "raw" / "test.en")
    assert Translator(str(imported)).translate(lines) == Translator(
        str(run_dir), data=corpus
    ).translate(lines)


@pytest.mark.slow
def test_fairseq_takes_it(imported, corpus, tmp_path):
    """To translate with, to score, and to go on training from."""
    checkpoint = imported / "checkpoint_best.pt"
    generated = python(
        "-m", "fairseq_cli.generate", corpus / "bin", *USER_DIR, "--path", checkpoint, "--cpu",
        "--required-batch-size-multiple", 1, "--beam", 2,
    )  # fmt: skip
    assert sum(line.startswith("H-") for line in generated.splitlines()) == 21
    commands.command("evaluate", imported, "--data", corpus, "--output", tmp_path / "e.json")
    python(
        "-m", "fairseq_cli.train", corpus / "bin", "--cpu", *USER_DIR, "--arch",
        "switch_transformer_demo", "--num-experts", 4, "--share-all-embeddings",
        "--encoder-layers", 1, "--decoder-layers", 1, "--encoder-embed-dim", 32,
        "--decoder-embed-dim", 32, "--encoder-ffn-embed-dim", 64, "--decoder-ffn-embed-dim", 64,
        "--encoder-attention-heads", 2, "--decoder-attention-heads", 2, "--optimizer", "adam",
        "--max-tokens", 1000, "--max-update", 1, "--finetune-from-model", checkpoint,
        "--max-source-positions", 30, "--max-target-positions", 40, "--save-dir", tmp_path,
        "--num-workers", 0, "--lr", 0,
    )  # fmt: skip
    state, before = (read(path)["model"] for path in (tmp_path / "checkpoint_last.pt", checkpoint))
    assert all(torch.equal(value, before[name]) for name, value in state.items())


@pytest.mark.slow
def test_a_model_of_fairseq_itself_goes_out_and_comes_back(corpus, tmp_path):
    python(
        "-m", "fairseq_cli.train", corpus / "bin", "--cpu", "--arch", "transformer_iwslt_de_en",
        "--share-decoder-input-output-embed", "--encoder-layers", 1, "--decoder-layers", 1,
        "--encoder-embed-dim", 32, "--decoder-embed-dim", 32, "--encoder-ffn-embed-dim", 64,
        "--decoder-ffn-embed-dim", 64, "--optimizer", "adam", "--lr", 0.01, "--max-tokens", 1000,
        "--max-update", 9, "--save-dir", tmp_path / "run", "--num-workers", 0,
    )  # fmt: skip
    there = tmp_path / "there"
    options = ["--data", corpus, "--to", "transformers", "--output", there]
    commands.command("export", tmp_path / "run", *options)
    commands.command("import", there, "--output", tmp_path / "back")
    before, after = (read(tmp_path / name / "checkpoint_best.pt") for name in ("run", "back"))
    assert after["cfg"]["model"].arch == "transformer_iwslt_de_en"
    assert list(after["model"]) == list(before["model"])
    assert all(torch.equal(after["model"][name], each) for name, each in before["model"].items())


def test_what_transformers_saved_with_other_weights_comes_back(exported, tmp_path):
    model = AutoModelForSeq2SeqLM.from_pretrained(exported, trust_remote_code=True)
    with torch.no_grad():
        model.encoder.layers[0].moe.experts.b2.add_(1.0)
    model.save_pretrained(tmp_path / "changed")
    tokenizer = AutoTokenizer.from_pretrained(exported, trust_remote_code=True)
    tokenizer.save_pretrained(tmp_path / "changed")
    commands.command("import", tmp_path / "changed", "--output", tmp_path / "run")
    state = read(tmp_path / "run" / "checkpoint_best.pt")["model"]
    ours = model.state_dict()
    for name, value in state.items():
        # transformers has left out what it does not know.
        assert name.endswith(".version") or torch.equal(value, ours[name])
    assert state["encoder.version"].item() == 3


@pytest.fixture
def folder(exported, tmp_path):
    return shutil.copytree(exported, tmp_path / "folder")


def change(folder, **values):
    """Of config.json: what is given as a dict is merged."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for name, value in values.items():
        config[name] = {**config[name], **value} if isinstance(value, dict) else value
    path.write_text(json.dumps(config))


DAMAGES = {
    "model of type 'bart'": lambda folder: change(folder, model_type="bart"),
    "no whole number": lambda folder: change(folder, encoder_layers="3"),
    "source_lang that is none": lambda folder: change(folder, fairseq={"source_lang": "../en"}),
    "target_lang that is none": lambda folder: change(folder, fairseq={"target_lang": ""}),
    "there is no encoder_layers": lambda folder: (folder / "config.json").write_text(
        '{"model_type": "fairseq_sparsemixer"}'
    ),
    "cannot read": lambda folder: (folder / "config.json").write_text("{"),
    "has no model.safetensors": lambda folder: (folder / "model.safetensors").unlink(),
    "copy it again": lambda folder: (folder / "model.safetensors").write_bytes(b"x" * 100),
    "has no dict.target.txt": lambda folder: (folder / "dict.target.txt").unlink(),
    "cannot be imported": lambda folder: change(
        folder, fairseq={"model": {"_name": "switch_transformer", "encoder_embed_dim": 64}}
    ),
    "which is larger than any model": lambda folder: change(
        folder, encoder_layers=1 << 30, fairseq={}
    ),
    "lacks decoder.layers.1": lambda folder: change(folder, decoder_layers=2),
    "holds encoder.layers.0": lambda folder: change(
        folder, encoder_layers=0, encoder_moe_layers=[]
    ),
    "which is not registered": lambda folder: change(
        folder, fairseq={"model": {"_name": "unknown"}}
    ),
    "not of the declared type": lambda folder: change(
        folder, fairseq={"model": {"_name": "switch_transformer", "adaptive_softmax_cutoff": "f()"}}
    ),
}


@pytest.mark.parametrize("message", DAMAGES)
def test_what_is_no_such_folder_is_one_line(message, folder, tmp_path, capsys):
    DAMAGES[message](folder)
    assert cli.main(["import", str(folder), "--output", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("fairseq-sparsemixer import: error: ") and message in error
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_run_is_whole_or_missing_and_never_overwritten(exported, imported, tmp_path, capsys):
    command = ["import", str(exported), "--output"]
    with room_for(20_000):
        assert cli.main([*command, str(tmp_path / "run")]) == 2
    assert "cannot write" in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.iterdir())
    assert cli.main([*command, str(imported)]) == 2
    assert "holds something else" in capsys.readouterr().err
    assert cli.main(["import", str(tmp_path / "none"), "--output", str(tmp_path / "run")]) == 2
    assert "cannot read" in capsys.readouterr().err
