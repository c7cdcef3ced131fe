"""Drop the experts that a model needs least, or all of them but one.

An expert counts for as much as the loss of a text grows where it is gone and its tokens go to the
next best. One is dropped in each layer at a time, and what is left measured again: of two that
stand in for each other each is needless only as long as the other is there.
"""

import argparse
import dataclasses
import time
from collections import OrderedDict
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional

import torch
from fairseq.models.transformer import TransformerModel
from fairseq.tasks.translation import TranslationConfig
from torch import nn

from fairseq_sparsemixer.conversion.checkpoints import (
    Vocabularies,
    read_transformer,
    write_model,
)
from fairseq_sparsemixer.conversion.smaller import as_dense, keep_experts, scale_outputs
from fairseq_sparsemixer.conversion.usage import TextLoss, Usage
from fairseq_sparsemixer.errors import UserError
from fairseq_sparsemixer.evaluation import scoring
from fairseq_sparsemixer.evaluation.options import ModelChoice, Search
from fairseq_sparsemixer.evaluation.scored_text import Text, find_test_set, read_text
from fairseq_sparsemixer.evaluation.several import check_one
from fairseq_sparsemixer.evaluation.translator import Translator, load_translator
from fairseq_sparsemixer.files import check_writable, write_json
from fairseq_sparsemixer.models.config import flat_settings
from fairseq_sparsemixer.models.layers import SwitchLayer, switch_layers
from fairseq_sparsemixer.moe import MoEFeedForward, Router
from fairseq_sparsemixer.runs.checkpoints import load_state
from fairseq_sparsemixer.runs.settings import expert_fields
from fairseq_sparsemixer.tables import format_table

DENSE = "transformer"
"""fairseq's own architecture."""


class Goal(NamedTuple):
    """What is to be left.

    Attributes:
        experts: in each layer; None for no experts, or for nothing to be dropped.
        dense: how they become one network: ``"keep"`` the best, or ``"merge"`` them by load.
    """

    experts: Optional[int]
    dense: Optional[str]


def prune(
    model: ModelChoice,
    search: Search,
    goal: Goal,
    *,
    subset: str,
    sentences: int,
    output: Optional[Path],
) -> None:
    """Measure, drop, write and print.

    Args:
        model: one checkpoint.
        search: how it translates, for BLEU and speed.
        goal: what is to be left.
        subset: of the prepared corpus, that everything is measured on.
        sentences: of it, from the first.
        output: the new checkpoint; what was measured goes beside it, as JSON. None to measure only.

    Raises:
        UserError: the model has no experts or too few, or a token has no next best; or there is no
            such text.
    """
    translator = load_translator(model, search.precision)
    check_one(translator.pairs)
    path = _only_checkpoint(translator)
    layers = switch_layers(translator.model)
    _check(path, translator.model, layers, goal)
    if output is not None:
        check_writable(_record_of(output))
    test_set = find_test_set(translator, model.data, subset)
    text = read_text(test_set, (translator.source_lang, translator.target_lang))
    text = text._replace(sources=text.sources[:sentences], references=text.references[:sentences])
    bench = _Bench(translator, text, search)
    usage = bench.loss.usage()
    base = bench.measure(translator, "as it is", _count(layers))
    chosen = not _router(layers).needs_token_ids
    needs = {name: bench.needs(layer) for name, layer in layers.items()} if chosen else {}
    print(_table_of_experts(usage, needs, base["bits"]))
    steps = [base]
    if goal.experts is not None:
        steps += _drop(bench, layers, usage, needs, goal.experts)
    if goal.dense is not None:
        _replace_by_dense(bench, layers, usage, goal.dense)
    if output is not None:
        _write(path, translator.model, layers, goal, output)
    if goal.dense is not None and output is not None:
        # As it is read back: that is what has the speed of a dense model.
        dense = translator.with_model(read_transformer(output)[2])
        steps.append(bench.measure(dense, f"dense, {goal.dense}", 0))
    print(_table_of_steps(steps))
    if output is None:
        return
    found = {
        "checkpoint": str(path),
        "text": {"source": str(test_set.source), "sentences": len(text.sources)},
        "search": search._asdict(),
        "layers": {
            name: {
                "shares": each.shares.tolist(),
                "gate": each.gate,
                "bits_without": needs.get(name),
            }
            for name, each in usage.items()
        },
        "steps": steps,
    }
    write_json(_record_of(output), found)
    print(f"wrote {output} and {_record_of(output)}")


def _record_of(output: Path) -> Path:
    """Where the figures of a checkpoint go."""
    return output.with_name(f"{output.name}.json")


def _only_checkpoint(translator: Translator) -> Path:
    if len(translator.checkpoints) > 1:
        raise UserError("an ensemble cannot be pruned; give one checkpoint")
    return translator.checkpoints[0].path


def _check(path: Path, model: Any, layers: Dict[str, SwitchLayer], goal: Goal) -> None:
    """Refuse what cannot be done to a model."""
    if not layers:
        raise UserError(f"{path} has no experts to drop; give a model with experts")
    if model.cfg.encoder.layers_to_keep or model.cfg.decoder.layers_to_keep:
        raise UserError(f"{path} has left out layers (--*-layers-to-keep): prune the whole model")
    router = _router(layers)
    if router.needs_token_ids and goal.dense is None:
        raise UserError(
            f"{path} has router {router.name}, which knows one expert for each word and no next "
            "best: none can be dropped; --to-dense keep or merge makes one network of them"
        )
    if goal.experts is None:
        return
    if not router.top_k <= goal.experts < router.num_experts:
        raise UserError(
            f"--experts {goal.experts} must be at least {router.top_k}, as many as each token "
            f"takes, and below the {router.num_experts} that the model has"
        )


def _router(layers: Dict[str, SwitchLayer]) -> Router:
    """Of the first layer: kind and number of experts are the same in each."""
    return next(iter(layers.values())).moe.router


def _count(layers: Dict[str, SwitchLayer]) -> int:
    return _router(layers).num_experts


class _Bench:
    """What models are measured on."""

    def __init__(self, translator: Translator, text: Text, search: Search) -> None:
        pairs = zip(text.sources, text.references)
        encoded = [translator.encode_pair(*pair) for pair in pairs if all(map(str.strip, pair))]
        dictionary = translator.target_dictionary
        if not encoded:
            raise UserError("there is no sentence to measure experts on; see --sentences, --subset")
        self.translator = translator
        self.symbols = (dictionary.pad(), dictionary.eos())
        self.encoded = encoded
        self.loss = TextLoss(translator.model, encoded, *self.symbols)
        self._text, self._search = text, search

    def needs(self, layer: SwitchLayer) -> List[float]:
        """(N,) the loss without each expert of a layer, in bits a token."""
        return self.loss.bits_with(layer, _without)

    def measure(self, translator: Translator, name: str, experts: int) -> Dict[str, Any]:
        """Size, loss, BLEU and speed of a model."""
        text, search = self._text, self._search
        started = time.perf_counter()
        translations = translator.translate(
            text.sources, search.beam, search.lenpen, search.max_tokens, progress=True
        )
        seconds = time.perf_counter() - started
        lines = [each.text for each in translations]
        bleu = scoring.score(lines, text.references, text.tokeniser)["bleu"]
        # Pieces, not words: a model that has lost much repeats some of them without an end.
        found = [translator.encode_pair(*pair).target for pair in zip(text.sources, lines)]
        parameters = list(translator.model.parameters())
        return {
            "model": name,
            "experts": experts,
            "parameters": sum(each.numel() for each in parameters),
            "megabytes": sum(each.numel() * each.element_size() for each in parameters) / 1e6,
            "bits": TextLoss(translator.model, self.encoded, *self.symbols).bits(),
            "bleu": bleu["score"],
            "signature": bleu["signature"],
            "pieces_per_second": sum(map(len, found)) / seconds,
        }


def _without(mixture: MoEFeedForward, expert: int) -> MoEFeedForward:
    return keep_experts(mixture, [i for i in range(mixture.router.num_experts) if i != expert])


def _drop(
    bench: _Bench,
    layers: Dict[str, SwitchLayer],
    usage: Dict[str, Usage],
    needs: Dict[str, List[float]],
    left: int,
) -> List[Dict[str, Any]]:
    """Leave so many experts in each layer; what was measured after each step."""
    steps = []
    while _count(layers) > left:
        for name, layer in layers.items():
            losses = needs[name]
            layer.moe = _without(layer.moe, losses.index(min(losses)))
        # With fewer experts to choose from gates are larger, and outputs too.
        now = bench.loss.usage()
        for name, layer in layers.items():
            scale_outputs(layer.moe, usage[name].gate / now[name].gate)
            layer.make_generation_fast_()
        usage = now
        steps.append(bench.measure(bench.translator, "pruned", _count(layers)))
        if _count(layers) > left:
            needs = {name: bench.needs(layer) for name, layer in layers.items()}
    return steps


def _replace_by_dense(
    bench: _Bench, layers: Dict[str, SwitchLayer], usage: Dict[str, Usage], how: str
) -> None:
    """Put one feed-forward network into the place of each layer's experts."""
    chosen = {}
    for name, layer in layers.items():
        of_layer = usage[name]
        if how == "merge":
            chosen[name] = as_dense(layer.moe, of_layer, of_layer.shares)
            continue
        alone = _alone(of_layer)
        losses = bench.loss.bits_with(layer, alone)
        chosen[name] = alone(layer.moe, losses.index(min(losses)))
    for name, layer in layers.items():
        layer.moe = chosen[name]


def _alone(usage: Usage) -> Any:
    """A function that makes a layer of one expert."""

    def alone(mixture: MoEFeedForward, expert: int) -> MoEFeedForward:
        weights_N = torch.zeros_like(usage.shares)
        weights_N[expert] = 1.0
        return as_dense(mixture, usage, weights_N)

    return alone


def _write(
    path: Path, model: Any, layers: Dict[str, SwitchLayer], goal: Goal, output: Path
) -> None:
    """Write what has become of a model."""
    state = load_state(path)
    flat = flat_settings(model.cfg)
    if goal.dense is None:
        old = state["cfg"].model
        experts = {
            name: getattr(old, name, usual) for name, usual in expert_fields()["model"].items()
        }
        experts["num_experts"] = _count(layers)
        write_model(state, model, {"_name": "switch_transformer", **flat, **experts}, output)
        return
    settings = _of_both_kinds({"_name": DENSE, "arch": DENSE, "task": "translation", **flat})
    write_model(state, _dense(path, state, model, layers), settings, output, _plain_parts(state))


def _of_both_kinds(settings: Dict[str, Any]) -> Dict[str, Any]:
    """Settings whose entries are attributes, too.

    fairseq reads a mapping. Converters, as that of CTranslate2, read the attributes of a Namespace,
    which torch refuses to load from a file unless it is told to; an OrderedDict it takes.
    """
    both = OrderedDict(settings)
    vars(both).update(settings)
    return both


def _dense(
    path: Path, state: Dict[str, Any], model: nn.Module, layers: Dict[str, SwitchLayer]
) -> nn.Module:
    """fairseq's transformer with the networks that are in the experts' places."""
    parameters = {
        name: value
        for name, value in model.state_dict().items()
        if ".moe." not in name and not name.endswith(".language_tags")
    }
    for name, layer in layers.items():
        side, number = name.split(".")
        for ours, theirs in (("1", "fc1"), ("2", "fc2")):
            for kind, part in (("w", "weight"), ("b", "bias")):
                value = getattr(layer.moe.experts, kind + ours)[0].detach()
                parameters[f"{side}.layers.{number}.{theirs}.{part}"] = value
    flat = argparse.Namespace(**flat_settings(model.cfg))
    dense = TransformerModel.build_model(flat, Vocabularies(state, path))
    dense.load_state_dict(parameters)
    return dense


def _plain_parts(state: Dict[str, Any]) -> Dict[str, Dict[str, Any]]:
    """The sections of the settings that name what fairseq alone does not have, without it."""
    cfg = state["cfg"]
    known = {field.name for field in dataclasses.fields(TranslationConfig)}
    parts: Dict[str, Dict[str, Any]] = {"common": {**cfg.common, "user_dir": None}}
    if cfg.task._name == "translation_with_routing":
        task = {name: value for name, value in cfg.task.items() if name in known}
        parts["task"] = {**task, "_name": "translation"}
    name = "label_smoothed_cross_entropy"
    if cfg.criterion._name.startswith(name):
        smoothing = cfg.criterion.label_smoothing
        parts["criterion"] = {"_name": name, "label_smoothing": smoothing}
    return parts


def _table_of_experts(usage: Dict[str, Usage], needs: Dict[str, List[float]], base: float) -> str:
    rows = [["layer", "expert", "load", "bits more without it"]]
    for name, each in usage.items():
        for expert, share in enumerate(each.shares.tolist()):
            more = f"{needs[name][expert] - base:+.4f}" if needs else "-"
            rows.append([name, str(expert), f"{share:.1%}", more])
    return format_table(rows)


def _table_of_steps(steps: List[Dict[str, Any]]) -> str:
    rows = [["model", "experts", "parameters", "MB", "bits", "BLEU", "pieces/s"]]
    for step in steps:
        sizes = [str(step["experts"]), f"{step['parameters']:,}", f"{step['megabytes']:.1f}"]
        figures = [f"{step['bits']:.3f}", f"{step['bleu']:.2f}", f"{step['pieces_per_second']:.0f}"]
        rows.append([step["model"], *sizes, *figures])
    return format_table(rows)
