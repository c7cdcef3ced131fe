"""Train a small Switch Transformer on real English-German text, translate and score it."""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Dict, List

from fairseq_sparsemixer.errors import UserError
from fairseq_sparsemixer.files import read_lines, write_json
from fairseq_sparsemixer.runs.arms import DENSE, Arm, build_arm
from fairseq_sparsemixer.runs.logs import by_layer, read_log
from fairseq_sparsemixer.training.process import copy_model_files, run_with_progress

CHECKOUT = Path(__file__).resolve().parents[1]
AVERAGE = "checkpoint_average.pt"
AVERAGED = 5
"""Checkpoints of the end of training that are averaged, as many as configs/demo.yaml keeps."""
SAMPLES = 5


def run(args: argparse.Namespace) -> None:
    """Run the demo."""
    from fairseq_sparsemixer.corpora.homeassistant.preparation import prepare_homeassistant

    configs = CHECKOUT / "configs"
    if not (configs / "demo.yaml").is_file():
        raise UserError("the demo runs from a checkout of the repository: configs/ is missing")
    arms = _arms(args)
    print(f"== Corpus: {args.data}", flush=True)
    prepare_homeassistant(args.data)
    results = []
    for arm in arms:
        folder = args.runs / arm.name
        print(f"== Training {arm.name}: {folder}", flush=True)
        _train(arm, folder, configs, args)
        print(f"== Scoring {arm.name} on the test set", flush=True)
        results.append(_result(arm, folder, args.data))
    _print_samples(args.runs / arms[-1].name, args.data)
    print("\n== Result")
    print(_table(results))
    write_json(args.runs / "results.json", results)
    for arm in arms:
        _print_places(args.runs / arm.name)
    print(f"table      {args.runs / 'results.json'}")
    print(f"report     fairseq-sparsemixer report {args.runs} --output {args.runs}/report.html")


def _arms(args: argparse.Namespace) -> List[Arm]:
    names = [DENSE, "switch", "sparsemixer"] if args.compare else _routers(args.router)
    return [build_arm(name, args.num_experts) for name in names]


def _routers(names: str) -> List[str]:
    """The routers that --router names; their order is that of the table."""
    from fairseq_sparsemixer.moe import ROUTERS

    return list(ROUTERS) if names == "all" else list(dict.fromkeys(names.split(",")))


def _train(arm: Arm, folder: Path, configs: Path, args: argparse.Namespace) -> None:
    """Train in a process of its own, with a line of progress; a finished run is left alone."""
    overrides = [
        *arm.overrides,
        f"task.data={args.data / 'bin'}",
        f"common.seed={args.seed}",
        *([] if args.max_update is None else [f"optimization.max_update={args.max_update}"]),
        *args.overrides,
    ]
    settings = {"overrides": overrides, "configs": _read_configs(configs)}
    folder.mkdir(parents=True, exist_ok=True)
    state_file = folder / "demo.json"
    state = json.loads(state_file.read_text()) if state_file.is_file() else {}
    if state and state["settings"] != settings:
        raise UserError(
            f"{folder} was trained with other settings: remove it, or name another folder with "
            "--runs"
        )
    if state.get("finished"):
        print(f"   finished before, {state['minutes']:.1f} minutes of training")
        return
    minutes = state.get("minutes", 0.0)
    write_json(state_file, {"settings": settings, "finished": False, "minutes": minutes})
    copy_model_files(args.data / "bin", folder)
    command = [
        *(sys.executable, "-m", "fairseq_cli.hydra_train"),
        *("--config-dir", str(configs), "--config-name", "demo"),
        f"hydra.run.dir={folder}",
        f"common.user_dir={Path(__file__).parent}",
        *overrides,
    ]
    started = time.monotonic()
    try:
        run_with_progress(command, folder / "train.log")
        finished = True
    except BaseException:
        finished = False
        raise
    finally:
        minutes += (time.monotonic() - started) / 60
        write_json(state_file, {"settings": settings, "finished": finished, "minutes": minutes})


def _read_configs(configs: Path) -> Dict[str, str]:
    """The text of every config: a run resumes only under the settings that it began with."""
    paths = sorted(configs.rglob("*.yaml"))
    return {str(path.relative_to(configs)): path.read_text() for path in paths}


def _result(arm: Arm, folder: Path, data: Path) -> Dict[str, Any]:
    """Average, translate and score; what the table shows of one run."""
    from fairseq_sparsemixer.evaluation.average import average_checkpoints
    from fairseq_sparsemixer.runs.checkpoints import last_checkpoints

    scores_path = folder / "test.json"
    if not scores_path.is_file():
        average_checkpoints(last_checkpoints(folder, AVERAGED), folder / AVERAGE)
        _cli("evaluate", folder, "--checkpoint", AVERAGE, "--data", data, "--output", scores_path)
    scores = json.loads(scores_path.read_text(encoding="utf-8"))
    last = read_log(folder / "train.log").validations[-1].stats
    return {
        "model": arm.name,
        "updates": int(last["num_updates"]),
        "minutes": json.loads((folder / "demo.json").read_text())["minutes"],
        "valid_nll_loss": last["nll_loss"],
        "bleu": scores["scores"]["bleu"]["score"],
        "chrf": scores["scores"]["chrf"]["score"],
        "signature": scores["scores"]["bleu"]["signature"],
        "copy_bleu": scores["copy"]["scores"]["bleu"]["score"],
        "entropy": last.get("router_entropy"),
        "smallest_share": by_layer(last, "min_expert_share"),
        "largest_share": by_layer(last, "max_expert_share"),
    }


def _cli(*arguments: Any) -> None:
    command = [sys.executable, "-m", "fairseq_sparsemixer.cli", *map(str, arguments)]
    if subprocess.run(command).returncode:
        raise UserError(f"failed: fairseq-sparsemixer {' '.join(command[3:])}")


def _table(results: List[Dict[str, Any]]) -> str:
    """The results as aligned text, the signature and the experts' smallest shares below."""
    from fairseq_sparsemixer.tables import format_table

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
                f"{result['minutes']:.1f}",
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
    from fairseq_sparsemixer.evaluation.translator import Translator

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
    print(f"log        {folder / 'train.log'}")
    print(f"scores     {folder / 'test.json'}")
    print(f"translate  fairseq-sparsemixer translate {folder} --checkpoint {AVERAGE}")
