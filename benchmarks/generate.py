"""Tokens per second of fairseq's SequenceGenerator: the dense transformer beside experts.

  python -m benchmarks.generate --output generate.json    # Transformer base, beam 4 and greedy
  python -m benchmarks.generate --table generate.json     # the tables again

All hypotheses are forced to one length, so that every arm does the same work: encoder, search and
as many decoder steps. Tokens are those of the best hypothesis of each sentence, end of sentence
included; a beam of four computes four times as many.

The models are untrained and repeat words, more than a translation does. So that experts differ,
each sentence begins with a random word, and the routers are balanced; ``experts`` says how many
different ones a decoder layer calls in one step. All models are prepared as ``fairseq-generate``
does it, which lays the experts' weights out for oneDNN and leaves dense layers as they are.
"""

import argparse
import functools
import logging
from typing import Any, Dict, Iterator, List

import torch
from fairseq.models import FairseqModel
from fairseq.sequence_generator import SequenceGenerator

from benchmarks import measuring, models
from benchmarks.measuring import Record
from fairseq_sparsemixer.moe.feed_forward import moe_layers
from fairseq_sparsemixer.runs.arms import DENSE
from fairseq_sparsemixer.tables import markdown

SOURCE_TOKENS = (20, 30)
"""The shortest and the longest source sentence, end of sentence included."""


def _build(args: argparse.Namespace, router: str, task: models.RandomWords) -> FairseqModel:
    """An arm as ``fairseq-generate`` prepares it."""
    cfg = models.configuration(args, router, data="")
    model = models.build(cfg.model, task).to(args.device, getattr(torch, args.dtype))
    model.prepare_for_inference_(cfg)
    return model


def _inputs(sentences: int, task: models.RandomWords, device: str) -> Dict[str, Any]:
    """Random source sentences, padded on the left, and the first words to write."""
    words = task.source_dictionary
    generator = torch.Generator().manual_seed(0)
    shortest, longest = SOURCE_TOKENS
    lengths = torch.randint(shortest, longest + 1, (sentences,), generator=generator)
    lengths[0] = longest  # no batch is padded more than it must be
    tokens = torch.randint(words.nspecial, len(words), (sentences, longest), generator=generator)
    tokens[:, -1] = words.eos()
    tokens[torch.arange(longest) < longest - lengths.unsqueeze(-1)] = words.pad()
    first = torch.randint(words.nspecial, len(words), (sentences, 1), generator=generator)
    net_input = {"src_tokens": tokens.to(device), "src_lengths": lengths.to(device)}
    return {"sample": {"net_input": net_input}, "prefix_tokens": first.to(device)}


def _experts_called(generate: Any, model: FairseqModel) -> List[float]:
    """Mean number of different experts in one step of each decoder layer that has experts."""
    called: Dict[Any, List[int]] = {layer: [] for layer in moe_layers(model.decoder)}

    def count(layer: Any, _: Any, outputs: Any) -> None:
        called[layer].append(outputs[1].chosen.unique().numel())

    hooks = [layer.register_forward_hook(count) for layer in called]
    generate()
    for hook in hooks:
        hook.remove()
    return [sum(steps) / len(steps) for steps in called.values()]


def measure(args: argparse.Namespace) -> Iterator[Record]:
    """Seconds of every arm for every beam and number of sentences."""
    task = models.RandomWords(args.vocabulary)
    arms = {router: _build(args, router, task) for router in models.arms(args)}
    rows: List[Record] = []
    for beam in args.beam:
        for sentences in args.sentences:
            inputs = _inputs(sentences, task, args.device)
            of_case: Dict[str, Record] = {}
            samples = {}
            for name, model in arms.items():
                generator = SequenceGenerator(
                    [model],
                    task.target_dictionary,
                    beam_size=beam,
                    max_len_b=args.length - 1,
                    min_len=args.length - 1,
                )
                generate = functools.partial(generator.generate, [model], **inputs)
                hypotheses = generate()
                of_case[name] = {
                    "arm": name,
                    "beam": beam,
                    "sentences": sentences,
                    "tokens": sum(best["tokens"].numel() for best, *_ in hypotheses),
                    "experts": _experts_called(generate, model),
                }
                samples[name] = functools.partial(measuring.wall_seconds, generate, args.device)
            title = f"beam {beam}, {sentences} sentences"
            for name, seconds in measuring.take_turns(samples, args.repetitions, title).items():
                of_case[name]["seconds"] = seconds
            rows += of_case.values()
            yield {"rows": rows}


def table(rows: List[Record]) -> str:
    """A table for each beam; ratios of speeds are medians of the rounds' ratios, with quartiles."""
    parts: List[str] = []
    for beam in dict.fromkeys(row["beam"] for row in rows):
        of_beam = [row for row in rows if row["beam"] == beam]
        names = list(dict.fromkeys(row["arm"] for row in of_beam))
        head = ["sentences", f"{DENSE} (tokens/s)"]
        for name in names[1:]:
            head += [f"{name} (tokens/s)", "speed / dense", "experts"]
        cells = [head]
        for sentences in dict.fromkeys(row["sentences"] for row in of_beam):
            own = {row["arm"]: row for row in of_beam if row["sentences"] == sentences}
            cells.append([str(sentences)])
            for name in names:
                row = own[name]
                speed = row["tokens"] / measuring.quartiles(row["seconds"])[1]
                cells[-1].append(f"{speed:.0f}")
                if name != DENSE:
                    experts = sum(row["experts"]) / max(len(row["experts"]), 1)
                    ratio = measuring.ratio(own[DENSE]["seconds"], row["seconds"])
                    cells[-1] += [ratio, f"{experts:.1f}"]
        parts.append(f"beam {beam}\n\n{markdown(cells)}")
    return "\n\n".join(parts)


def main() -> None:
    """Measure, print, write."""
    logging.disable(logging.INFO)  # what fairseq says while it reads its flags
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    models.add_arguments(parser)
    parser.add_argument(
        "--sentences",
        nargs="+",
        type=int,
        default=[1, 8, 32, 128],
        metavar="S",
        help="in a batch (default: 1 8 32 128)",
    )
    parser.add_argument(
        "--beam", nargs="+", type=int, default=[4, 1], metavar="B", help="default: 4 1"
    )
    parser.add_argument(
        "--length",
        type=int,
        default=30,
        help="tokens of each hypothesis, end of sentence included (default: %(default)s)",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="default: %(default)s",
    )
    measuring.add_arguments(parser, rounds=10)
    measuring.run(parser, measure, table)


if __name__ == "__main__":
    main()
