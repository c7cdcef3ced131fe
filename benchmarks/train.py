"""Words per second of fairseq's training: the dense transformer beside routers with experts.

  python -m benchmarks.train --output train.json      # Transformer base, the dense one and two more
  python -m benchmarks.train --router all --embed-dim 192 --ffn-dim 768 --heads 4 --layers 3
  python -m benchmarks.train --deterministic          # each of them with that flag, too
  python -m benchmarks.train --table train.json       # the table again

One update of fairseq's Trainer on one batch: forward, loss, backward, clipping, Adam, and what it
logs. The batches are those that fairseq makes of random sentences of 10 to 40 words, padding
included; words are target tokens. The dense model computes as much for a token as those with
experts do: these take the place of every other feed-forward network, one for each token, and are
about equally used. The peak of memory is that of one update, its activations above all: weights,
gradients and what the optimiser remembers are not counted. All models are held at once, so that
with every router they should be small ones.
"""

import argparse
import functools
import itertools
import logging
import random
import tempfile
from pathlib import Path
from typing import Any, Dict, Iterator, List

from fairseq import options, tasks
from fairseq.trainer import Trainer
from fairseq_cli import preprocess

from benchmarks import measuring, models
from benchmarks.measuring import Record
from fairseq_sparsemixer import determinism
from fairseq_sparsemixer.files import write_lines
from fairseq_sparsemixer.runs.arms import DENSE
from fairseq_sparsemixer.tables import markdown
from fairseq_sparsemixer.training.resources import count_parameters

SENTENCE_WORDS = (10, 40)
BATCHES = 4
"""So many different ones take turns."""
DETERMINISTIC = ", deterministic"
"""The end of an arm's name."""


def _write_corpus(folder: Path, vocabulary: int, tokens: int) -> None:
    """Binarise random sentences of about so many tokens on each side, with one dictionary."""
    rng = random.Random(0)
    words = models.RandomWords(vocabulary).source_dictionary
    words.save(str(folder / "dict.txt"))
    symbols = words.symbols[words.nspecial :]
    sentences = tokens * 2 // sum(SENTENCE_WORDS)
    for language in ("en", "de"):
        lines = (rng.choices(symbols, k=rng.randint(*SENTENCE_WORDS)) for _ in range(sentences))
        write_lines(folder / f"train.{language}", map(" ".join, lines))
    flags = {
        "source-lang": "en",
        "target-lang": "de",
        "trainpref": folder / "train",
        "srcdict": folder / "dict.txt",
        "destdir": folder,
    }
    words = [str(part) for flag, value in flags.items() for part in (f"--{flag}", value)]
    preprocess.main(options.get_preprocessing_parser().parse_args([*words, "--joined-dictionary"]))


def _trainer(args: argparse.Namespace, router: str, data: Path) -> Trainer:
    cfg = models.configuration(
        args,
        router,
        str(data),
        source_lang="en",
        target_lang="de",
        optimizer="adam",
        adam_betas="(0.9, 0.98)",
        lr=0.0005,
        lr_scheduler="inverse_sqrt",
        clip_norm=1.0,
        max_tokens=args.max_tokens,
        required_batch_size_multiple=1,
        num_workers=0,
        fp16=True if args.fp16 else None,
        bf16=True if args.bf16 else None,
    )
    task = tasks.setup_task(cfg.task)
    model = models.build(cfg.model, task)
    return Trainer(cfg, task, model, task.build_criterion(cfg.criterion))


def _batches(trainer: Trainer, max_tokens: int) -> List[Dict[str, Any]]:
    """The first batches of the corpus that are not what was left over."""
    batches = trainer.get_train_iterator(epoch=1).next_epoch_itr(shuffle=False)
    return [batch for batch in batches if batch["ntokens"] > max_tokens / 2][:BATCHES]


def measure(args: argparse.Namespace) -> Iterator[Record]:
    """Seconds and words of each update of every arm."""
    determinism.switch(args.deterministic)  # before cuBLAS reads what it says
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _write_corpus(folder, args.vocabulary, (BATCHES + 1) * args.max_tokens)
        trainers = {router: _trainer(args, router, folder) for router in models.arms(args)}
        batches = _batches(trainers[DENSE], args.max_tokens)
    rows: Dict[str, Record] = {}
    steps = {}
    kinds = {"": False, DETERMINISTIC: True} if args.deterministic else {"": False}
    for (router, trainer), (ending, on) in itertools.product(trainers.items(), kinds.items()):
        determinism.switch(on)
        for batch in batches:  # each shape is slower the first time
            trainer.train_step([batch])
        update = functools.partial(trainer.train_step, batches[:1])
        parameters = count_parameters(trainer.model)
        arm = f"{router}{ending}"
        rows[arm] = {
            "arm": arm,
            "parameters": parameters.total,
            "active_parameters": parameters.active,
            "peak_bytes": measuring.peak_bytes(update, trainer.model.parameters(), args.device),
        }
        each = itertools.cycle(batches)
        steps[arm] = functools.partial(_seconds, trainer, each, args.device, on)
    for arm, seconds in measuring.take_turns(steps, args.repetitions).items():
        words = itertools.cycle(batch["ntokens"] for batch in batches)
        rows[arm]["words"] = list(itertools.islice(words, args.repetitions))
        rows[arm]["seconds"] = seconds
    yield {"rows": list(rows.values())}


def _seconds(
    trainer: Trainer, batches: Iterator[Dict[str, Any]], device: str, deterministic: bool
) -> float:
    """Of an update with the next batch."""
    determinism.switch(deterministic)
    batch = next(batches)
    return measuring.wall_seconds(lambda: trainer.train_step([batch]), device)


def table(rows: List[Record]) -> str:
    """Medians over the updates; ratios are medians of the rounds' ratios, with quartiles."""
    head = ["model", "parameters (M)", "active (M)", "words/s", "step (ms)", "speed / dense"]
    with_peak = "peak_bytes" in rows[0]
    cells = [head + ["peak (MB)", "peak / dense"] * with_peak]
    dense = rows[0]
    for row in rows:
        speeds = [words / seconds for words, seconds in zip(row["words"], row["seconds"])]
        cells.append(
            [
                row["arm"],
                f"{row['parameters'] / 1e6:.1f}",
                f"{row['active_parameters'] / 1e6:.1f}",
                f"{measuring.quartiles(speeds)[1]:.0f}",
                measuring.milliseconds(row["seconds"]),
                measuring.ratio(dense["seconds"], row["seconds"]),
            ]
        )
        if with_peak:
            cells[-1].append(f"{row['peak_bytes'] / 1e6:.0f}")
            cells[-1].append(f"{row['peak_bytes'] / dense['peak_bytes']:.2f}")
    return markdown(cells)


def main() -> None:
    """Measure, print, write."""
    logging.disable(logging.INFO)  # which fairseq_cli's modules switch on when they are imported
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    models.add_arguments(parser)
    parser.add_argument(
        "--max-tokens",
        type=int,
        default=4096,
        help="of a batch, on each side, padding included (default: %(default)s)",
    )
    precision = parser.add_mutually_exclusive_group()
    precision.add_argument("--fp16", action="store_true", help="as fairseq-train --fp16 (GPU)")
    precision.add_argument("--bf16", action="store_true", help="as fairseq-train --bf16 (GPU)")
    parser.add_argument("--deterministic", action="store_true", help="each model a second time so")
    measuring.add_arguments(parser, rounds=10)
    measuring.run(parser, measure, table)


if __name__ == "__main__":
    main()
