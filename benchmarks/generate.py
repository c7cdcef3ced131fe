"""Tokens per second of beam search: the dense transformer beside experts, and CTranslate2.

  python -m benchmarks.generate --output generate.json    # Transformer base, beam 4 and greedy
  python -m benchmarks.generate --table generate.json     # the tables again

All hypotheses are forced to one length, so that every arm does the same work: encoder, search and
as many decoder steps. Tokens are those of the best hypothesis of each sentence, end of sentence
included; a beam of four computes four times as many.

The models are untrained and repeat words, more than a translation does. So that experts differ,
each sentence begins with a random word, and the routers are balanced; ``experts`` says how many
different ones a decoder layer calls in one step. All models are prepared as ``fairseq-generate``
does it, which lays the experts' weights out for oneDNN.

An arm with the name of its model alone is fairseq's own search. ``laid out`` is what
``fairseq-sparsemixer translate`` does on a CPU, and ``int8`` what its flag adds. CTranslate2, where
it is installed, has the dense model's weights. ``alike`` counts the sentences whose best hypothesis
is that of fairseq's search with the same model: of untrained ones the best are close to each other.
"""

import argparse
import functools
import logging
import tempfile
from importlib.util import find_spec
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional

import torch
from fairseq.models import FairseqModel
from fairseq.sequence_generator import SequenceGenerator

from benchmarks import measuring, models
from benchmarks.measuring import Record
from fairseq_sparsemixer.models.laid_out import Layout
from fairseq_sparsemixer.moe.feed_forward import moe_layers
from fairseq_sparsemixer.runs.arms import DENSE
from fairseq_sparsemixer.tables import markdown

SOURCE_TOKENS = (20, 30)
"""The shortest and the longest source sentence, end of sentence included."""


class _Arm(NamedTuple):
    """What is measured.

    Attributes:
        name: of the arm.
        of: the model, "dense" or a router's name.
        layout: None for fairseq's own search.
        compute_type: of CTranslate2's translator; None for models of fairseq.
    """

    name: str
    of: str
    layout: Optional[torch.dtype] = None
    compute_type: Optional[str] = None


def _arms(args: argparse.Namespace) -> List[_Arm]:
    """All of them; on a GPU and in half precision there is fairseq's own search alone."""
    found = [_Arm(name, name) for name in models.arms(args)]
    if args.device == "cpu" and args.dtype == "float32":
        for name in models.arms(args):
            found.append(_Arm(f"{name}, laid out", name, torch.float32))
            found.append(_Arm(f"{name}, laid out, int8", name, torch.int8))
        if find_spec("ctranslate2") is not None:
            for kind in ("float32", "int8"):
                found.append(_Arm(f"CTranslate2, dense, {kind}", DENSE, compute_type=kind))
    return found


def _build(args: argparse.Namespace, arm: _Arm, task: models.RandomWords) -> FairseqModel:
    """The model of an arm as ``fairseq-generate`` prepares it."""
    cfg = models.configuration(args, arm.of, data="")
    model = models.build(cfg.model, task).to(args.device, getattr(torch, args.dtype))
    model.prepare_for_inference_(cfg)
    model.layout = None if arm.layout is None else Layout(arm.layout)
    return model


Generate = Callable[[Dict[str, Any], int], List[List[int]]]
"""Inputs and the beam to the tokens of the best hypothesis of each sentence."""


def _with_fairseq(args: argparse.Namespace, model: FairseqModel, words: Any) -> Generate:
    def generate(inputs: Dict[str, Any], beam: int) -> List[List[int]]:
        length = args.length - 1
        generator = SequenceGenerator(
            [model], words, beam_size=beam, max_len_b=length, min_len=length
        )
        return [best["tokens"].tolist() for best, *_ in generator.generate([model], **inputs)]

    return generate


def _with_ctranslate2(args: argparse.Namespace, model: Any, words: Any, kind: str) -> Generate:
    import ctranslate2
    from ctranslate2.converters import fairseq as converter
    from ctranslate2.specs import TransformerSpec

    spec = TransformerSpec.from_config(args.layers, args.heads, pre_norm=False)
    converter.set_transformer_encoder(spec.encoder, model.encoder.requires_grad_(False))
    converter.set_transformer_decoder(spec.decoder, model.decoder.requires_grad_(False))
    names = converter._get_vocab(words)
    spec.register_source_vocabulary(names)
    spec.register_target_vocabulary(names)
    spec.config.decoder_start_token = spec.config.eos_token
    spec.config.add_source_eos = True
    spec.validate()
    spec.optimize()
    with tempfile.TemporaryDirectory() as folder:
        spec.save(folder)
        threads = torch.get_num_threads()
        translator = ctranslate2.Translator(folder, compute_type=kind, intra_threads=threads)

    def generate(inputs: Dict[str, Any], beam: int) -> List[List[int]]:
        special = (words.pad(), words.eos())
        sources = inputs["sample"]["net_input"]["src_tokens"].tolist()
        found = translator.translate_batch(
            [[words[token] for token in line if token not in special] for line in sources],
            target_prefix=[[words[first]] for (first,) in inputs["prefix_tokens"].tolist()],
            beam_size=beam,
            min_decoding_length=args.length - 1,
            max_decoding_length=args.length - 1,
        )
        ids = [[words.index(word) for word in one.hypotheses[0]] for one in found]
        return [[*line, words.eos()] for line in ids]

    return generate


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


def _experts_called(generate: Callable[[], Any], model: FairseqModel) -> List[float]:
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
    words = task.target_dictionary
    arms = {arm: _build(args, arm, task) for arm in _arms(args)}
    searches = {
        arm: _with_fairseq(args, model, words)
        if arm.compute_type is None
        else _with_ctranslate2(args, model, words, arm.compute_type)
        for arm, model in arms.items()
    }
    rows: List[Record] = []
    for beam in args.beam:
        for sentences in args.sentences:
            inputs = _inputs(sentences, task, args.device)
            of_case: Dict[str, Record] = {}
            samples = {}
            by_fairseq: Dict[str, List[List[int]]] = {}
            for arm, model in arms.items():
                generate = functools.partial(searches[arm], inputs, beam)
                found = generate()
                expected = by_fairseq.setdefault(arm.of, found)
                of_case[arm.name] = {
                    "arm": arm.name,
                    "model": arm.of,
                    "beam": beam,
                    "sentences": sentences,
                    "tokens": sum(map(len, found)),
                    "alike": sum(map(list.__eq__, found, expected)),
                    "experts": _experts_called(generate, model),
                }
                samples[arm.name] = functools.partial(measuring.wall_seconds, generate, args.device)
            title = f"beam {beam}, {sentences} sentences"
            for name, seconds in measuring.take_turns(samples, args.repetitions, title).items():
                of_case[name]["seconds"] = seconds
            rows += of_case.values()
            yield {"rows": rows}


def table(rows: List[Record]) -> str:
    """A table for each beam and number of sentences.

    Ratios of speeds are medians of the rounds' ratios, with quartiles.
    """
    parts: List[str] = []
    for case in dict.fromkeys((row["beam"], row["sentences"]) for row in rows):
        own = {row["arm"]: row for row in rows if (row["beam"], row["sentences"]) == case}
        cells = [["arm", "tokens/s", "speed / dense", "speed / fairseq's", "experts", "alike"]]
        for name, row in own.items():
            experts = sum(row["experts"]) / max(len(row["experts"]), 1)
            base = own[row.get("model", name)]
            cells.append(
                [
                    name,
                    f"{row['tokens'] / measuring.quartiles(row['seconds'])[1]:.0f}",
                    measuring.ratio(own[DENSE]["seconds"], row["seconds"]),
                    "" if row is base else measuring.ratio(base["seconds"], row["seconds"]),
                    f"{experts:.1f}" if experts else "",
                    "" if row is base else f"{row['alike']} of {row['sentences']}",
                ]
            )
        plural = "" if case[1] == 1 else "s"
        parts.append(f"beam {case[0]}, {case[1]} sentence{plural}\n\n{markdown(cells)}")
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
