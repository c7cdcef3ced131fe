"""Pairs of commands at work in one place at the same time, and what comes of it.

The place is a prepared corpus and a study of it, whose one run is trained and scored, and is to be
trained further. Who comes first waits when it has its lock until the other has begun.
"""

import contextlib
import csv
import functools
import json
import os
import re
import runpy
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Callable, List, NamedTuple

import sacrebleu
import yaml
from fairseq.data import Dictionary, data_utils

from fairseq_sparsemixer import cli, files, locks
from fairseq_sparsemixer.corpora.folder import SPLITS, raw_path
from fairseq_sparsemixer.corpora.homeassistant import preparation
from fairseq_sparsemixer.corpora.own_text import prepare_raw_text
from fairseq_sparsemixer.files import read_lines, sha256_of, write_lines
from fairseq_sparsemixer.runs.checkpoints import load_state, num_updates
from fairseq_sparsemixer.runs.logs import read_log
from support import small_run
from support.forks import status_of, stream

TINY = [
    "dataset.max_tokens=200", "dataset.num_workers=0", "+model.encoder_layers=1",
    "+model.decoder_layers=1", "+model.encoder_embed_dim=16", "+model.decoder_embed_dim=16",
    "+model.encoder_ffn_embed_dim=16", "+model.decoder_ffn_embed_dim=16",
    "+model.encoder_attention_heads=2", "+model.decoder_attention_heads=2",
    "optimization.lr=[0.01]", "common.log_interval=1",
]  # fmt: skip
OFTEN = ["checkpoint.save_interval_updates=1", "dataset.validate_interval_updates=3"]
OF_STUDY = ["task.points_sentences=0", "lr_scheduler.warmup_updates=4"]
RUN = "sparsemixer-2-seed1"
UPDATES, MORE_UPDATES = 6, 9
VOCABULARY = 60
HOLD_SECONDS, LIMIT_SECONDS = 30, 300
"""How long who comes first keeps its lock at most, until the other waits, is refused or has ended;
how long a command may take."""
OUTCOMES = ("both right", "the second waited", "one was refused", "one was told", "wrong")
"""The last is a fault. Refused is who is told that another is at work, told who finds what it needs
gone, or not there yet."""
_ERROR = re.compile(r"^(?:fairseq-sparsemixer \S+: )?error: .+")


class Command(NamedTuple):
    """What is tried.

    Attributes:
        arguments: for a place and whether it comes second.
        fault: what is wrong in a place where it went well; empty if nothing.
        module: that is run with them, if not our command line.
    """

    arguments: Callable[[Path, bool], List[object]]
    fault: Callable[[Path], str]
    module: str = ""


def build_place(folder):
    """What each pair begins with."""
    for name in ("first", "second"):
        text = folder / name
        text.mkdir(parents=True)
        lines = small_run.sentences(60, seed=1)
        for split in SPLITS:
            for language, texts in zip(("en", "de"), lines):
                write_lines(raw_path_of(text, split, language), [f"{t} {name}" for t in texts])
    prepare_raw_text(folder / "corpus", folder / "first", vocab_size=VOCABULARY)
    for updates in (MORE_UPDATES, UPDATES):
        plan = {
            "data": str(folder / "corpus"), "updates": updates, "evaluate_every": 3, "seeds": [1],
            "beam": 1, "overrides": [*TINY, *OF_STUDY],
            "arms": {"sparsemixer-2": {"router": "sparsemixer", "experts": 2}},
        }  # fmt: skip
        (folder / f"plan{updates}.yaml").write_text(yaml.safe_dump(plan))
    assert (
        cli.main(["study", str(folder / f"plan{UPDATES}.yaml"), "--output", str(folder / "s")]) == 0
    )


def raw_path_of(text, split, language):
    """As own text lies."""
    return text / f"{split}.{language}"


def _prepare(place, second):
    text = place / ("first" if second else "second")
    return ["prepare", "--raw-dir", text, "--output", place / "corpus", "--vocab-size", VOCABULARY]


def _prepared(place):
    """Whether text, pieces and data are of one text."""
    corpus = place / "corpus"
    source = Path(json.loads((corpus / "record.json").read_text())["source"]["folder"])
    for language in ("en", "de"):
        dictionary = Dictionary.load(str(corpus / "bin" / f"dict.{language}.txt"))
        for split in SPLITS:
            raw = read_lines(raw_path(corpus, split, language))
            if raw != read_lines(raw_path_of(source, split, language)):
                return f"raw/{split}.{language} is of another text than the record"
            pieces = read_lines(corpus / "spm" / f"{split}.{language}")
            if ["".join(line.split()) for line in pieces] != [
                "".join(f" {line}".replace(" ", "▁")) for line in raw
            ]:
                return f"spm/{split}.{language} is of another text"
            data = data_utils.load_indexed_dataset(
                str(corpus / "bin" / f"{split}.en-de.{language}"), dictionary
            )
            if [dictionary.string(line) for line in data] != pieces:
                return f"bin/{split} of {language} is of other pieces"
    return ""


def _laid_out(place):
    """Whether the study's text and data are of one text."""
    data = place / "new-study" / "data"
    source = Path(json.loads((data / "record.json").read_text())["source"]["folder"])
    for language in ("en", "de"):
        dictionary = Dictionary.load(str(data / "bin" / f"dict.{language}.txt"))
        for split in SPLITS:
            text = read_lines(raw_path_of(source, split, language))
            if split != "train" and read_lines(raw_path(data, split, language)) != text:
                return f"raw/{split}.{language} is of another text than the record"
            path = str(data / "bin" / f"{split}.en-de.{language}")
            lines = map(dictionary.string, data_utils.load_indexed_dataset(path, dictionary))
            if [line.replace(" ", "").replace("▁", " ").strip() for line in lines] != text:
                return f"bin/{split} of {language} is of another text than the record"
    return ""


def _run_arguments(place):
    return [place / "s" / RUN, "--checkpoint", "checkpoint_last.pt", "--data", place / "corpus"]


def _scored(place, path):
    """Whether scores and translations belong together."""
    content = json.loads(path.read_text())
    hypotheses = read_lines(path.with_suffix(".de"))
    # A study names what it reads from its own folder; a corpus may have been replaced since.
    texts = [place / "s" / content["data"]["reference"]]
    texts += [raw_path_of(place / name, "test", "de") for name in ("first", "second")]
    read = [path for path in texts if sha256_of(path) == content["data"]["reference_sha256"]]
    if not read:
        return "the reference is another text than any that was there"
    references = read_lines(read[0])
    # A model of so few updates has no BLEU.
    score = sacrebleu.corpus_chrf(hypotheses, [references]).score
    found = content["scores"]["chrf"]["score"]
    return "" if abs(score - found) < 1e-6 else f"chrF {found}, and {score} of the translations"


def _scored_run(place):
    return _scored(place, place / "s" / RUN / "evaluation" / "test.json")


def _trained(place):
    updates = num_updates(load_state(place / "s" / RUN / "checkpoint_last.pt"))
    return "" if updates == MORE_UPDATES else f"{updates} updates"


def _studied(place):
    state = json.loads((place / "s" / RUN / "study.json").read_text())
    if state["finished_updates"] != MORE_UPDATES:
        return f"{state['finished_updates']} updates are finished"
    return _trained(place) or _scored_run(place)


def _table(place):
    content = json.loads((place / "s" / "table.json").read_text())
    with (place / "s" / "table.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    bleu = [[f"{float(row['bleu']):.6f}" for row in each] for each in (content["rows"], rows)]
    if bleu[0] != bleu[1]:
        return "JSON and CSV differ"
    shown = (place / "s" / "table.md").read_text()
    return "" if all(f"{float(b):.2f}" in shown for b in bleu[0]) else "Markdown and JSON differ"


def _report(place):
    page = (place / "s" / "report.html").read_text()
    figures = {path.name for path in (place / "s" / "report_figures").iterdir()}
    named = set(re.findall(r"report_figures/([\w.-]+)", page))
    return "" if figures and named <= figures else f"{len(figures)} figures, {len(named)} named"


def _demo(place):
    (result,) = json.loads((place / "s" / "results.json").read_text())
    scores = json.loads((place / "s" / "sparsemixer-2" / "test.json").read_text())["scores"]
    if result["bleu"] != scores["bleu"]["score"]:
        return "the table has another score than the run"
    return _scored(place, place / "s" / "sparsemixer-2" / "test.json")


def _training(place, second):
    run = place / "s" / RUN
    return [
        "--config-dir", place / "s" / "configs", "--config-name", "study",
        f"common.user_dir={Path(cli.__file__).parent}", "common.cpu=true",
        f"task.data={place / 's' / 'data' / 'bin'}", f"hydra.run.dir={run}",
        f"optimization.max_update={MORE_UPDATES}", "model.router=sparsemixer",
        "model.num_experts=2", *TINY, *OF_STUDY, *OFTEN,
    ]  # fmt: skip


def _in_run(name):
    return lambda place: place / "s" / RUN / name


def _gradients(place):
    found = json.loads((place / "s" / RUN / "gradients" / "gradients.json").read_text())["cases"]
    return "" if found and all(found.values()) else "nothing is measured"


COMMANDS = {
    "prepare": Command(_prepare, _prepared),
    "fairseq-train": Command(_training, _trained, "fairseq_cli.hydra_train"),
    "train": Command(
        lambda place, _: [
            *("train", "--router", "sparsemixer", "--experts", "2", "--runs", place / "new"),
            *(f"task.data={place / 'corpus' / 'bin'}", "optimization.max_update=4", *TINY),
            *("optimization.update_freq=[1]", *OFTEN),
        ],
        lambda place: "" if read_log(place / "new" / RUN / "hydra_train.log").ended else "no end",
    ),
    "study": Command(
        lambda place, _: ["study", place / f"plan{MORE_UPDATES}.yaml", "--output", place / "s"],
        _studied,
    ),
    "new study": Command(
        lambda place, _: [
            *("study", place / f"plan{MORE_UPDATES}.yaml", "--output", place / "new-study"),
            "--prepare-only",
        ],
        _laid_out,
    ),
    "demo": Command(
        lambda place, _: [
            *("demo", "--num-experts", "2", "--max-update", "3", "--runs", place / "s"),
            *("--data", place / "corpus", *TINY, *OFTEN),
        ],
        _demo,
    ),
    "evaluate": Command(
        lambda place, _: [
            *("evaluate", *_run_arguments(place), "--beam", "1"),
            *("--output", place / "s" / RUN / "evaluation" / "test.json"),
        ],
        _scored_run,
    ),
    "translate": Command(
        lambda place, _: [
            *("translate", *_run_arguments(place), "--beam", "1"),
            *("--input", place / "s" / "data" / "raw" / "test.en"),
            *("--output", place / "s" / RUN / "evaluation" / "test.de"),
        ],
        lambda place: (
            ""
            if len(read_lines(place / "s" / RUN / "evaluation" / "test.de")) == 60
            else "lines are missing"
        ),
    ),
    "average": Command(
        lambda place, _: [
            *("average", "--inputs", place / "s" / RUN / "checkpoint_last.pt"),
            *("--output", place / "s" / RUN / "average.pt"),
        ],
        lambda place: "" if load_state(place / "s" / RUN / "average.pt") else "empty",
    ),
    "gradients": Command(
        lambda place, _: [
            *("gradients", *_run_arguments(place), "--tokens", "2", "--fit-sentences", "4"),
        ],
        _gradients,
    ),
    "report": Command(
        lambda place, _: ["report", place / "s", "--output", place / "s" / "report.html"], _report
    ),
    "table": Command(
        lambda place, _: [
            *("table", place / "s", "--baseline", "sparsemixer-2"),
            *("--output", place / "s" / "table"),
        ],
        _table,
    ),
    "check": Command(lambda place, _: ["check"], lambda place: ""),
}


def fault_of(name, place):
    """What is wrong in a place where a command went well; empty if nothing."""
    try:
        return COMMANDS[name].fault(place)
    except Exception as error:  # of what cannot even be read
        return f"{type(error).__name__}: {error}"


class _Started:
    """A command in a fork of this process; its output is in a file."""

    def __init__(self, name: str, place: Path, *, second: bool, hold: bool = False) -> None:
        self.name, self.place = name, place
        self.marker, self.go = place / f"{name}.{second}.holds", place / "go"
        self.said = place / f"{name}.{second}.said"
        self.status = None
        arguments = list(map(str, COMMANDS[name].arguments(place, second)))
        self.module = COMMANDS[name].module
        self.process = os.fork()
        if not self.process:
            self._begin(arguments, hold)

    def _begin(self, arguments, hold):
        os.setsid()
        output = os.open(self.said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout, sys.stderr = map(stream, (1, 2))
        status = 70
        try:
            preparation.prepare_homeassistant = lambda output: prepare_raw_text(
                output, self.place / "first", vocab_size=VOCABULARY
            )
            if hold:
                locks.locked = files.locked = self._held(locks.locked)
            sys.argv = [self.module or "fairseq-sparsemixer", *arguments]
            if self.module:
                run = functools.partial(runpy.run_module, self.module, run_name="__main__")
                status = status_of(lambda: bool(run()) and 0)
            else:
                status = status_of(lambda: cli.main(arguments), sys.__excepthook__)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def _held(self, original):
        """``locks.locked``, which says when it has the first, and waits."""

        @contextlib.contextmanager
        def locked(*arguments, **options):
            with original(*arguments, **options) as descriptor:
                if not self.marker.exists():
                    self.marker.touch()
                    limit = time.monotonic() + HOLD_SECONDS
                    while not self.go.exists() and time.monotonic() < limit:
                        time.sleep(0.01)
                yield descriptor

        return locked

    def ended(self):
        """Its exit status, None before its end."""
        if self.status is None:
            process, status = os.waitpid(self.process, os.WNOHANG)
            if process:
                self.status = os.waitstatus_to_exitcode(status)
        return self.status

    def wait(self):
        limit = time.monotonic() + LIMIT_SECONDS
        while self.ended() is None:
            if time.monotonic() > limit:
                self.kill()
                self.status = "hangs"
                return
            time.sleep(0.01)

    def wait_for_lock(self):
        """Until it has its lock, or has ended without."""
        while not self.marker.exists() and self.ended() is None:
            time.sleep(0.002)

    def wait_for_end_or_turn(self):
        """Until it has ended, or waits for its turn."""
        while self.ended() is None and "waiting for " not in self.text():
            time.sleep(0.05)

    def kill(self):
        os.killpg(self.process, signal.SIGKILL)
        if self.status is None:
            os.waitpid(self.process, 0)
            self.status = -signal.SIGKILL

    def text(self):
        if not self.said.exists():
            return ""
        return self.said.read_text(encoding="utf-8", errors="replace")

    def error(self):
        """The one sentence of an error; empty where it ends otherwise."""
        lines = [line for line in self.text().splitlines() if line.strip()]
        wanted = self.status == (1 if self.module else 2)
        last = next((line for line in reversed(lines) if _ERROR.match(line)), "")
        if self.module:  # hydra shows where an error came from
            return last or next((x for x in reversed(lines) if "UserError: " in x), "")
        whole = wanted and lines and lines[-1] == last and "Traceback" not in self.text()
        return last if whole else ""


def try_pair(first, second, template, place):
    """(one of OUTCOMES, why, seconds) of two commands in ``place``, which is made and removed."""
    shutil.copytree(template, place)
    _move(template, place)
    begin = time.monotonic()
    one = _Started(first, place, second=False, hold=True)
    one.wait_for_lock()
    other = _Started(second, place, second=True)
    other.wait_for_end_or_turn()
    one.go.touch()
    one.wait()
    other.wait()
    outcome = _judge(one, other, place)
    shutil.rmtree(place)
    return (*outcome, round(time.monotonic() - begin, 1))


def _move(template, place):
    """Let files that name the place name the copy."""
    for path in (*place.glob("*.yaml"), *place.rglob("*.json"), *place.rglob("config.yaml")):
        text = path.read_text()
        if str(template) in text:
            path.write_text(text.replace(str(template), str(place)))


def _judge(one, other, place):
    errors = []
    for each in (one, other):
        if each.status == 0:
            if fault := fault_of(each.name, place):
                return "wrong", f"{each.name}: {fault}"
        elif error := each.error():
            errors.append(error)
        else:
            return "wrong", f"{each.name} ends with {each.status}: {each.text()[-1500:]}"
    if len(errors) == 2:
        return "wrong", f"none went well: {errors}"
    if errors:
        refused = "is at work in" in errors[0]
        return ("one was refused" if refused else "one was told"), errors[0]
    waited = "waiting for " in one.text() + other.text()
    return ("the second waited" if waited else "both right"), ""


def try_killed(name, template, place):
    """As :func:`try_pair`, of a command that is killed when it has its lock, and begun again."""
    shutil.copytree(template, place)
    _move(template, place)
    begin = time.monotonic()
    one = _Started(name, place, second=False, hold=True)
    one.wait_for_lock()
    held = one.ended() is None
    one.kill()
    again = _Started(name, place, second=False)
    again.wait()
    fault = "" if held else "it was not killed"
    if again.status != 0:
        fault = fault or f"{again.status}: {again.text()[-1500:]}"
    fault = fault or fault_of(name, place)
    partial = [str(path) for path in place.rglob("*.partial")]
    fault = fault or ("left: " + ", ".join(partial) if partial else "")
    shutil.rmtree(place)
    return ("wrong" if fault else "both right"), fault, round(time.monotonic() - begin, 1)
