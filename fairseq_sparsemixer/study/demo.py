"""The demo: a plan of one arm or some, on real English-German text, that is trained and scored."""

import contextlib
import os
import shlex
import tempfile
from pathlib import Path
from typing import Any, Dict, Generator, List, NamedTuple, Optional

from fairseq_sparsemixer.corpora.folder import CORPUS_RECORD
from fairseq_sparsemixer.corpora.homeassistant import preparation
from fairseq_sparsemixer.corpora.text_to_binary import DEFAULT_VOCAB_SIZE
from fairseq_sparsemixer.errors import UserError
from fairseq_sparsemixer.evaluation.average import average_checkpoints
from fairseq_sparsemixer.evaluation.translator import Translator
from fairseq_sparsemixer.files import check_writable, read_json, read_lines, write_json
from fairseq_sparsemixer.locks import sole_user
from fairseq_sparsemixer.runs.arms import Variant
from fairseq_sparsemixer.runs.checkpoints import in_order
from fairseq_sparsemixer.runs.logs import by_layer, read_log
from fairseq_sparsemixer.runs.mending import LAST
from fairseq_sparsemixer.runs.record import kept_overrides, refuse_other
from fairseq_sparsemixer.study.engine import (
    Engine,
    Job,
    Stage,
    prepare_folder,
    read_state,
    scoring_command,
)
from fairseq_sparsemixer.tables import format_table
from fairseq_sparsemixer.training.process import training_environment
from fairseq_sparsemixer.training.settings import (
    CONFIGS,
    PACKAGE,
    compose,
    quoted,
    resolved,
    training_command,
)

CONFIG = "demo"
STATE = "demo.json"
"""In the folder of a run: how it is made, and whether its training is finished."""
_STATE = {"settings": {"overrides": [str], "configs": {str: str}}, "finished": bool}
LOG = "train.log"
SCORES = "test.json"
_SCORES = {
    "scores": {"bleu": {"score": float, "signature": str}, "chrf": {"score": float}},
    "copy": {"scores": {"bleu": {"score": float}}},
}
AVERAGE = "checkpoint_average.pt"
AVERAGED = 5
"""Checkpoints of the end of training that are averaged, if there are so many: configs/demo.yaml
keeps no more."""
SAMPLES = 5


class Demo(NamedTuple):
    """What is trained.

    Attributes:
        variants: one after the other.
        data: folder of the corpus, which is built if need be.
        runs: folder of the runs.
        overrides: of hydra, for every variant.
    """

    variants: List[Variant]
    data: Path
    runs: Path
    overrides: List[str]

    def do(self) -> None:
        """Train, score and show.

        Raises:
            UserError: a run was trained with other settings, or fails, or another demo is at work.
        """
        if not (CONFIGS / f"{CONFIG}.yaml").is_file():
            raise UserError("the demo runs from a checkout of the repository: configs/ is missing")
        check_writable(self.runs / "results.json", "--runs")
        print(f"== Corpus: {self.data}", flush=True)
        _check_vocabulary(self.data)
        preparation.prepare_homeassistant(self.data)
        self.runs.mkdir(parents=True, exist_ok=True)
        with sole_user(self.runs, "--runs") as lock:
            Engine(self._work, _show_progress, _fail, keep_open=lock).do(self.variants)
            self._show()

    def _show(self) -> None:
        """The last model's samples, and a table of all."""
        folders = [self.runs / variant.name for variant in self.variants]
        results = [_result(folder) for folder in folders]
        _print_samples(folders[-1], self.data)
        print("\n== Result")
        print(_table(results))
        write_json(self.runs / "results.json", results)
        for folder in folders:
            _print_places(folder)
        print(f"table      {self.runs / 'results.json'}")
        runs, page = (shlex.quote(str(path)) for path in (self.runs, self.runs / "report.html"))
        print(f"report     fairseq-sparsemixer report {runs} --output {page}")

    def _work(self, job: Job) -> Generator[Stage, None, None]:
        """Train a variant, then average and score it; what is finished is left alone."""
        name, folder = job.run.name, self.runs / job.run.name
        print(f"== Training {name}: {folder}", flush=True)
        data = f"task.data={quoted(self.data / 'bin')}"
        overrides = [*job.run.overrides, data, *self.overrides]
        settings = {"overrides": overrides, "configs": _read_configs()}
        state = read_state(folder / STATE, _STATE)
        kept: List[str] = []
        if state:
            kept = _check_same(folder, state["settings"], settings)
            settings = state["settings"]
        if state.get("finished"):
            print("   finished before")
        else:
            yield from _training(folder, self.data, settings, kept)
        print(f"== Scoring {name} on the test set", flush=True)
        if not (folder / SCORES).is_file():
            # A short one has written fewer, or only the last.
            last = in_order(folder)[-AVERAGED:] or [folder / LAST]
            average_checkpoints(last, folder / AVERAGE)
            command = scoring_command(folder, AVERAGE, folder / SCORES, f"--data={self.data}")
            yield Stage("evaluate", command)


def _check_vocabulary(data: Path) -> None:
    """Refuse a corpus that was cut into other pieces, which would be made anew."""
    path = data / CORPUS_RECORD
    if not path.is_file():
        return
    shape = {"corpus?": str, "settings?": {"vocab_size?": int}}
    record = read_json(path, shape, f"remove it, and {data} is completed anew")
    size = record.get("settings", {}).get("vocab_size", DEFAULT_VOCAB_SIZE)
    if record.get("corpus") == "homeassistant" and size != DEFAULT_VOCAB_SIZE:
        raise UserError(
            f"--data {data} was prepared with --vocab-size {size}, and the demo takes "
            f"{DEFAULT_VOCAB_SIZE}: name another folder, which is made if need be"
        )


def _training(
    folder: Path, data: Path, settings: Dict[str, Any], kept: List[str]
) -> Generator[Stage, None, None]:
    """Train in a process of its own."""
    prepare_folder(folder, data / "bin")
    write_json(folder / STATE, {"settings": settings, "finished": False})
    overrides = [f"common.user_dir={quoted(PACKAGE)}", *kept, *settings["overrides"]]
    command = training_command(CONFIGS, CONFIG, folder, overrides)
    yield Stage("train", command, folder / LOG, training_environment(os.environ))
    write_json(folder / STATE, {"settings": settings, "finished": True})
    print(flush=True)


def _show_progress(job: Job) -> None:
    job.process.show_progress()


def _fail(job: Job, reason: Optional[str]) -> None:
    """Stop at the first run that fails."""
    if reason is not None:
        raise UserError(reason)
    if job.stage == "train":
        print(flush=True)
        raise job.process.failure()
    raise UserError(f"failed: fairseq-sparsemixer {shlex.join(job.process.command[3:])}")


def _read_configs() -> Dict[str, str]:
    """The text of every config: a run resumes only under the settings that it began with."""
    paths = sorted(CONFIGS.rglob("*.yaml"))
    return {str(path.relative_to(CONFIGS)): path.read_text(encoding="utf-8") for path in paths}


def _check_same(folder: Path, before: Dict[str, Any], now: Dict[str, Any]) -> List[str]:
    """Refuse to go on with other settings; their configs may be laid out otherwise.

    Returns:
        The overrides of hydra by which the run goes on as it was begun.
    """
    kept: List[str] = []
    if before["configs"] != now["configs"]:
        begun = _composed(before, [])
        kept = kept_overrides(begun or {})
        if begun == _composed(now, kept):
            now = {**now, "configs": before["configs"]}
    refuse_other(
        folder,
        before,
        now,
        "{folder} was trained with other settings: remove it, or name another folder with --runs",
    )
    return kept


def _composed(settings: Dict[str, Any], kept: List[str]) -> Optional[Dict[str, Any]]:
    """What texts of configs come to; None where hydra refuses them."""
    with tempfile.TemporaryDirectory() as name:
        for path, text in settings["configs"].items():
            target = Path(name, path)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text, encoding="utf-8")
        overrides = [*kept, *settings["overrides"], "checkpoint.save_dir=."]
        with contextlib.suppress(UserError):
            return resolved(compose(Path(name), overrides, CONFIG))
    return None


def _result(folder: Path) -> Dict[str, Any]:
    """What the table shows of one run."""
    cure = "remove it and start the same command again, which makes it anew"
    scores = read_json(folder / SCORES, _SCORES, cure)
    validations = read_log(folder / LOG).validations
    if not validations:
        raise UserError(f"{folder / LOG} holds no validation: remove {folder} to train it anew")
    last, seconds = validations[-1].stats, validations[-1].seconds
    return {
        "model": folder.name,
        "updates": int(last["num_updates"]),
        "minutes": None if seconds is None else seconds / 60,
        "valid_nll_loss": validations[-1].nll_loss,
        "bleu": scores["scores"]["bleu"]["score"],
        "chrf": scores["scores"]["chrf"]["score"],
        "signature": scores["scores"]["bleu"]["signature"],
        "copy_bleu": scores["copy"]["scores"]["bleu"]["score"],
        "entropy": last.get("router_entropy"),
        "smallest_share": by_layer(last, "min_expert_share"),
        "largest_share": by_layer(last, "max_expert_share"),
    }


def _table(results: List[Dict[str, Any]]) -> str:
    """The results as aligned text, the signature and the experts' smallest shares below."""
    rows = [["model", "BLEU", "chrF2", "valid nll", "entropy", "shares", "updates", "minutes"]]
    for result in results:
        smallest, largest = result["smallest_share"], result["largest_share"]
        shares = ""
        if smallest:
            shares = f"{100 * min(smallest.values()):.0f}-{100 * max(largest.values()):.0f} %"
        rows.append(
            [
                result["model"],
                f"{result['bleu']:.2f}",
                f"{result['chrf']:.2f}",
                f"{result['valid_nll_loss']:.3f}",
                "" if result["entropy"] is None else f"{result['entropy']:.2f}",
                shares,
                str(result["updates"]),
                "" if result["minutes"] is None else f"{result['minutes']:.1f}",
            ]
        )
    rows.append(["nearest copy", f"{results[0]['copy_bleu']:.2f}"] + 6 * [""])
    lines = [
        format_table(rows),
        f"BLEU: {results[0]['signature']}",
        "entropy: of a token's softmax over experts, nats, mean over layers; shares: smallest and "
        "largest share of the tokens that an expert got, over layers; both on the validation set",
    ]
    for result in results:
        if result["smallest_share"]:
            by_layer = [f"{name} {100 * s:.1f} %" for name, s in result["smallest_share"].items()]
            lines.append(f"smallest share of an expert, {result['model']}: {', '.join(by_layer)}")
    return "\n".join(lines)


def _print_samples(folder: Path, data: Path) -> None:
    """Five held-out sentences spread over the test set, with translation and reference."""
    sources, references = (read_lines(data / "raw" / f"test.{lang}") for lang in ("en", "de"))
    step = len(sources) // SAMPLES
    places = [step // 2 + step * i for i in range(SAMPLES)]
    print(f"== Translations by {folder.name}")
    translator = Translator(str(folder), AVERAGE)
    for place, translation in zip(places, translator.translate([sources[p] for p in places])):
        print(f"   source       {sources[place]}")
        print(f"   translation  {translation.text}")
        print(f"   reference    {references[place]}\n")


def _print_places(folder: Path) -> None:
    print(f"checkpoint {folder / AVERAGE}")
    print(f"log        {folder / LOG}")
    print(f"scores     {folder / SCORES}")
    run = shlex.quote(str(folder))
    print(f"translate  fairseq-sparsemixer translate {run} --checkpoint {AVERAGE}")
