"""The demo, on a toy corpus in place of the download."""

import json
import signal
from types import SimpleNamespace

import pytest
from support import commands

from fairseq_sparsemixer.commands.demo import variants
from fairseq_sparsemixer.corpora.own_text import prepare_raw_text
from fairseq_sparsemixer.errors import UserError
from fairseq_sparsemixer.files import write_json
from fairseq_sparsemixer.models import SwitchTransformerModel
from fairseq_sparsemixer.moe import ROUTERS
from fairseq_sparsemixer.runs.arms import Variant
from fairseq_sparsemixer.study import demo
from fairseq_sparsemixer.training import process

TINY = [
    "+model.encoder_embed_dim=16",
    "+model.encoder_ffn_embed_dim=16",
    "+model.encoder_layers=1",
    "+model.decoder_layers=1",
    "checkpoint.save_interval_updates=1",
    "dataset.validate_interval_updates=3",
    "dataset.max_tokens=200",
    "common.log_interval=1",
    # Untrained models do not know when to stop.
    "optimization.lr=[0.01]",
]


@pytest.fixture
def corpus(monkeypatch, tmp_path, shared):
    """A prepared corpus where the demo looks for one."""
    raw = shared.directory("corpus", commands.build_corpus) / "raw"

    def prepare_toy(output):
        prepare_raw_text(output, raw, vocab_size=35)

    # Not on the module itself: another that is imported meanwhile would keep it.
    toy = SimpleNamespace(prepare_homeassistant=prepare_toy)
    monkeypatch.setattr(demo, "preparation", toy)
    return tmp_path / "data"


def run_demo(tmp_path, *arguments):
    folders = ["--data", tmp_path / "data", "--runs", tmp_path / "runs"]
    commands.command("demo", *folders, *arguments, *TINY)
    return json.loads((tmp_path / "runs" / "results.json").read_text())


def test_demo_goes_on_where_it_stopped_and_does_nothing_twice(corpus, tmp_path, capfd, monkeypatch):
    """Stopped after some updates, it goes on to the thirtieth; then there is nothing left to do."""
    folder = tmp_path / "runs" / "sparsemixer-2"

    def interrupt(line):
        if "checkpoint_1_3.pt" in line and "Finished saving" in line:
            raise KeyboardInterrupt
        return ""

    # As in a background job of a shell: the training process ignores the interruption.
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(process, "progress", interrupt)
            patch.setattr(process, "STOP_SECONDS", 1)
            run_demo(tmp_path, "--max-update", "30", "--num-experts", "2")
    finally:
        signal.signal(signal.SIGINT, previous)
    assert not json.loads((folder / "demo.json").read_text())["finished"]
    results = run_demo(tmp_path, "--max-update", "30", "--num-experts", "2")
    assert "Loaded checkpoint" in (folder / "train.log").read_text()
    assert [result["model"] for result in results] == ["sparsemixer-2"]
    assert results[0]["updates"] == 30
    assert set(results[0]["smallest_share"]) == {"encoder.0", "decoder.0"}
    scores = json.loads((folder / "test.json").read_text())
    assert results[0]["bleu"] == scores["scores"]["bleu"]["score"]
    assert scores["checkpoints"][0]["averaged_from"]
    out = capfd.readouterr().out
    assert out.count("translation  ") == demo.SAMPLES
    assert "nearest copy" in out
    assert "BLEU: nrefs:1|" in out
    assert str(folder / "train.log") in out
    hub = SwitchTransformerModel.from_pretrained(str(folder), demo.AVERAGE, bpe="sentencepiece")
    sentences = (corpus / "raw" / "test.en").read_text().split("\n")[:5]
    hypotheses = (folder / "test.de").read_text().split("\n")[:5]
    assert hub.translate(sentences, beam=5) == hypotheses
    log = (folder / "train.log").read_text()
    run_demo(tmp_path, "--max-update", "30", "--num-experts", "2")
    assert "finished before" in capfd.readouterr().out
    assert (folder / "train.log").read_text() == log
    with pytest.raises(UserError, match="trained with other settings: remove it"):
        run_demo(tmp_path, "--max-update", "31", "--num-experts", "2")
    state = json.loads((folder / "demo.json").read_text())
    configs = state["settings"]["configs"]
    configs["parts.yaml"] = configs.pop("parts/fairseq.yaml")
    configs["demo.yaml"] = configs["demo.yaml"].replace("parts/fairseq", "parts")
    write_json(folder / "demo.json", state)
    run_demo(tmp_path, "--max-update", "30", "--num-experts", "2")
    assert "finished before" in capfd.readouterr().out
    configs["parts.yaml"] = configs["parts.yaml"].replace("smoothing: 0.1", "smoothing: 0.2")
    write_json(folder / "demo.json", state)
    with pytest.raises(UserError, match="trained with other settings: remove it"):
        run_demo(tmp_path, "--max-update", "30", "--num-experts", "2")


def test_failed_training_says_why(corpus, tmp_path):
    with pytest.raises(UserError, match="training failed: --top-k must be 1 to --num-experts"):
        run_demo(tmp_path, "--router", "switch", "model.top_k=9")
    state = json.loads((tmp_path / "runs" / "switch-4" / "demo.json").read_text())
    assert not state["finished"]


def test_a_corpus_of_other_pieces_is_not_made_anew(tmp_path):
    record = {"corpus": "homeassistant", "settings": {"vocab_size": 2000}}
    write_json(tmp_path / "data" / "record.json", record)
    with pytest.raises(
        UserError, match=r"--data .* with --vocab-size 2000, and the demo takes 4000"
    ):
        run_demo(tmp_path)


def test_a_wrong_router_is_told_before_the_first_is_trained():
    args = commands.parse("demo", "--router", "switch,swtch")
    with pytest.raises(UserError, match="--router: unknown router 'swtch'; did you mean 'switch'"):
        variants(args)


def test_the_number_of_experts_is_a_flag():
    with pytest.raises(UserError, match=r"^experts is not set here: use --num-experts"):
        commands.command("demo", "experts=eight")


@pytest.mark.parametrize("override", ["model.router=switch", "model={router: switch}"])
def test_the_router_is_a_flag(override):
    with pytest.raises(UserError, match=r"model.* --router"):
        commands.command("demo", override)


def test_compare_names_the_models():
    args = commands.parse("demo", "--compare", "--router", "topk")
    with pytest.raises(UserError, match=r"--router: .*--compare names three; leave it out"):
        variants(args)


def test_compare_trains_three_models():
    args = commands.parse("demo", "--compare", "--num-experts", "8")
    arms = variants(args)
    assert [arm.name for arm in arms] == ["dense", "switch-8", "sparsemixer-8"]
    assert arms[0].overrides == ["model.encoder_moe_layers=none", "model.decoder_moe_layers=none"]


def test_routers_get_the_settings_that_they_cannot_do_without():
    args = commands.parse("demo", "--router", "gshard,dense,expert-choice,hash")
    gshard, dense, expert_choice, hashed = variants(args)
    assert "model.top_k=2" in gshard.overrides
    assert dense.name == "dense"
    assert "model.decoder_moe_layers=none" in expert_choice.overrides
    assert hashed == Variant("hash-4", ["model.router=hash", "model.num_experts=4"])
    reinmax = variants(commands.parse("demo", "--router", "reinmax"))[0]
    assert "criterion.balance_weight=0.05" in reinmax.overrides
    every = variants(commands.parse("demo", "--router", "all"))
    assert [arm.name for arm in every] == [f"{name}-4" for name in ROUTERS if name != "language"]


@pytest.mark.slow
def test_several_routers_make_one_table(corpus, tmp_path, capfd):
    """Of trainings that are too short for as many checkpoints as are averaged."""
    results = run_demo(tmp_path, "--max-update", "3", "--router", "expert-choice,dense")
    assert [result["model"] for result in results] == ["expert-choice-4", "dense"]
    assert results[0]["entropy"] > 0
    assert set(results[0]["largest_share"]) == {"encoder.0"}
    assert results[1]["entropy"] is None
    table = capfd.readouterr().out.split("== Result")[1]
    assert table.count("25-25 %") == 1


def test_progress_lines():
    line = (
        '[2026-01-01 00:00:00,000][train_inner][INFO] - {"epoch": 1, "loss": "7.5", '
        '"balance_loss": "1.04", "min_expert_share": "0.21", "wps": "900", "num_updates": "25"}'
    )
    assert process.progress(line) == (
        "update 25  train loss 7.50  balance 1.04  smallest share of an expert 21 %  900 words/s"
    )
    assert process.progress("[x][fairseq_cli.train][INFO] - nothing") == ""
