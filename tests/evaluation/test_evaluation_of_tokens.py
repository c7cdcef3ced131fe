"""Models of Moses tokens and BPE, and scores over tokens, against fairseq's and sacrebleu's own."""

import importlib.metadata
import json
import os
import random
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from fairseq.data import Dictionary, data_utils
from subword_nmt.apply_bpe import BPE
from subword_nmt.learn_bpe import learn_bpe
from support import commands, small_run
from support.small_run import USER_DIR, python

from fairseq_sparsemixer.errors import UserError
from fairseq_sparsemixer.evaluation import average, scoring
from fairseq_sparsemixer.evaluation.translator import Translator
from fairseq_sparsemixer.files import read_lines, write_lines
from fairseq_sparsemixer.runs import checkpoints
from fairseq_sparsemixer.text import moses

SCRIPT = Path(__file__).parents[2] / "scripts" / "evaluate_wmt14.sh"
LANGUAGES = ("en", "de")
SPLITS = {"train": 300, "valid": 20, "test": 21}
MAX_POSITIONS = 40
# What Moses splits, escapes or joins, and letters that are no ASCII.
LEXICON = {
    **small_run.LEXICON,
    "read-only": "Nur-Lese-Modus",
    "big": "große",
    "beautiful": "schöne",
    "Tom's": "Tom's",  # "Tom &apos;s" in English, "Tom &apos; s" in German
    "don’t": "nicht",
    "R&B": "R&B",
    '"new"': "„neue“",
    "x-y-z": "x-y-z",
    "[1]": "[1]",
    "e.g.": "z.B.",
}


def sentences(count, seed):
    rng = random.Random(seed)
    sources = [rng.choices(list(LEXICON), k=rng.randint(3, 9)) for _ in range(count)]
    return {
        "en": [f"{' '.join(words)}." for words in sources],
        "de": [f"{' '.join(LEXICON[word] for word in words)}." for words in sources],
    }


def build_corpus(root):
    """raw/ and bin/, as the pipeline ``moses`` leaves them."""
    for folder in ("raw", "tokens", "pieces", "bin"):
        (root / folder).mkdir(parents=True)
    for seed, (split, count) in enumerate(SPLITS.items()):
        for language, lines in sentences(count, seed).items():
            write_lines(root / "raw" / f"{split}.{language}", lines)
            tokens = moses.test_tokens if split == "test" else moses.training_tokens
            lines = [tokens(line, language) for line in lines]
            write_lines(root / "tokens" / f"{split}.{language}", lines)
    codes = root / "bin" / "bpecodes"
    text = [read_lines(root / "tokens" / f"train.{language}") for language in LANGUAGES]
    with codes.open("w", encoding="utf-8") as file:
        learn_bpe([f"{line}\n" for lines in text for line in lines], file, 120)
    with codes.open(encoding="utf-8") as file:
        bpe = BPE(file)
    for path in (root / "tokens").iterdir():
        write_lines(root / "pieces" / path.name, map(bpe.process_line, read_lines(path)))
    prefixes = [f"--{split}pref={root / 'pieces' / split}" for split in SPLITS]
    python(
        "-m", "fairseq_cli.preprocess", "-s", "en", "-t", "de", "--joined-dictionary",
        *prefixes, "--destdir", root / "bin",
    )  # fmt: skip


def train(corpus, folder):
    """Checkpoints of 50, 100 and 150 updates, and the best two of the validations."""
    commands.train(
        corpus / "bin", folder, max_update=150, max_tokens=1000, save_interval=1000,
        save_interval_updates=50, validate_interval=1000, keep_best_checkpoints=2,
        max_source_positions=MAX_POSITIONS, max_target_positions=50, share_all_embeddings=True,
        dropout=0, task="translation",
        # Of no use in training; a translator that believed it would tokenise twice.
        tokenizer="moses", source_lang="en", target_lang="de",
    )  # fmt: skip


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def moses_corpus(shared):
    return shared.directory("moses_corpus", build_corpus)


@pytest.fixture(scope="module")
def trained(shared, moses_corpus):
    return shared.directory("moses_run", lambda folder: train(moses_corpus, folder))


@pytest.fixture
def moses_run(trained, tmp_path):
    """A copy that may be written into."""
    return shutil.copytree(trained, tmp_path / "moses_run")


@pytest.fixture(scope="module")
def translator(trained):
    return Translator(str(trained))


def command(*flags):
    """Run ``evaluate`` in this process."""
    commands.command("evaluate", *flags)


def evaluated(output, *flags):
    """The report of ``evaluate``, written to ``output``."""
    command(*flags, "--output", output)
    return json.loads(output.read_text(encoding="utf-8"))


def sacrebleu(reference, hypothesis, *flags):
    """Score (6 decimals) and signature that sacrebleu's own command prints."""
    printed = json.loads(
        python("-m", "sacrebleu", reference, "-i", hypothesis, "-m", "bleu", "-w", 6, *flags)
    )
    return printed["score"], printed["signature"]


# The translator


def test_translator_equals_generate_line_by_line_and_so_does_tokenised_bleu(
    moses_corpus, trained, translator
):
    stdout = python(
        "-m", "fairseq_cli.generate", moses_corpus / "bin", *USER_DIR, "--cpu",
        "--path", trained / "checkpoint_best.pt", "--beam", 4, "--lenpen", 0.6, "--remove-bpe",
        "--required-batch-size-multiple", 1,
    )  # fmt: skip
    sources = read_lines(moses_corpus / "raw" / "test.en")
    translations = translator.translate(sources, beam=4, lenpen=0.6)
    hypotheses = commands.hypotheses(stdout)
    assert [translation.tokens for translation in translations] == [
        hypotheses[place] for place in range(len(sources))
    ]
    # Or a wrong order would go unseen.
    assert len(set(hypotheses.values())) == len(sources)
    assert all(t.text == moses.detokenise(t.tokens, "de") for t in translations)

    references = [moses.test_tokens(x, "de") for x in read_lines(moses_corpus / "raw" / "test.de")]
    for place, (target,) in commands.printed(stdout, "T").items():
        # In training text these are plain quotes, so that the dictionary has none.
        assert target == re.sub("[„“]", "<<unk>>", references[place])
    score = scoring.tokenised_bleu([t.tokens for t in translations], references)["score"]
    printed = float(re.search(r"BLEU4 = ([\d.]+),", stdout)[1])
    assert 5 < score < 95 and score == pytest.approx(printed, abs=0.006)


def test_pairs_are_encoded_as_in_the_binarised_data(moses_corpus, translator):
    folder = moses_corpus / "bin"
    raw = [read_lines(moses_corpus / "raw" / f"test.{language}") for language in LANGUAGES]
    data = [
        data_utils.load_indexed_dataset(
            str(folder / f"test.en-de.{language}"), Dictionary.load(str(folder / "dict.en.txt"))
        )
        for language in LANGUAGES
    ]
    for place, pair in enumerate(zip(*raw)):
        for side, encoded in zip(data, translator.encode_pair(*pair)):
            assert side[place].tolist() == encoded.tolist()


def test_blank_and_long_lines_have_one_translation_each(translator, caplog):
    long = " ".join(["read-only R&B"] * 30)
    # U+0007 is dropped by Moses: nothing is left of it.
    lines = ["", "the big house.", " \t", long, "\u0007", "don’t\u2028Tom's"]
    translations = translator.translate(lines)
    assert len(translations) == len(lines)
    blank = [place for place, translation in enumerate(translations) if translation.tokens == ""]
    assert blank == [0, 2, 4]
    assert all(translations[place].text == "" for place in blank)
    assert [translation.source_cut for translation in translations].index(True) == 3
    assert caplog.text.count("1 of 6 lines") == 1


def test_codes_are_read_whatever_the_locale(trained, translator):
    line = "the beautiful big Tom's house."
    printed = subprocess.run(
        [sys.executable, "-m", "fairseq_sparsemixer.cli", "translate", str(trained)],
        input=line.encode(),
        capture_output=True,
        check=True,
        env={**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "OMP_NUM_THREADS": "1"},
    )
    assert printed.stdout.decode() == f"{translator.translate([line])[0].text}\n"


def test_one_kind_of_subwords_beside_the_dictionaries(moses_corpus, moses_run, tmp_path):
    files = ["dict.en.txt", "dict.de.txt", "bpecodes"]
    for name in files:
        shutil.copy(moses_corpus / "bin" / name, moses_run / name)
    # The run's own copies come first.
    assert Translator(str(moses_run)).subwords.path == moses_run / "bpecodes"
    (moses_run / "sentencepiece.bpe.model").touch()
    with pytest.raises(UserError, match=r"both sentencepiece.bpe.model and bpecodes; remove"):
        Translator(str(moses_run))
    (moses_run / "sentencepiece.bpe.model").unlink()
    for content in (b"one two three\n", b"\xff \xff\n", b""):
        (moses_run / "bpecodes").write_bytes(content)
        with pytest.raises(UserError, match=r"bpecodes holds no codes .* --data"):
            Translator(str(moses_run))
    state = torch.load(moses_run / "checkpoint_best.pt")
    state["cfg"]["task"]["data"] = str(tmp_path / "gone" / "bin")
    torch.save(state, moses_run / "checkpoint_best.pt")
    (moses_run / "bpecodes").unlink()
    with pytest.raises(UserError, match=r"no sentencepiece.bpe.model or bpecodes in .* --data"):
        Translator(str(moses_run), source_lang="en", target_lang="de")


# Scores over tokens


@pytest.mark.parametrize(
    ("line", "split"),
    [
        # What perl -ple 's{(\S)-(\S)}{$1 ##AT##-##AT## $2}g' prints.
        ("rich-text format", "rich ##AT##-##AT## text format"),
        ("foo-bar-baz", "foo ##AT##-##AT## bar ##AT##-##AT## baz"),
        ("a-b-c", "a ##AT##-##AT## b-c"),
        ("a-b-c-d-e", "a ##AT##-##AT## b-c ##AT##-##AT## d-e"),
        ("a-ü-c", "a ##AT##-##AT## ü ##AT##-##AT## c"),
        ("--", "--"),
        ("---", "- ##AT##-##AT## -"),
        ("-----", "- ##AT##-##AT## ---"),
        ("a--b", "a ##AT##-##AT## -b"),
        ("x - y", "x - y"),
        ("-a b- -", "-a b- -"),
        ("ü-ö", "ü ##AT##-##AT## ö"),
        ("a\u00a0-b", "a\u00a0 ##AT##-##AT## b"),
        ("", ""),
    ],
)
def test_compounds_are_split_as_perl_splits_them(line, split):
    assert scoring.split_compounds([line]) == [split]


@pytest.mark.parametrize("line", ["E @-@ Mail", "E ##AT##-##AT## Mail"])
def test_compounds_are_not_split_twice(line):
    with pytest.raises(UserError, match=r"line 2 holds the token .* split already"):
        scoring.split_compounds(["E-Mail", line])


def test_moses_without_a_leaves_hyphens():
    lines = ['"E-Mail" & x-y-z, z.B. 5-6.', "@-@ ##AT##-##AT##", ""]
    tokens = [moses.tokenise(line, "de", split_hyphens=False) for line in lines]
    assert tokens[0] == "&quot; E-Mail &quot; &amp; x-y-z , z.B. 5-6 ."
    # Whatever a raw line holds, it is no split compound.
    assert len(scoring.split_compounds(tokens)) == 3 and tokens[2] == ""


def test_report_equals_sacrebleu_on_text_and_on_tokens(moses_corpus, trained, tmp_path, capsys):
    report = evaluated(tmp_path / "report.json", trained, "--beam", 4, "--lenpen", 0.6)
    scores = report["scores"]
    assert list(scores) == ["bleu", "chrf", "tokenised_bleu"]
    assert sacrebleu(moses_corpus / "raw" / "test.de", tmp_path / "report.de") == (
        pytest.approx(scores["bleu"]["score"], abs=1e-6),
        scores["bleu"]["signature"],
    )
    tokenised = scores["tokenised_bleu"]
    files = [tmp_path / "report.ref.de.tok", tmp_path / "report.de.tok"]
    assert [tokenised["reference"], tokenised["hypotheses"]] == list(map(str, files))
    assert sacrebleu(*files, "--tokenize", "none", "--force") == (
        pytest.approx(tokenised["score"], abs=1e-6),
        tokenised["signature"],
    )
    assert "tok:none" in tokenised["signature"] and "test:" not in scores["bleu"]["signature"]
    assert any(" @-@ " in line for line in read_lines(files[0]))
    assert [moses.detokenise(line, "de") for line in read_lines(files[1])] == read_lines(
        tmp_path / "report.de"
    )
    table = capsys.readouterr().out.splitlines()
    place = next(i for i, line in enumerate(table) if line.startswith("tokenised BLEU: model "))
    assert f"{tokenised['score']:.2f} (Moses tokens with -a" in table[place]
    assert "not comparable with sacreBLEU" in table[place]
    assert any(line.startswith("BLEU ") for line in table[:place])

    assert report["data"]["sacrebleu"] is None
    assert report["generation"]["pipeline"] == "moses"
    assert len(report["generation"]["bpecodes_sha256"]) == 64
    assert report["versions"]["subword-nmt"] == importlib.metadata.version("subword-nmt")
    assert "sentencepiece" not in report["versions"]


def test_compound_split_of_a_model_of_raw_text(corpus, run_dir, tmp_path):
    write_lines(tmp_path / "in.en", ["the red house", "a car"])
    write_lines(tmp_path / "in.de", ["das rote-Haus x-y-z", 'ein "Auto".'])
    text = ["--source", tmp_path / "in.en", "--reference", tmp_path / "in.de"]
    report = evaluated(tmp_path / "out.json", run_dir, *text, "--compound-split")
    scores = report["scores"]
    assert list(scores) == ["bleu", "chrf", "compound_split_bleu"]
    assert read_lines(tmp_path / "out.ref.de.atat") == [
        "das rote ##AT##-##AT## Haus x ##AT##-##AT## y-z",
        "ein &quot; Auto &quot; .",
    ]
    assert sacrebleu(
        tmp_path / "out.ref.de.atat", tmp_path / "out.de.atat", "--tokenize", "none", "--force"
    ) == (
        pytest.approx(scores["compound_split_bleu"]["score"], abs=1e-6),
        scores["compound_split_bleu"]["signature"],
    )
    assert "without -a" in scores["compound_split_bleu"]["label"]
    assert report["generation"]["pipeline"] == "sentencepiece"


def test_missing_packages_are_named_before_the_search(run_dir, trained, tmp_path, monkeypatch):
    moses._tokeniser.cache_clear()  # another test may have filled it
    monkeypatch.setitem(sys.modules, "sacremoses", None)
    with pytest.raises(UserError, match=r"needs sacremoses: run .*\[wmt\]"):
        command(run_dir, "--compound-split", "--output", tmp_path / "report.json")
    monkeypatch.setitem(sys.modules, "subword_nmt.apply_bpe", None)
    with pytest.raises(UserError, match=r"needs subword_nmt.*: run .*\[wmt\]"):
        command(trained, "--output", tmp_path / "report.json")
    assert not list(tmp_path.iterdir())


def test_compound_split_is_refused_where_hyphens_are_split(trained, tmp_path):
    with pytest.raises(
        UserError, match=r"--compound-split is not for .*its own Moses tokens; leave it"
    ):
        command(trained, "--compound-split", "--output", tmp_path / "report.json")
    assert not list(tmp_path.iterdir())


def test_tokens_do_not_overwrite_the_text(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_lines(Path("in.en"), ["a"])
    write_lines(Path("in.ref.de.tok"), ["b"])
    with pytest.raises(UserError, match="overwrite"):
        command(trained, "--source", "in.en", "--reference", "in.ref.de.tok", "--output", "in.json")


# The name of the test set


def test_a_checked_test_set_is_named_in_the_signatures(moses_corpus, moses_run, tmp_path):
    (tmp_path / "wmt14" / "copy").mkdir(parents=True)
    for name in ("raw", "bin"):
        (tmp_path / "wmt14" / name).symlink_to(moses_corpus / name)
    shutil.copy(moses_corpus / "raw" / "test.de", tmp_path / "wmt14" / "copy" / "test.de")
    record = {"test": {"sacrebleu": "wmt14/full"}}
    (tmp_path / "wmt14" / "record.json").write_text(json.dumps(record), encoding="utf-8")
    flags = [moses_run, "--data", tmp_path / "wmt14", "--beam", 2]
    (baseline,) = moses_run.glob("checkpoint_*_50.pt")
    report = evaluated(tmp_path / "test.json", *flags, "--baseline", baseline)
    assert report["data"]["sacrebleu"] == "wmt14/full"
    version = importlib.metadata.version("sacrebleu")
    assert report["scores"]["bleu"]["signature"] == (
        f"nrefs:1|test:wmt14/full|lang:en-de|case:mixed|eff:no|tok:13a|smooth:exp|version:{version}"
    )
    for signature in (
        report["scores"]["chrf"]["signature"],
        report["baseline"]["scores"]["bleu"]["signature"],
        report["copy"]["scores"]["bleu"]["signature"],
        report["comparison"]["bleu"]["signature"],
    ):
        assert "test:wmt14/full|lang:en-de" in signature

    report = evaluated(tmp_path / "valid.json", *flags, "--subset", "valid")
    assert report["data"]["sacrebleu"] is None
    assert "test:" not in report["scores"]["bleu"]["signature"]
    # What `prepare` records of an archive that is not the published one.
    (tmp_path / "wmt14" / "record.json").write_text('{"test": null}', encoding="utf-8")
    report = evaluated(tmp_path / "test.json", *flags)
    assert report["data"]["sacrebleu"] is None


def test_a_missing_test_set_is_named(trained, tmp_path):
    gone = tmp_path / "raw" / "test.en"
    with pytest.raises(UserError, match=rf"no test set {gone}; make it with .* --data .*--source"):
        command(trained, "--data", tmp_path)


# Averages


@pytest.mark.parametrize("choice", ["last", "best"])
def test_average_of_the_last_or_best(moses_run, tmp_path, choice):
    report = evaluated(tmp_path / "report.json", moses_run, f"--{choice}", 2, "--beam", 1)
    checkpoint = report["checkpoints"][0]
    choose = {"last": checkpoints.last_checkpoints, "best": checkpoints.best_checkpoints}[choice]
    paths = choose(moses_run, 2)
    assert checkpoint["name"] == f"checkpoint_average2{choice}.pt"
    assert checkpoint["averaged_from"] == [path.name for path in paths]
    model = torch.load(moses_run / checkpoint["name"])["model"]
    parts = [torch.load(path)["model"] for path in paths]
    for key, value in model.items():
        assert torch.allclose(value.double(), sum(part[key].double() for part in parts) / 2)


def test_average_is_made_again_only_where_it_must_be(moses_run):
    path = average.average_in_run(moses_run, "last", 2)
    first, second = checkpoints.last_checkpoints(moses_run, 2)

    def made_again():
        before = path.stat().st_ino
        average.average_in_run(moses_run, "last", 2)
        return path.stat().st_ino != before

    assert not made_again()
    os.utime(first, ns=(1, path.stat().st_mtime_ns + 10**9))
    assert made_again()
    os.utime(first, ns=(1, 1))
    # Other checkpoints, though all are older.
    second.rename(moses_run / "checkpoint_98_999.pt")
    assert made_again()
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    assert made_again()
    assert checkpoints.load_state(path)["averaged_from"] == [first.name, "checkpoint_98_999.pt"]


def test_average_in_a_baseline_too(moses_run, tmp_path):
    other = shutil.copytree(moses_run, tmp_path / "other")
    flags = [moses_run, "--last", 2, "--beam", 1, "--baseline"]
    report = evaluated(tmp_path / "report.json", *flags, other)
    assert report["baseline"]["checkpoints"][0]["name"] == "checkpoint_average2last.pt"
    assert report["comparison"]["bleu"]["difference"] == 0
    assert (tmp_path / "report.baseline.de.tok").is_file()
    report = evaluated(tmp_path / "report.json", *flags, other / "checkpoint_best.pt")
    assert report["baseline"]["checkpoints"][0]["name"] == "checkpoint_best.pt"


def test_average_excludes_a_checkpoint_and_needs_a_folder(trained, capsys):
    for flags in (["--last", 2, "--checkpoint", "a.pt"], ["--last", 2, "--best", 2]):
        with pytest.raises(SystemExit):
            command(trained, *flags)
        assert "not allowed with argument" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"--best chooses from a run folder .* leave --best out"):
        command(trained / "checkpoint_best.pt", "--best", 2)
    with pytest.raises(UserError, match="lower --last"):
        command(trained, "--last", 99)


# COMET


def test_comet_reads_source_translation_and_reference(
    moses_corpus, trained, tmp_path, monkeypatch, capsys
):
    seen = {}

    class Model:
        def predict(self, data, batch_size, gpus):
            seen.update(data=data, gpus=gpus)
            return types.SimpleNamespace(system_score=0.8125)

    def load_from_checkpoint(path):
        seen["path"] = path
        return Model()

    fake = types.ModuleType("comet")
    fake.download_model = lambda name: f"downloaded/{name}"
    fake.load_from_checkpoint = load_from_checkpoint
    monkeypatch.setitem(sys.modules, "comet", fake)
    report = evaluated(tmp_path / "report.json", trained, "--beam", 1, "--comet")
    name = "Unbabel/wmt22-comet-da"
    assert report["scores"]["comet"] == {"score": 0.8125, "model": name}
    assert seen["path"] == f"downloaded/{name}"
    assert seen["gpus"] == min(torch.cuda.device_count(), 1)
    columns = {
        "src": read_lines(moses_corpus / "raw" / "test.en"),
        "mt": read_lines(tmp_path / "report.de"),
        "ref": read_lines(moses_corpus / "raw" / "test.de"),
    }
    assert seen["data"] == [dict(zip(columns, row)) for row in zip(*columns.values())]
    assert f"COMET: model 0.8125 ({name})" in capsys.readouterr().out
    # A file is not looked for elsewhere.
    (tmp_path / "model.ckpt").touch()
    evaluated(tmp_path / "report.json", trained, "--beam", 1, "--comet", tmp_path / "model.ckpt")
    assert seen["path"] == str(tmp_path / "model.ckpt")


def test_comet_names_the_package_that_it_needs(trained, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "comet", None)
    with pytest.raises(UserError, match="--comet needs the package unbabel-comet"):
        command(trained, "--comet", "--output", tmp_path / "report.json")
    assert not list(tmp_path.iterdir())


# scripts/evaluate_wmt14.sh


@pytest.mark.parametrize(
    ("flags", "average"),
    [
        ([], ["--last", "5"]),
        (["--beam", "8"], ["--last", "5"]),
        (["--last", "3"], []),
        (["--best=3"], []),
        (["--checkpoint", "checkpoint_last.pt"], []),
    ],
)
def test_script_averages_five_unless_told_otherwise(tmp_path, flags, average):
    folder = tmp_path / "scripts"
    folder.mkdir()
    shutil.copy(SCRIPT, folder)
    (folder / "environment.sh").write_text('PATH="$(dirname "${BASH_SOURCE[0]}"):$PATH"\n')
    program = folder / "fairseq-sparsemixer"
    program.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    program.chmod(0o755)
    printed = subprocess.run(
        [folder / SCRIPT.name, "a run", *flags], check=True, capture_output=True, text=True
    ).stdout
    expected = ["evaluate", "--beam", "4", "--lenpen", "0.6", *average, "a run", *flags]
    assert printed.splitlines() == expected
    parsed = commands.parse(*expected)
    assert (parsed.run_dir, parsed.lenpen) == ("a run", 0.6)
    assert parsed.beam == (8 if "--beam" in flags else 4)
