"""Translating and scoring, against fairseq's and sacrebleu's own command lines."""

import argparse
import io
import json
import os
import pty
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import sentencepiece
import torch
from support.commands import command
from support.models import build
from support.small_run import MAX_POSITIONS, USER_DIR, python, sentences

from fairseq_sparsemixer import cli
from fairseq_sparsemixer.commands.flags import add_translation_arguments, search_of
from fairseq_sparsemixer.errors import UserError
from fairseq_sparsemixer.evaluation import evaluate, precision, scored_text, scoring
from fairseq_sparsemixer.evaluation.options import ModelChoice, Search
from fairseq_sparsemixer.evaluation.translator import Translator
from fairseq_sparsemixer.files import read_lines, write_lines
from fairseq_sparsemixer.moe.backends import products
from fairseq_sparsemixer.moe.feed_forward import moe_layers
from fairseq_sparsemixer.runs.checkpoints import load_state, num_updates

TOO_LONG = " ".join(["red house and blue car"] * 12)
# Blank lines first, in the middle and last; U+2028 is no line break; Ω is in no dictionary.
LINES = [
    "",
    "the red house is here",
    "a car",
    "   ",
    "the old book was not there and the lamp is new",
    TOO_LONG,
    "lamp",
    "Ω the car",
    "the blue\u2028car is old",
    "book and lamp and car and house",
    "there was a new car",
    "not here",
    "",
]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def translator(run_dir):
    return Translator(str(run_dir))


def interactive(corpus, path, lines):
    """What fairseq-interactive translates ``lines`` to, with the checkpoint at ``path``."""
    stdout = python(
        "-m", "fairseq_cli.interactive", corpus / "bin", *USER_DIR, "--path", path, "--cpu",
        "--bpe", "sentencepiece", "--sentencepiece-model",
        corpus / "bin" / "sentencepiece.bpe.model", "--beam", 5, "--buffer-size", 100,
        "--max-tokens", 4096, "--required-batch-size-multiple", 1,
        input="".join(f"{line}\n" for line in lines).encode(),
    )  # fmt: skip
    return [line.split("\t", 2)[2] for line in stdout.split("\n") if line.startswith("D-")]


def texts(translations):
    return [translation.text for translation in translations]


# Translating


def test_generate_agrees_on_an_ensemble_with_an_average(corpus, run_dir, tmp_path):
    averaged = tmp_path / "averaged.pt"
    command("average", "--inputs", run_dir, "--best", 2, "--output", averaged)
    path = f"{averaged}:{run_dir / 'checkpoint_7_50.pt'}"
    stdout = python(
        "-m", "fairseq_cli.generate", corpus / "bin", *USER_DIR, "--path", path, "--cpu",
        "--bpe", "sentencepiece", "--sentencepiece-model",
        corpus / "bin" / "sentencepiece.bpe.model", "--beam", 5, "--max-tokens", 4096,
        "--required-batch-size-multiple", 1,
    )  # fmt: skip
    hypotheses = {}
    for line in stdout.split("\n"):
        if line.startswith("D-"):
            number, _, text = line[2:].split("\t", 2)
            hypotheses[int(number)] = text
    ensemble = Translator(path)
    sources = read_lines(corpus / "raw" / "test.en")
    translations = texts(ensemble.translate(sources))
    assert translations == [hypotheses[number] for number in range(len(sources))]
    assert [checkpoint.updates for checkpoint in ensemble.checkpoints] == [150, 50]
    assert [len(checkpoint.averaged_from) for checkpoint in ensemble.checkpoints] == [2, 0]
    single = Translator(str(averaged))
    assert translations != texts(single.translate(sources))


def test_translator_equals_interactive_line_by_line(corpus, run_dir, translator, caplog):
    translations = translator.translate(LINES)
    assert len(translations) == len(LINES)
    assert caplog.text.count("were cut") == 1 and "1 of 13 lines" in caplog.text
    blank = [place for place, line in enumerate(LINES) if not line.strip()]
    assert blank == [0, 3, 12]
    assert [translations[place].text for place in blank] == ["", "", ""]
    assert [translation.source_cut for translation in translations].index(True) == 5

    # What is left of the long line is its first tokens, of which the last is end of sentence.
    pieces = sentencepiece.SentencePieceProcessor(
        model_file=str(corpus / "bin" / "sentencepiece.bpe.model")
    )
    kept = pieces.encode(TOO_LONG)[: MAX_POSITIONS - 1]
    short = pieces.decode(kept)
    assert pieces.encode(short) == kept
    lines = [short if line == TOO_LONG else line for line in LINES if line.strip()]
    expected = interactive(corpus, run_dir / "checkpoint_best.pt", lines)
    assert [text for text in texts(translations) if text] == expected
    # Or a wrong order would go unseen.
    assert len(set(expected)) == len(expected)


def test_the_token_of_a_language_is_no_text(translator, monkeypatch):
    """What a task says is no text is not in the translation, but counts in its length."""
    (whole,) = texts(translator.translate(["the red house and the lamp"]))
    task, pieces = translator._hub.task, translator.target_dictionary
    first = pieces.index(translator.subwords.encoder().encode(whole.split()[0]).split()[0])
    original = task.build_generator

    def build_generator(*args, **kwargs):
        kwargs["extra_gen_cls_kwargs"] = {"symbols_to_strip_from_output": {first}}
        return original(*args, **kwargs)

    monkeypatch.setattr(task, "build_generator", build_generator)
    (rest,) = texts(translator.translate(["the red house and the lamp"]))
    kept = [p for p in translator.subwords.encoder().encode(whole).split() if p != pieces[first]]
    assert rest == translator.subwords.encoder().decode(" ".join(kept)) != whole


@pytest.mark.slow
def test_a_model_of_several_languages_translates_without_their_tokens(
    corpus, tmp_path, monkeypatch
):
    """As fairseq-generate; fairseq begins each translation with the token."""
    size = ["--encoder-embed-dim", 32, "--decoder-embed-dim", 32, "--encoder-layers", 1]
    size += ["--decoder-layers", 1, "--encoder-ffn-embed-dim", 64, "--decoder-ffn-embed-dim", 64]
    python(
        "-m", "fairseq_cli.train", corpus / "bin", "--cpu", *USER_DIR, *size,
        "--task", "translation_multi_simple_epoch", "--lang-pairs", "en-de", "--langs", "en,de",
        "--encoder-langtok", "tgt", "--decoder-langtok", "--share-all-embeddings",
        "--arch", "switch_transformer_demo", "--num-experts", 2, "--optimizer", "adam",
        "--lr", 0.01, "--max-tokens", 1000, "--max-update", 40, "--no-epoch-checkpoints",
        "--save-dir", tmp_path, "--no-progress-bar", "--num-workers", 0,
        "--required-batch-size-multiple", 1,
    )  # fmt: skip
    monkeypatch.setenv("SPARSEMIXER_TRUST_CHECKPOINTS", "1")
    languages = {"source_lang": "en", "target_lang": "de"}
    model = Translator(str(tmp_path), "checkpoint_last.pt", **languages)
    found = texts(model.translate(["the red house", "a lamp"]))
    assert all(text and "__" not in text for text in found)
    source, target = model.encode_pair("the red house", "das rote Haus")
    for tokens in (source, target):
        assert model.target_dictionary[tokens[0]] == "__de__"
        assert "__de__" not in model.target_dictionary.string(tokens[1:])
    task = model._hub.task
    task.load_dataset("valid")
    first = task.datasets["valid"][0]
    lines = [
        read_lines(corpus / "raw" / f"valid.{language}")[first["id"]]
        for language in languages.values()
    ]
    for ours, theirs in zip(model.encode_pair(*lines), (first["source"], first["target"])):
        assert ours.tolist() == theirs.tolist()


def test_checkpoints_of_an_ensemble_are_looked_up_in_the_run(run_dir):
    names = "checkpoint_7_50.pt:checkpoint_19_150.pt"
    ensemble = Translator(str(run_dir), names)
    assert [checkpoint.updates for checkpoint in ensemble.checkpoints] == [50, 150]
    with pytest.raises(UserError, match=r"no checkpoint .*checkpoint_8.pt"):
        Translator(str(run_dir), f"{names}:checkpoint_8.pt")


def test_there_is_nothing_to_choose_where_the_checkpoint_is_given(run_dir):
    named = [run_dir / "checkpoint_best.pt", "--checkpoint", "checkpoint_last.pt"]
    with pytest.raises(UserError, match=r"--checkpoint: such flags choose from a run folder, and"):
        command("translate", *named)


@pytest.mark.parametrize("limit", [{"batch_size": 1}, {"batch_size": 2}, {"max_tokens": 1}])
def test_batches_do_not_matter(translator, limit):
    whole, parts = translator.translate(LINES), translator.translate(LINES, **limit)
    assert texts(parts) == texts(whole)
    assert [t.score for t in parts] == pytest.approx([t.score for t in whole], abs=1e-4)


def test_one_line_no_line_and_blank_lines(translator):
    assert translator.translate([]) == []
    assert texts(translator.translate(["", " \t", "\u200b"])) == ["", "", ""]
    line = "the red house is here"
    assert texts(translator.translate([line])) == [texts(translator.translate(LINES))[1]]


def test_search_flags_reach_the_search(translator):
    lines = LINES[4:6]
    greedy, wide = translator.translate(lines, beam=1), translator.translate(lines, beam=8)
    assert [t.score for t in greedy] != [t.score for t in wide]
    # A score is the log-probability over length ** lenpen: longer output is favoured.
    long = translator.translate(lines, beam=8, lenpen=4.0)
    words = [sum(len(text.split()) for text in texts(found)) for found in (long, wide)]
    assert words[0] >= words[1]
    assert [t.score for t in long] != [t.score for t in wide]
    with pytest.raises(UserError, match="--beam 0"):
        translator.translate(lines, beam=0)


def test_lost_lines_are_an_error(translator, monkeypatch):
    search = translator._search
    monkeypatch.setattr(translator, "_search", lambda *args: list(search(*args))[:-1])
    with pytest.raises(RuntimeError, match="1 of 13 lines"):
        translator.translate(LINES)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_half_precision_needs_a_gpu(run_dir):
    with pytest.raises(UserError, match="--fp16 needs a CUDA device"):
        Translator(str(run_dir), precision="fp16")


def test_8_bits_are_for_cpus(monkeypatch):
    with pytest.raises(UserError, match=r"--int8 is for CPUs .* CUDA_VISIBLE_DEVICES"):
        precision.check_precision("int8", torch.device("cuda"))
    monkeypatch.setattr(precision, "has_int8", lambda: False)
    with pytest.raises(UserError, match="--int8 needs a PyTorch with oneDNN"):
        precision.check_precision("int8", torch.device("cpu"))


def test_8_bits_are_for_usual_models():
    model = build(no_cross_attention=True)
    with pytest.raises(UserError, match=r"--int8 does not serve .*x\.pt: it has unusual layers"):
        precision.prepare_model(Path("run", "x.pt"), model, "int8")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_8_bits_change_scores_and_no_small_matrices(run_dir, translator, caplog, monkeypatch):
    exact = translator.translate(LINES)
    rounded = Translator(str(run_dir), precision="int8")
    assert "--int8 changes next to nothing in" in caplog.text
    assert texts(rounded.translate(LINES)) == texts(exact)
    assert "not laid out in int8: with 2048 weights a matrix they are too small" in caplog.text
    monkeypatch.setattr(products, "LEAST_WEIGHTS", 0)
    rounded = Translator(str(run_dir), precision="int8").translate(LINES)
    assert [t.score for t in rounded] != [t.score for t in exact]
    for one, other in zip(rounded, exact):
        assert one.score == pytest.approx(other.score, abs=0.1)


def test_flags_of_precision():
    def precision(*words):
        parser = argparse.ArgumentParser()
        add_translation_arguments(parser)
        return search_of(parser.parse_args(["run", *words])).precision

    assert [precision(), precision("--int8"), precision("--bf16")] == ["fp32", "int8", "bf16"]
    with pytest.raises(SystemExit):
        precision("--int8", "--fp16")


@pytest.fixture
def moved(run_dir, tmp_path):
    """A run folder whose data have gone: the checkpoint alone."""
    state = torch.load(run_dir / "checkpoint_best.pt")
    state["cfg"]["task"]["data"] = str(tmp_path / "gone")
    folder = tmp_path / "moved"
    folder.mkdir()
    torch.save(state, folder / "checkpoint_best.pt")
    return folder


def link_model_files(corpus, folder):
    for name in ("dict.en.txt", "dict.de.txt", "sentencepiece.bpe.model"):
        (folder / name).symlink_to(corpus / "bin" / name)


def test_model_files_are_found_in_the_run_and_in_data(corpus, moved, translator):
    expected = translator.translate(LINES)
    assert Translator(str(moved), data=corpus).translate(LINES) == expected
    assert Translator(str(moved), data=corpus / "bin").translate(LINES) == expected
    with pytest.raises(UserError, match="give --source-lang and --target-lang"):
        Translator(str(moved))
    with pytest.raises(UserError, match="both en; give those of the model with --source-lang"):
        Translator(str(moved), data=corpus, source_lang="en", target_lang="en")
    languages = {"source_lang": "en", "target_lang": "de"}
    with pytest.raises(UserError, match=r"found no dict.en.txt and dict.de.txt .* --data"):
        Translator(str(moved), **languages)
    link_model_files(corpus, moved)
    assert Translator(str(moved), **languages).translate(LINES) == expected
    (moved / "sentencepiece.bpe.model").unlink()
    with pytest.raises(UserError, match=r"found no sentencepiece.bpe.model .* --data"):
        Translator(str(moved), **languages)


def test_text_of_another_corpus_is_read_with_the_dictionaries_of_training(
    corpus, run_dir, translator, tmp_path
):
    """They have as many entries, in another order."""
    for name in ("dict.en.txt", "dict.de.txt"):
        write_lines(tmp_path / name, reversed(read_lines(corpus / "bin" / name)))
    found = Translator(str(run_dir), data=tmp_path)
    assert found.translate(LINES) == translator.translate(LINES)


def test_a_baseline_translates_the_same_languages(monkeypatch):
    pairs = [("en", "da"), ("en", "de")]
    of_pair = {pair: f"of {pair}" for pair in pairs}
    several = SimpleNamespace(pairs=pairs, of_pair=of_pair.get)
    monkeypatch.setattr(evaluate, "load_translator", lambda *_: several)
    model, search = ModelChoice("run", "x.pt", None, None, None), Search(5, 1.0, 10, "fp32")
    for pair in pairs:
        assert evaluate._load_baseline(model, search, pair) == of_pair[pair]
    with pytest.raises(
        UserError, match="--baseline run translates en-da, en-de, and RUN_DIR en-fr"
    ):
        evaluate._load_baseline(model, search, ("en", "fr"))


def test_dictionaries_of_another_model_are_refused(corpus, moved):
    link_model_files(corpus, moved)
    for name in ("dict.en.txt", "dict.de.txt"):
        lines = read_lines(moved / name)
        (moved / name).unlink()
        write_lines(moved / name, lines[:-5])
    with pytest.raises(
        UserError, match=r"dictionaries of 48 entries and .* have 43; copy the right ones into"
    ):
        Translator(str(moved), data=corpus)


def test_missing_and_damaged_checkpoints(run_dir, tmp_path):
    with pytest.raises(UserError, match=r"--checkpoint \(there: .*checkpoint_last.pt"):
        Translator(str(run_dir), "checkpoint_99.pt")
    with pytest.raises(UserError, match="no run folder or checkpoint"):
        Translator(str(tmp_path / "nowhere"))
    content = (run_dir / "checkpoint_best.pt").read_bytes()
    (tmp_path / "checkpoint_best.pt").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"cannot read the checkpoint .* copy it again"):
        Translator(str(tmp_path))
    torch.save({"weights": torch.zeros(2)}, tmp_path / "checkpoint_best.pt")
    with pytest.raises(UserError, match="cannot read the checkpoint"):
        Translator(str(tmp_path))


# The translate command


def test_a_pipe_streams_whatever_the_locale(run_dir, translator):
    environment = {**os.environ, "LC_ALL": "C", "PYTHONIOENCODING": "latin-1", "PYTHONUTF8": "0"}
    lines = ["the red house", "", "Ω the\u2028car is old", "lamp"]
    expected = texts(translator.translate(lines))
    program = [sys.executable, "-m", "fairseq_sparsemixer.cli", "translate", str(run_dir)]
    with subprocess.Popen(
        [*program, "--buffer-size", "2"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**environment, "OMP_NUM_THREADS": "1"},
    ) as process:
        process.stdin.write(f"{lines[0]}\n{lines[1]}\n".encode())
        process.stdin.flush()
        # Answered while the pipe is still open.
        assert process.stdout.readline().decode() == f"{expected[0]}\n"
        assert process.stdout.readline() == b"\n"
        # The last line has no newline of its own.
        rest, errors = process.communicate(f"{lines[2]}\n{lines[3]}".encode(), timeout=60)
    assert rest.decode() == f"{expected[2]}\n{expected[3]}\n"
    assert process.returncode == 0 and b"Traceback" not in errors


def test_a_file_becomes_a_file(run_dir, translator, tmp_path, capsys):
    # A byte order mark and Windows line endings are no text.
    source = tmp_path / "in.en"
    source.write_bytes(b"\xef\xbb\xbf" + "".join(f"{line}\r\n" for line in LINES).encode())
    output = tmp_path / "new" / "out.de"
    command("translate", run_dir, "--input", source, "--output", output, "--buffer-size", 5)
    assert read_lines(output) == texts(translator.translate(LINES))
    assert capsys.readouterr().out == ""
    source.write_bytes(b"the car\n\xff\n")
    with pytest.raises(UserError, match="line 2: not UTF-8"):
        command("translate", run_dir, "--input", source, "--output", tmp_path / "bad.de")
    assert not (tmp_path / "bad.de").exists()
    with pytest.raises(UserError, match="check --input"):
        command("translate", run_dir, "--input", tmp_path / "gone.en")
    with pytest.raises(UserError, match="--output the name of a file"):
        command("translate", run_dir, "--input", source, "--output", tmp_path)


def test_a_bad_line_in_a_pipe_comes_after_the_good_ones(
    run_dir, translator, monkeypatch, capsysbinary
):
    """In their order, whatever the buffer; what follows it is not read."""
    good = ["the red house", "", "the old book was here", "a lamp"]
    expected = "".join(f"{line}\n" for line in texts(translator.translate(good))).encode()
    text = "".join(f"{line}\n" for line in good).encode() + b"\xff\nthe car\n"
    for size in (3, 4, 64):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text)))
        flags = ["translate", str(run_dir), "--buffer-size", str(size)]
        assert cli.main(flags) == 2
        captured = capsysbinary.readouterr()
        assert captured.out == expected
        (error,) = [line for line in captured.err.split(b"\n") if b"error: " in line]
        assert error.endswith(
            b"stdin, line 5: not UTF-8 (byte 1 of the line); convert the text to UTF-8"
        )


def test_a_prompt_answers_each_line_until_ctrl_d(run_dir, translator, monkeypatch, capsysbinary):
    ours, theirs = pty.openpty()
    os.write(ours, b"the red house\n\nlamp\n\x04")
    with open(theirs, encoding="utf-8") as terminal:
        monkeypatch.setattr(sys, "stdin", terminal)
        command("translate", run_dir)
    os.close(ours)
    captured = capsysbinary.readouterr()
    expected = texts(translator.translate(["the red house", "", "lamp"]))
    assert captured.out.decode() == "".join(f"{line}\n" for line in expected)
    assert captured.err.count(b"> ") == 4 and captured.err.endswith(b"\n")


# Scoring and the evaluate command


def sacrebleu(reference, hypothesis, *flags):
    """What sacrebleu's command prints: scores with 6 decimals, and signatures."""
    printed = python(
        "-m", "sacrebleu", reference, "-i", hypothesis, "-m", "bleu", "chrf", "-w", 6, *flags
    )  # fmt: skip
    return {entry["name"]: (entry["score"], entry["signature"]) for entry in json.loads(printed)}


def test_report_equals_sacrebleu_and_says_how_it_came_about(
    corpus, run_dir, translator, tmp_path, capsys
):
    output = tmp_path / "report.json"
    baseline = run_dir / "checkpoint_7_50.pt"
    command(
        "evaluate", run_dir, "--data", corpus, "--beam", 2, "--baseline", baseline,
        "--output", output,
    )  # fmt: skip
    report = json.loads(output.read_text(encoding="utf-8"))
    reference = corpus / "raw" / "test.de"
    for system, path in ((report, "report.de"), (report["baseline"], "report.baseline.de")):
        assert system["hypotheses"] == str(tmp_path / path)
        printed = sacrebleu(reference, tmp_path / path)
        for name, key in (("BLEU", "bleu"), ("chrF2", "chrf")):
            score, signature = printed[name]
            assert system["scores"][key]["score"] == pytest.approx(score, abs=1e-6)
            assert system["scores"][key]["signature"] == signature
    sources = read_lines(corpus / "raw" / "test.en")
    assert read_lines(tmp_path / "report.de") == texts(translator.translate(sources, beam=2))
    assert report["scores"]["bleu"]["score"] > report["baseline"]["scores"]["bleu"]["score"] > 0

    counts = report["counts"]
    assert (counts["source_lines"], counts["hypothesis_lines"]) == (21, 21)
    checkpoint = report["checkpoints"][0]
    updates = num_updates(load_state(run_dir / "checkpoint_best.pt"))
    assert (checkpoint["name"], checkpoint["updates"]) == ("checkpoint_best.pt", updates)
    assert len(checkpoint["sha256"]) == 64
    assert report["model"] == {
        "arch": "switch_transformer_demo",
        "router": "sparsemixer",
        "num_experts": 4,
        "top_k": 1,
    }
    assert report["generation"]["beam"] == 2
    assert set(report["versions"]) >= {"fairseq", "torch", "sacrebleu", "sentencepiece"}
    copied = scoring.score(read_lines(corpus / "copy" / "test.de"), read_lines(reference), "13a")
    assert report["copy"]["scores"] == copied
    comparison = report["comparison"]["bleu"]
    difference = report["scores"]["bleu"]["score"] - report["baseline"]["scores"]["bleu"]["score"]
    assert comparison["difference"] == pytest.approx(difference)
    table = capsys.readouterr().out
    assert f"{report['scores']['bleu']['score']:.2f}" in table
    assert report["scores"]["bleu"]["signature"] in table


def test_languages_without_spaces_are_scored_as_sacrebleu_does(run_dir, translator, tmp_path):
    """With 13a a Chinese sentence is one token, and its BLEU 0."""
    run, source, reference = tmp_path / "run", tmp_path / "x.en", tmp_path / "x.zh"
    run.mkdir()
    for name in ("checkpoint_best.pt", "dict.en.txt", "sentencepiece.bpe.model"):
        place = run_dir if name.endswith("best.pt") else translator.trained_on
        (run / name).symlink_to(place / name)
    (run / "dict.zh.txt").symlink_to(translator.trained_on / "dict.de.txt")
    write_lines(source, ["the red house", "the old book was here", "a lamp"])
    good = ["房子是红色的。", "旧书曾经在这里。", "一盏灯。"]
    write_lines(reference, ["这个房子是红色的。", "那本旧书曾经在这里。", "一盏灯。"])
    flags = ["--source", source, "--reference", reference, "--source-lang", "en"]
    flags += ["--target-lang", "zh", "--output", tmp_path / "out.json"]
    assert scoring.score(good, read_lines(reference), "zh")["bleu"]["score"] > 50
    for more, wanted in (([], ["-l", "en-zh"]), (["--tokenize", "intl"], ["--tokenize", "intl"])):
        command("evaluate", run, *flags, *more)
        scores = json.loads((tmp_path / "out.json").read_bytes())["scores"]
        score, signature = sacrebleu(reference, tmp_path / "out.zh", *wanted)["BLEU"]
        assert scores["bleu"]["signature"] == signature
        assert scores["bleu"]["score"] == pytest.approx(score, abs=1e-6)
        assert f"tok:{scores['bleu']['tokeniser']}" in signature.split("|")
    with pytest.raises(UserError, match="sacreBLEU has no tokeniser words"):
        command("evaluate", run, *flags, "--tokenize", "words")


def test_report_finds_the_corpus_and_its_place_alone(corpus, own_run):
    command("evaluate", own_run, "--subset", "valid")
    report = json.loads((own_run / "evaluation" / "valid.checkpoint_best.json").read_bytes())
    assert report["hypotheses"] == str(own_run / "evaluation" / "valid.checkpoint_best.de")
    assert report["counts"]["hypothesis_lines"] == 20
    assert report["copy"] is None


def test_copy_score_of_the_record_where_the_copied_lines_are_gone(tmp_path):
    record = {"copy_score": {"test": {"bleu": 12.34, "signature": "nrefs:1|tok:13a|v:2"}}}
    (tmp_path / "record.json").write_text(json.dumps(record), encoding="utf-8")
    text = scored_text.Text(["the house"], ["das Haus"], "13a", None)
    test_set = scored_text.TestSet("test", tmp_path, tmp_path, corpus=tmp_path)
    scores = scored_text.copy_score(test_set, "de", text)["scores"]
    assert scores == {"bleu": {"score": 12.34, "signature": "nrefs:1|tok:13a|v:2"}}
    of_characters = text._replace(tokeniser="char")
    assert scored_text.copy_score(test_set, "de", of_characters) is None


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--source", "three.en"], "--source and --reference go together"),
        (["--source", "three.en", "--reference", "gone.de"], "no gone.de; check --source"),
        (["--source", "three.en", "--reference", "two.de"], "has 3 lines and two.de has 2"),
        (["--source", "two.de", "--reference", "two.de", "--output", "two.json"], "overwrite"),
        (["--output", "scores.txt"], "ending in .json"),
        (["--data", "."], "name a prepared corpus with --data"),
        (["--source=a", "--reference=b", "--subset=test"], "--subset: .* leave it out"),
    ],
)
def test_evaluate_refuses_before_it_translates(run_dir, tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    write_lines(tmp_path / "three.en", ["a", "b", "c"])
    write_lines(tmp_path / "two.de", ["a", "b"])
    with pytest.raises(UserError, match=message):
        command("evaluate", run_dir, *flags)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["three.en", "two.de"]


def test_scores_need_a_reference_for_each_line():
    with pytest.raises(UserError, match=r"2 hypotheses .* 1 reference"):
        scoring.score(["a", "b"], ["a"], "13a")
    with pytest.raises(UserError, match=r"1 hypotheses .* 2 reference"):
        scoring.compare(["a", "b"], ["a"], ["a", "b"], "13a")
    with pytest.raises(UserError, match="no lines to score"):
        scoring.score([], [], "13a")


def test_comparison_tells_a_real_difference_from_none():
    _, references = sentences(60, seed=7)
    worse = [line if place % 3 else line[: len(line) // 2] for place, line in enumerate(references)]
    result = scoring.compare(references, worse, references, "13a")
    for metric in ("bleu", "chrf"):
        assert result[metric]["difference"] > 1
        assert result[metric]["p_value"] < 0.01
        assert "bs:1000|seed:12345" in result[metric]["signature"]
    same = scoring.compare(worse, worse, references, "13a")
    assert same["bleu"]["difference"] == 0 and same["bleu"]["p_value"] == 1


# Checkpoints of other machines


def test_a_checkpoint_of_a_gpu_translates_anywhere(run_dir, translator, tmp_path):
    """What it was trained with is no demand of who translates."""
    state = torch.load(run_dir / "checkpoint_best.pt")
    assert state["cfg"]["model"]["moe_backend"] == "auto"
    for backend, taken in (("triton", "auto"), ("loop", "loop")):
        state["cfg"]["model"]["moe_backend"] = backend
        torch.save(state, tmp_path / f"{backend}.pt")
        other = Translator(str(tmp_path / f"{backend}.pt"))
        assert {layer.backend for layer in moe_layers(other.model)} == {taken}
        lines = LINES[1:5]
        assert texts(other.translate(lines)) == texts(translator.translate(lines))
