"""From text to a translation in a toy language, by the commands that a user would start."""

import os
import random
import re
import time
from pathlib import Path
from typing import Callable, Iterator, List, NamedTuple, Tuple

import torch

from fairseq_sparsemixer.errors import UserError
from fairseq_sparsemixer.files import read_lines, write_lines
from fairseq_sparsemixer.training.process import Process, training_environment
from fairseq_sparsemixer.training.settings import PACKAGE, PYTHON

WORDS = {
    "the": "das", "red": "rote", "blue": "blaue", "old": "alte", "house": "Haus", "car": "Auto",
    "book": "Buch", "is": "ist", "was": "war", "here": "hier", "there": "dort", "not": "nicht",
}  # fmt: skip
"""Translated one by one."""
PAIRS = {"train": 300, "valid": 20, "test": 20}
UPDATES, MORE_UPDATES = 60, 70
"""Of the training, and of that which goes on from its checkpoint."""
VALIDATION = re.compile(r'\| valid \| .*?"(?:valid_)?loss": "([^"]+)"')
"""The loss in fairseq's log of one."""
TOLERANCE = 1e-3
"""Of a loss: logs round to three decimals."""


class Step(NamedTuple):
    """A command, and what makes sure that it did what it should.

    Attributes:
        name: what it does.
        command: of the process.
        fault: what is wrong with what it left behind; empty if nothing.
    """

    name: str
    command: List[str]
    fault: Callable[[], str]


def run(folder: Path) -> Iterator[Tuple[str, float]]:
    """Do all steps in an empty folder; (name, seconds) of each when it went well.

    Raises:
        UserError: one did not; names it and its log.
    """
    write_text(folder / "text")
    for step in steps(folder):
        log, begin = log_of(folder, step.name), time.monotonic()
        process = Process(step.command, log, env=training_environment(os.environ), with_parent=True)
        try:
            while (status := process.ended(60)) is None:
                pass
        except BaseException:
            process.stop()
            process.wait()
            raise
        last = read(log).strip() or "it says nothing"
        fault = last.splitlines()[-1] if status else step.fault()
        if fault:
            raise UserError(f"{step.name}: {fault} (all that it said: {log})")
        yield step.name, time.monotonic() - begin


def write_text(folder: Path) -> None:
    """Sentences and their translations, drawn with a fixed seed."""
    folder.mkdir()
    rng = random.Random(1)
    for split, count in PAIRS.items():
        drawn = [rng.choices(list(WORDS), k=rng.randint(2, 8)) for _ in range(count)]
        write_lines(folder / f"{split}.en", [" ".join(words) for words in drawn])
        write_lines(folder / f"{split}.de", [" ".join(WORDS[w] for w in words) for words in drawn])


def read(path: Path) -> str:
    """The text of a log."""
    return path.read_text(encoding="utf-8", errors="replace")


def log_of(folder: Path, name: str) -> Path:
    """Where the output of a step is."""
    return folder / f"{name}.log"


def steps(folder: Path) -> List[Step]:
    """Prepare, train, go on, validate what was saved, translate with it."""
    ours, text, data = [*PYTHON, "fairseq_sparsemixer.cli"], folder / "text", folder / "data"
    checkpoint, translation = folder / "run" / "checkpoint_last.pt", folder / "translation"

    def losses(name: str) -> List[float]:
        return [float(loss) for loss in VALIDATION.findall(read(log_of(folder, name)))]

    def learnt() -> str:
        first, *_, last = losses("train")
        return "" if last < first else f"the loss went from {first} to {last}"

    def resumed() -> str:
        return "" if f"@ {UPDATES} updates" in read(log_of(folder, "resume")) else "it began anew"

    def same_loss() -> str:
        saved, loaded = (losses(name)[-1] for name in ("resume", "validate"))
        same = abs(saved - loaded) <= TOLERANCE
        return "" if same else f"the loss was {saved} when saved and is {loaded} when loaded"

    def translated() -> str:
        lines = [len(read_lines(path)) for path in (text / "test.en", translation)]
        return "" if lines[0] == lines[1] else f"{lines[1]} translations of {lines[0]} lines"

    fairseq = [str(data / "bin"), "--user-dir", str(PACKAGE), "--task", "translation"]
    fairseq += ["--log-format", "json", "--max-tokens", "1000"]
    fairseq += ["--required-batch-size-multiple", "1"]
    fairseq += [] if torch.cuda.is_available() else ["--cpu"]
    train = [*PYTHON, "fairseq_cli.train", *fairseq, *_training(checkpoint.parent)]
    validate = [*PYTHON, "fairseq_cli.validate", *fairseq, "--path", str(checkpoint)]
    prepare = [*ours, "prepare", "--raw-dir", str(text), "--output", str(data)]
    translate = [*ours, "translate", str(checkpoint), "--data", str(data)]
    translate += ["--input", str(text / "test.en"), "--output", str(translation)]
    return [
        Step("prepare", [*prepare, "--vocab-size", "60"], lambda: ""),
        Step("train", [*train, "--max-update", str(UPDATES)], learnt),
        Step("resume", [*train, "--max-update", str(MORE_UPDATES)], resumed),
        Step("validate", validate, same_loss),
        Step("translate", translate, translated),
    ]


def _training(folder: Path) -> List[str]:
    """The flags of a small model, and of its training."""
    settings = {
        "save-dir": folder, "validate-interval-updates": UPDATES // 2, "num-workers": 0,
        "arch": "switch_transformer_demo", "num-experts": 4, "router": "sparsemixer",
        "criterion": "label_smoothed_cross_entropy_with_routing", "optimizer": "adam", "lr": 0.01,
    }  # fmt: skip
    for side in ("encoder", "decoder"):
        sizes = {"layers": 1, "embed-dim": 32, "ffn-embed-dim": 64, "attention-heads": 2}
        settings.update({f"{side}-{name}": size for name, size in sizes.items()})
    return [f"--{name}={value}" for name, value in settings.items()]
