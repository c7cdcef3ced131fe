"""The kinds of input that the fuzzer draws: each makes a trial in a folder from good files.

Below the folder of a trial are ``cwd``, where it runs, and what its user has: ``user``.
"""

import argparse
import json
import math
import random
import shutil
import tempfile
import time
from pathlib import Path

import torch
import yaml

from fairseq_sparsemixer import cli
from fairseq_sparsemixer.evaluation.translator import Translator
from fairseq_sparsemixer.files import read_lines, write_json, write_lines
from fairseq_sparsemixer.laboratory import gradients
from fairseq_sparsemixer.runs import folder, logs, points, record
from fairseq_sparsemixer.study import demo, engine, layout
from fairseq_sparsemixer.training.settings import CONFIGS, compose, resolved
from support import fuzz_damage, fuzz_runner, hostile, small_study
from support.fuzz_runner import Trial

CHECKPOINT = "checkpoint_best.pt"
SAVE_DIR = ["checkpoint.save_dir=."]
"""What configs need where hydra starts nothing."""
SENTENCES = ["the red house", "a blue car is not here", ""]


class Goods:
    """Good files, read alone; what is expensive of them is made once.

    Args:
        corpus: of :func:`.small_run.build_corpus`.
        run: of :func:`.small_run.train`.
        study: of :func:`.report_study.build_study`.
        laid_out: of :func:`lay_out`.
    """

    def __init__(self, corpus, run, study, laid_out):
        torch.set_num_threads(1)
        self.corpus, self.run, self.study, self.laid_out = corpus, run, study, laid_out
        self.translator = Translator(str(run), data=corpus)
        self.expected = self._translations(run)
        composed = {name: resolved(compose(CONFIGS, SAVE_DIR, name)) for name in ("wmt14", "study")}
        self.keys = {name: list(_flat(values)) for name, values in composed.items()}
        parsers = cli.build_parser()._subparsers._group_actions[0].choices
        self.flags = {
            name: [
                each for each in parser._actions if each.option_strings and each.dest not in UNTRIED
            ]
            for name, parser in parsers.items()
        }
        self.hostile = [kind for kind in hostile.KINDS if kind not in TOO_LARGE]

    def _translations(self, run):
        return [each.text for each in self.translator.translate(SENTENCES, beam=1)]

    def corpus_in(self, place):
        """A copy of the corpus."""
        ignored = shutil.ignore_patterns("train.en-de*", "pieces", "*.log", "*.vocab")
        return Path(shutil.copytree(self.corpus, place / "user" / "corpus", ignore=ignored))

    def run_in(self, place, names=(CHECKPOINT,)):
        """A copy of the run."""
        made = place / "user" / "run"
        made.mkdir(parents=True)
        for name in names:
            shutil.copy(self.run / name, made / name)
        return made

    def study_in(self, place, *names):
        """A copy of runs of the study and its text."""
        made = place / "user" / "study"
        for name in names:
            ignored = shutil.ignore_patterns("*.pt", "tensorboard", ".training.lock")
            shutil.copytree(self.study / name, made / name, ignore=ignored)
        shutil.copytree(self.study / "data" / "raw", made / "data" / "raw")
        return made

    def text_in(self, place, count=40):
        """Files of sentences: a folder for ``prepare --raw-dir``."""
        made = place / "user" / "text"
        for split in ("train", "valid", "test"):
            for language in ("en", "de"):
                lines = read_lines(self.corpus / "raw" / f"{split}.{language}")
                write_lines(made / f"{split}.{language}", lines[:count])
        return made


def lay_out(corpus, folder):
    """A study that was not begun, and its corpus."""
    prepared = Path(shutil.copytree(corpus, folder / "corpus"))
    write_json(prepared / "record.json", {"corpus": "toy"})
    plan = small_study.write_plan(folder / "plan.yaml", prepared)
    words = ["study", str(plan), "--output", str(folder / "study"), "--prepare-only"]
    assert cli.main(words) == 0


TOO_LARGE = ("compressed record", "5 million mappings", "one text many times",
             "an attribute of millions", "two directories")  # fmt: skip
"""Hostile checkpoints that take long to make; tests/runs/test_reading.py tries them."""


def _flat(values, before=""):
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{before}{key}.")
        else:
            yield f"{before}{key}"


def _argument(rng):
    """A text that can be an argument."""
    if rng.random() < 0.03:
        return "\udcff\udcfe"  # bytes that are no UTF-8
    return fuzz_damage.text(rng)[:10_000]


# Flags


def _commands(goods, rng, place):
    """(arguments, what it may write) of a command that goes well."""
    user, output = place / "user", place / "cwd" / "out"
    name = rng.choice(["translate", "translate", "evaluate", "average", "table", "study",
                       "train", "demo", "prepare", "gradients", "report"])  # fmt: skip
    if name in ("translate", "evaluate", "gradients"):
        model = ["--data", str(goods.corpus_in(place))]
        run = goods.run_in(place)
        text = user / "corpus" / "raw" / "test"
        if name == "gradients":
            return [name, str(run), *model, "--tokens", "1", "--output", str(output)]
        model += ["--beam", "1"]
        if name == "translate":
            return [name, str(run), *model, "--input", f"{text}.en", "--output", str(output)]
        files = ["--source", f"{text}.en", "--reference", f"{text}.de"]
        return [name, str(run), *model, *files, "--output", f"{output}.json"]
    if name == "average":
        run = goods.run_in(place, ["checkpoint_13_100.pt", "checkpoint_19_150.pt"])
        return [name, "--inputs", str(run), "--last", "2", "--output", f"{output}.pt"]
    if name in ("table", "report"):
        study = goods.study_in(place, "switch-4-seed1", "dense-seed1")
        end = ".html" if name == "report" else ""
        return [name, str(study), "--baseline", "switch-4", "--output", f"{output}{end}"]
    if name == "train":
        return [name, "--dry-run", "--router", "switch", "--experts", "2", "--runs", str(output)]
    if name == "demo":
        corpus = goods.corpus_in(place)
        return [name, "--data", str(corpus), "--runs", str(output), "--max-update", "3"]
    if name == "study":
        plan = small_study.write_plan(user / "plan.yaml", goods.laid_out / "corpus")
        return [name, str(plan), "--output", str(output), "--prepare-only"]
    text = goods.text_in(place)
    return [name, "--raw-dir", str(text), "--output", str(output), "--vocab-size", "60"]


UNTRIED = ("wheel", "downloads", "mirror", "comet", "trust_checkpoints", "help")
"""They download, or are there to run what is in a checkpoint."""
KEPT = ("--dry-run", "--prepare-only", "--raw-dir")
"""Without them a command would train for hours, or download."""


def flags(goods, rng, place):
    """Flags left out, doubled, with odd values, or of another command."""
    words = _commands(goods, rng, place)
    name = words[0]
    (place / "cwd" / "out.json").write_text("{}")
    done = []
    for _ in range(rng.choice([1, 1, 2, 3])):
        at = rng.randrange(1, len(words))
        kept = at and any(word in KEPT for word in words[at - 1 : at + 1])
        how = rng.choice(["value", "value", "add", "add", "add", "drop", "double", "odd"])
        if how == "value" and not kept:
            words[at] = _argument(rng)
        elif how == "drop" and not kept:
            del words[at]
        elif how == "double":
            words.insert(at, words[at])
        elif how == "odd":
            words.insert(rng.randrange(1, len(words) + 1), _argument(rng))
        else:
            words += _flag(rng, rng.choice(goods.flags[name]))
        done.append(how)
        if len(words) < 2:
            break
    words = [word.replace("\0", "") for word in words]
    return Trial(f"{name}: {', '.join(done)}: {words!r}"[:600], words, named=_named(words, place))


def _flag(rng, action):
    flag = action.option_strings[-1]
    if isinstance(action, argparse._StoreTrueAction):
        return [flag]
    value = rng.choice([*(action.choices or ["3"]), _argument(rng), _argument(rng)])
    return [f"{flag}={value}"] if rng.random() < 0.5 else [flag, value]


def _named(words, place):
    """What flags that name outputs name, in the folder where they are read."""
    named = [place / "cwd" / "gradients", place / "user" / "run" / "gradients"]
    named += [each / "evaluation" for each in (place / "user" / "run", place / "user" / "study")]
    for before, word in zip(["", *words], words):
        for flag in ("--output", "--runs", "--checksums"):
            if before == flag or word.startswith(f"{flag}="):
                named.append(place / "cwd" / (word if before == flag else word.partition("=")[2]))
    return tuple(Path(str(path.parent.resolve())) / path.name for path in named if path.name)


# Overrides and plans


def _override(goods, rng, name):
    key = rng.choice(goods.keys[name])
    kind = rng.randrange(8)
    if kind == 0:
        key = _argument(rng)
    elif kind == 1:
        key = rng.choice(["+", "~", "++", "+new.", "hydra."]) + key
    elif kind == 2:
        key = key.rpartition(".")[0] or key
    value = rng.choice([_argument(rng), str(rng.choice(fuzz_damage.NUMBERS)), "[1,2]", "{a: 1}"])
    return f"{key}={value}" if rng.random() < 0.95 else _argument(rng)


def overrides(goods, rng, place):
    """hydra's overrides: of a training, or composed alone."""
    count = rng.choice([1, 1, 1, 2, 3])
    if rng.random() < 0.3:
        words = [_override(goods, rng, "wmt14") for _ in range(count)]
        words = ["train", "--dry-run", "--router", "switch", "--experts", "2", "--", *words]
        return Trial(repr(words)[:600], words)
    words = [_override(goods, rng, "study") for _ in range(count)]
    return Trial(f"compose {words!r}"[:600], lambda: compose(CONFIGS, [*SAVE_DIR, *words], "study"))


def plans(goods, rng, place):
    """Plans with odd values, or damaged as text."""
    plan = {**small_study.PLAN, "data": str(goods.laid_out / "corpus")}
    for key, value in (("config", "study"), ("jobs", 1), ("overrides", small_study.TINY)):
        if rng.random() < 0.3:
            plan[key] = value
    arms = {
        **plan["arms"],
        "full": {
            "router": "sparsemixer",
            "experts": 2,
            "options": {"gate": "full"},
            "overrides": ["a.b=c"],
        },
    }
    if rng.random() < 0.3:
        plan["arms"] = arms
    if rng.random() < 0.6:
        what, plan = fuzz_damage.values(rng, plan)
        data = yaml.safe_dump(plan, sort_keys=False, allow_unicode=True).encode(errors="replace")
    else:
        text = yaml.safe_dump(plan, sort_keys=False)
        what, data = fuzz_damage.damage(rng, text.encode())
    file = place / "user" / "plan.yaml"
    file.write_bytes(data)
    output = place / "cwd" / "study"
    words = ["study", str(file), "--output", str(output), "--prepare-only"]
    return Trial(what, words, named=(output,))


# Corpora


def corpora(goods, rng, place):
    """Own text that is damaged, for ``prepare``."""
    text = goods.text_in(place, rng.choice([5, 40, 40]))
    if rng.random() < 0.2:
        for split in ("train", "valid", "test"):
            count = len(read_lines(text / f"{split}.en"))
            write_lines(text / f"{split}.domain", ("ab"[n % 2] for n in range(count)))
    files = sorted(text.iterdir())
    done = []
    for _ in range(rng.choice([1, 1, 2])):
        file = rng.choice(files)
        if file.is_file():
            done.append(_spoil_text(rng, file))
    output = place / "cwd" / "out"
    words = ["prepare", "--raw-dir", str(text), "--output", str(output)]
    words += ["--vocab-size", rng.choice(["60", "60", "60", "40", "1000"])]
    return Trial(", ".join(done), words, named=(output,), wrong=lambda _: _uneven(output))


def _spoil_text(rng, file):
    """Odd lines, in place of some or beside them, or bytes; what was done."""
    if rng.random() < 0.4:
        return fuzz_damage.spoil(rng, file)
    lines = file.read_bytes().split(b"\n")
    for _ in range(rng.randint(1, 10)):
        lines[rng.randrange(len(lines))] = fuzz_damage.line(rng).encode()
    file.write_bytes(b"\n".join(lines))
    return f"{file.name}: odd lines"


def _uneven(output):
    """What is wrong with a corpus: sides of one part that have not as many lines."""
    for split in ("train", "valid", "test"):
        counts = [len(read_lines(output / "raw" / f"{split}.{side}")) for side in ("en", "de")]
        if counts[0] != counts[1]:
            return f"{split} has {counts}"
    return ""


def prepared(goods, rng, place):
    """Files of a prepared corpus that are damaged, for ``evaluate``."""
    corpus, run = goods.corpus_in(place), goods.run_in(place)
    raw = corpus / "raw" / "test.en"
    write_lines(raw, read_lines(raw)[:3])
    write_lines(corpus / "raw" / "test.de", read_lines(corpus / "raw" / "test.de")[:3])
    score = {"bleu": 1.5, "chrf": 2.0, "signature": "s"}
    write_json(corpus / "record.json", {"test": {"sacrebleu": "wmt14/full"},
                                        "copy_score": {"test": score}})  # fmt: skip
    files = ["record.json", "raw/test.en", "raw/test.de", "copy/test.de"]
    what = fuzz_damage.spoil(rng, corpus / rng.choice(files))
    words = ["evaluate", str(run), "--data", str(corpus), "--beam", "1"]
    return Trial(what, words, named=(run / "evaluation",))


# Run folders


def tables(goods, rng, place):
    """Damaged files in the folders that ``table`` reads, and at times ``report``."""
    study = goods.study_in(place, "switch-4-seed1", "dense-seed1")
    if rng.random() < 0.3:
        write_json(study / "dense-seed1" / "run.json", _RUN)
    files = sorted(
        path for path in study.rglob("*") if path.is_file() and path.parent.name != "raw"
    )
    done = [fuzz_damage.spoil(rng, path) for path in rng.sample(files, rng.choice([1, 1, 2]))]
    output = place / "cwd" / "out"
    name, end = ("report", ".html") if rng.random() < 0.04 else ("table", "")
    words = [name, str(study), "--baseline", "switch-4", "--output", f"{output}{end}"]
    named = (output, *(run / "evaluation" / "routing.json" for run in study.iterdir()))
    return Trial(f"{name} {', '.join(done)}", words, named=named)


_CASE = [{"kind": "order", "estimator": "topk", "scales": [1], "bias": [0.5], "slope": 1.5}]
_DEMO = {"settings": {"overrides": [], "configs": {}}, "finished": True}
_RUN = {"settings": {"dataset": {}}, "tokens_per_update": 9, "data": {}, "starts": [],
        "gpus": [], "git": {"revision": "r", "dirty": False}}  # fmt: skip
_STATE = {"finished_updates": 30, "overrides": ["a=1"], "beam": 4, "by_machine": []}
READERS = {
    "run.json": (_RUN, lambda path: record.read_record(path.parent)),
    "study.json": (_STATE, lambda path: layout.read_run_state(path.parent)),
    "demo.json": (_DEMO, lambda path: engine.read_state(path, demo._STATE)),
    "points.clock.json": ({"3": [1.0, None, 3]}, points.read_clocks),
    "gradients.json": (
        {"settings": {"seed": 1}, "cases": {"order of accuracy": _CASE}},
        lambda path: gradients._read_results(path, {"seed": 1}),
    ),
}


def records(goods, rng, place):
    """Files that a run keeps beside its checkpoints, read by what reads them."""
    user = place / "user" / "run"
    user.mkdir(parents=True)
    source = goods.study / "sparsemixer-4-seed1"
    name = rng.choice([*READERS, "points.jsonl", "points.60.npz", "hydra_train.log", "folder"])
    path = user / name
    if name in READERS:
        content, read = READERS[name]
        write_json(path, content)
        what = fuzz_damage.spoil(rng, path)
        return Trial(f"{name}: {what}", lambda: read(path))
    if name == "folder":
        run = goods.study_in(place, "switch-4-seed1") / "switch-4-seed1"
        files = [".hydra/config.yaml", "evaluation/test.checkpoint_last.json", "hydra_train.log"]
        what = fuzz_damage.spoil(rng, run / rng.choice(files))
        return Trial(what, lambda: folder.read_run(run))
    shutil.copy(source / name, path)
    if name == "points.jsonl" and rng.random() < 0.6:
        lines = path.read_text().splitlines()
        at = rng.randrange(len(lines))
        what, value = fuzz_damage.values(rng, json.loads(lines[at]))
        lines[at] = json.dumps(value)
        path.write_text("\n".join(lines) + "\n", errors="replace")
    else:
        what = fuzz_damage.spoil(rng, path)
    read = {
        "points.jsonl": lambda: points.read_points(path),
        "points.60.npz": lambda: points.load_choices(user / points.FILE, 80),
        "hydra_train.log": lambda: logs.read_log(path),
    }[name]
    return Trial(f"{name}: {what}", read)


def studies(goods, rng, place):
    """A study that is laid out, or a demo that was begun, with damaged files; goes on."""
    study = place / "user" / "study"
    shutil.copytree(goods.laid_out / "study", study, ignore=shutil.ignore_patterns("train.en-de*"))
    first = study / "switch-2-seed1"
    first.mkdir()
    write_json(first / "study.json", {"finished_updates": 30})
    shutil.copy(goods.study / "sparsemixer-4-seed1" / "points.jsonl", first)
    files = sorted(path for path in study.rglob("*") if path.is_file())
    what = fuzz_damage.spoil(rng, rng.choice(files))
    words = ["study", str(study), *rng.choice([[], ["--jobs", "2"], ["--prepare-only"]])]
    return Trial(what, words, named=(study,))


# Models


def _command(run, corpus):
    return ["translate", str(run), "--data", str(corpus), "--beam", "1"]


def _given():
    return "".join(f"{line}\n" for line in SENTENCES).encode()


def _other_than(expected):
    def wrong(said):
        return "" if said.split("\n")[:-1] == expected else f"other translations: {said[:300]}"

    return wrong


def _one_line_each(count):
    def wrong(said):
        found = said.count("\n")
        return "" if found == count else f"{found} lines for {count}"

    return wrong


def checkpoints(goods, rng, place):
    """Damaged, odd and hostile checkpoints: what is read is what was written, or refused."""
    run = goods.run_in(place)
    file = run / CHECKPOINT
    kind = rng.random()
    wrong = _other_than(goods.expected)
    if kind < 0.15:
        what = rng.choice(goods.hostile)
        hostile.write(what, goods.run / CHECKPOINT, file)
        wrong = _one_line_each(len(SENTENCES))
    elif kind < 0.45:
        part, key, value = _field(goods, rng)
        what = f"{part}.{key} = {str(value)[:80]!r}"
        hostile.write_field(goods.run / CHECKPOINT, file, part, key, value)
        wrong = _one_line_each(len(SENTENCES))
    else:
        what = fuzz_damage.spoil(rng, file)
        if rng.random() < 0.3:
            output = place / "cwd" / "mean.pt"
            shutil.copy(goods.run / "checkpoint_19_150.pt", run / "other.pt")
            words = ["average", "--inputs", str(run / "other.pt"), str(file)]
            return Trial(f"average: {what}", [*words, "--output", str(output)], named=(output,))
    words = _command(run, goods.corpus)
    return Trial(what, words, _given(), (place / "cwd",), wrong)


def _field(goods, rng):
    if not hasattr(goods, "fields"):
        cfg = hostile._state(goods.run / CHECKPOINT)["cfg"]
        goods.fields = [(part, key) for part, values in cfg.items() if values for key in values
                        if isinstance(values, dict)]  # fmt: skip
    part, key = rng.choice(goods.fields)
    value = rng.choice([fuzz_damage.text(rng), rng.choice(fuzz_damage.NUMBERS), [1], {}, None])
    return part, key, value


def dictionaries(goods, rng, place):
    """Damaged dictionaries beside a good model."""
    corpus, run = goods.corpus_in(place), goods.run_in(place)
    what = fuzz_damage.spoil(rng, corpus / "bin" / rng.choice(["dict.en.txt", "dict.de.txt"]))
    wrong = _one_line_each(len(SENTENCES))
    return Trial(what, _command(run, corpus), _given(), (place / "cwd",), wrong)


def subwords(goods, rng, place):
    """Damaged subword models beside a good model."""
    corpus, run = goods.corpus_in(place), goods.run_in(place)
    what = fuzz_damage.spoil(rng, corpus / "bin" / "sentencepiece.bpe.model")
    wrong = _one_line_each(len(SENTENCES))
    return Trial(what, _command(run, corpus), _given(), (place / "cwd",), wrong)


def lines(goods, rng, place):
    """Lines of any characters: one translation for each, by a model that is loaded already."""
    texts = [fuzz_damage.line(rng) for _ in range(rng.randint(1, 4))]
    if rng.random() < 0.25:
        data = "".join(f"{text}\n" for text in texts).encode()
        if rng.random() < 0.5:
            _, data = fuzz_damage.damage(rng, data)
        count = data.count(b"\n") + (not data.endswith(b"\n") and data != b"")
        words = _command(goods.run, goods.corpus)
        return Trial(f"stdin {data[:200]!r}", words, data, wrong=_one_line_each(count))

    def translate():
        for each in goods.translator.translate(texts, beam=2):
            assert math.isfinite(each.score) and "\n" not in each.text
            print(each.text)

    return Trial(f"{texts!r}"[:300], translate, wrong=_one_line_each(len(texts)))


KINDS = {
    "flags": (flags, 14), "overrides": (overrides, 7), "plans": (plans, 8),
    "corpora": (corpora, 4), "prepared corpora": (prepared, 3), "run folders": (tables, 7),
    "records": (records, 25), "studies": (studies, 0.4), "checkpoints": (checkpoints, 20),
    "dictionaries": (dictionaries, 5), "subword models": (subwords, 4), "lines": (lines, 10),
}  # fmt: skip
"""By name: what makes a trial, and how often beside the others."""


def try_one(goods, seed, number, folder):
    """One trial; (the line of the results, what it said)."""
    rng = random.Random(f"{seed}/{number}")
    (kind,) = rng.choices(list(KINDS), [share for _, share in KINDS.values()])
    place = Path(tempfile.mkdtemp(dir=folder))
    try:
        for name in ("cwd", "user"):
            (place / name).mkdir()
        trial = KINDS[kind][0](goods, rng, place)
        before = fuzz_runner.contents(place)
        since = time.monotonic()
        outcome = fuzz_runner.run(trial, place)
        seconds = round(time.monotonic() - since, 2)
        verdict, why = fuzz_runner.judge(trial, place, before, outcome)
    finally:
        shutil.rmtree(place)
    result = {"number": number, "kind": kind, "verdict": verdict, "why": why, "what": trial.what,
              "seconds": seconds, "status": outcome.status}  # fmt: skip
    if verdict not in fuzz_runner.GOOD:
        result["said"] = outcome.err[-3000:]
    elif verdict == "clear error":
        result["said"] = outcome.err.rstrip("\n").split("\n")[-1][:500]
    return result, f"{outcome.out}\n{outcome.err}"
