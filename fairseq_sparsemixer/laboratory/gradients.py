"""How good are the routers' gradients? Estimators against the exact one, every expert computed."""

import functools
import time
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, Iterator, List, NamedTuple, Optional, Tuple

import torch

from fairseq_sparsemixer.corpora.folder import raw_path, unchanged
from fairseq_sparsemixer.errors import UserError
from fairseq_sparsemixer.evaluation.translator import Translator
from fairseq_sparsemixer.files import check_writable, read_json, read_lines, write_json, write_lines
from fairseq_sparsemixer.laboratory import plots, tables, toys
from fairseq_sparsemixer.laboratory.checkpoint import Sentences, build_problem, draw_places
from fairseq_sparsemixer.laboratory.estimators import (
    ESTIMATORS,
    NO_MASK,
    Estimator,
    draw_gradients,
    target_gradient,
    target_probs,
    with_other_predictions,
)
from fairseq_sparsemixer.laboratory.measures import as_dict, measure
from fairseq_sparsemixer.laboratory.problems import Problem
from fairseq_sparsemixer.laboratory.tables import Record
from fairseq_sparsemixer.locks import in_turn
from fairseq_sparsemixer.models.layers import switch_layers
from fairseq_sparsemixer.models.teacher_forcing import EncodedPair
from fairseq_sparsemixer.moe import Router
from fairseq_sparsemixer.moe.routers.sparsemixer import LEAST_JITTER

RESULTS = "gradients.json"
TOY_EXPERTS = (2, 4, 8)
TOY_TEMPERATURES = (0.5, 1.0, 2.0)
SCALES = (1 / 4, 1 / 8, 1 / 16, 1 / 32)

Case = Tuple[str, Callable[[], List[Record]]]
"""A name, and what measures it."""


class Sample(NamedTuple):
    """The tokens of a corpus that a model is measured on.

    Attributes:
        subset: ``raw/SUBSET.*`` of the corpus.
        tokens: in each layer.
        fit_sentences: of the training set, for the predictions.
        max_length: of a sentence, in pieces.
        seed: of all draws.
    """

    subset: str
    tokens: int
    fit_sentences: int
    max_length: int
    seed: int


def measure_toys(seed: int, output: Path) -> None:
    """Measure the problems with a formula; write into ``output``, print.

    Raises:
        UserError: ``output`` holds other results, or cannot be written to.
    """
    check_writable(output / RESULTS)
    with in_turn(output):
        records = _measure_cases(_toy_cases(seed), {"seed": seed}, output)
        _show(records, output, tables.toy_tables, plots.toy_figures)


def measure_model(
    run_dir: str,
    checkpoints: List[str],
    data: Optional[Path],
    layers: Optional[List[str]],
    sample: Sample,
    output: Path,
) -> None:
    """Measure the layers of a trained model; write into ``output``, print.

    Args:
        run_dir: a run folder, or a checkpoint file.
        checkpoints: names in the run folder.
        data: prepared corpus; None for the one that the model was trained on.
        layers: names such as ``encoder.0``; None for all.
        sample: which tokens.
        output: a folder; what it holds of the same measurements is not measured again.

    Raises:
        UserError: ``output`` holds other results, there is no such checkpoint, layer or corpus, or
            the model's layers do not put out one expert's output times its probability.
    """
    settings = {
        **sample._asdict(),
        "run_dir": str(Path(run_dir).resolve()),
        "data": str(data.resolve()) if data else None,
    }
    cases = _model_cases(run_dir, checkpoints, data, layers, sample)
    check_writable(output / RESULTS)
    with in_turn(output):
        records = _measure_cases(cases, settings, output)
        _show(records, output, tables.model_tables, plots.model_figures)


def _measure_cases(cases: Iterable[Case], settings: Dict[str, Any], output: Path) -> List[Record]:
    """The records of all cases; those that were measured before are read."""
    path = output / RESULTS
    results = _read_results(path, settings)
    for name, measure_case in cases:
        if results["cases"].get(name):
            continue
        started = time.monotonic()
        results["cases"][name] = measure_case()
        write_json(path, results)
        print(f"{name}: {time.monotonic() - started:.0f} s", flush=True)
    return [record for case in results["cases"].values() for record in case]


def _read_results(path: Path, settings: Dict[str, Any]) -> Dict[str, Any]:
    """What an earlier run with the same settings has measured."""
    if not path.is_file():
        return {"settings": settings, "cases": {}}
    cure = "remove it, or name another folder with --output"
    results = read_json(path, {"settings": dict, "cases": {str: [tables.RECORD]}}, cure)
    if results["settings"] != settings:
        raise UserError(
            f"{path} was measured with other settings: remove it, or name another folder with "
            "--output"
        )
    return results


def _show(
    records: List[Record],
    output: Path,
    as_text: Callable[[List[Record]], str],
    draw: Callable[[List[Record], Path], List[Path]],
) -> None:
    """Print and write the tables, and draw the figures where matplotlib is installed."""
    text = as_text(records)
    print(f"\n{text}")
    written = [output / RESULTS, output / "gradients.md"]
    write_lines(written[1], [text])
    try:
        written += draw(records, output)
    except ImportError:
        print("no figures: install matplotlib (pip install 'fairseq-sparsemixer[report]')")
    print("written: " + ", ".join(str(name) for name in written))


def _measure_all(
    problem: Problem, estimators: Dict[str, Estimator], jitter_eps: float, seed: int
) -> List[Record]:
    """One record for each of some estimators.

    Args:
        problem: the tokens.
        estimators: by name.
        jitter_eps: of the mask.
        seed: of the draws, the same for each estimator.
    """
    records = []
    for name, estimator in estimators.items():
        torch.manual_seed(seed)
        exact = target_gradient(problem, estimator, jitter_eps)
        draws = draw_gradients(problem, estimator, jitter_eps)
        records.append({"estimator": name, **as_dict(measure(draws, exact, problem.inputs))})
    return records


def _toy_cases(seed: int) -> Iterator[Case]:
    def order() -> List[Record]:
        bias = toys.order_of_accuracy(list(SCALES), seed=seed)
        slopes = toys.slopes(list(SCALES), bias)
        return [
            {"kind": "order", "estimator": name, "scales": SCALES, "bias": bias[name], "slope": s}
            for name, s in slopes.items()
        ]

    yield "order of accuracy", order
    shapes = [(n, t, 1.5) for n in TOY_EXPERTS for t in TOY_TEMPERATURES] + [(4, 1.0, 0.0)]
    for kind in toys.LOSSES:
        for num_experts, temperature, mean_to_spread in shapes:
            about = {
                "kind": kind,
                "num_experts": num_experts,
                "temperature": temperature,
                "mean_to_spread": mean_to_spread,
            }

            def case(about: Dict[str, Any] = about) -> List[Record]:
                problem = toys.toy_problem(seed=seed, **about)
                records = _measure_all(problem, ESTIMATORS, NO_MASK, seed)
                return [{**about, **record} for record in records]

            means = "" if mean_to_spread else ", experts with the same mean"
            yield f"{kind}, {num_experts} experts, temperature {temperature:g}{means}", case


def _model_cases(
    run_dir: str,
    checkpoints: List[str],
    data: Optional[Path],
    layers: Optional[List[str]],
    sample: Sample,
) -> Iterator[Case]:
    for name in checkpoints:
        translator = Translator(run_dir, name, data=data)
        wanted = _check_layers(translator, layers, run_dir)
        updates = translator.checkpoints[0].updates
        corpus = data or translator.trained_on.parent
        # Read and routed once, when the first layer is measured.
        sentences = functools.lru_cache(
            functools.partial(_read_sentences, translator, corpus, sample)
        )
        for layer_name in wanted:

            def case(
                sentences: Callable = sentences,
                layer_name: str = layer_name,
                updates: int = updates,
                name: str = name,
            ) -> List[Record]:
                about = {"checkpoint": name, "updates": updates, "layer": layer_name}
                return _measure_layer(sentences(), layer_name, about, sample)

            yield f"{name} ({updates} updates), {layer_name}", case


def _check_layers(translator: Translator, wanted: Optional[List[str]], run_dir: str) -> List[str]:
    """The names of the layers to measure: those that are ``wanted``, or all.

    Raises:
        UserError: there is no such layer, or none that can be measured.
    """
    layers = switch_layers(translator.model)
    for name in wanted or []:
        if name not in layers:
            raise UserError(f"--layers {name}: the layers with experts are {', '.join(layers)}")
    if not layers or not _gates_one_expert(next(iter(layers.values())).moe.router):
        raise UserError(
            f"{run_dir}: gradients are measured for models whose layers put out one "
            "expert's output times its probability (--top-k 1; not hash, random, default-moe, "
            "expert-choice or a gate of 1)"
        )
    return wanted or list(layers)


def _gates_one_expert(router: Router) -> bool:
    """Whether the layer computes p_D E_D in evaluation, with learnt logits."""
    one = router.top_k == 1 and router.causal and not router.needs_token_ids
    gated = router.weight is not None and getattr(router, "gate", None) != "one"
    return one and gated and not router.adds_means


def masks(jitter_eps: float) -> List[float]:
    """Those that a model is measured with: none, and its own if it has one."""
    return [NO_MASK, *([jitter_eps] if LEAST_JITTER <= jitter_eps < NO_MASK else [])]


def _measure_layer(
    sentences_and_fit: List[Sentences], layer_name: str, about: Dict[str, Any], sample: Sample
) -> List[Record]:
    """With each of the :func:`masks`."""
    sentences, fit = sentences_and_fit
    layer = switch_layers(sentences.model)[layer_name]
    generator = torch.Generator().manual_seed(sample.seed)
    places = draw_places(sentences.pairs, layer_name.split(".")[0], sample.tokens, generator)
    problem = build_problem(sentences, fit, layer, places)
    spread = problem.outputs.square().sum()
    about = {
        **about,
        "tokens": len(places),
        "explained": {
            name: round(1 - ((problem.outputs - value).square().sum() / spread).item(), 4)
            for name, value in problem.predictions.items()
        },
    }
    records = []
    for jitter_eps in masks(layer.moe.router.jitter_eps):
        masked = jitter_eps != NO_MASK
        probs = target_probs(problem, ESTIMATORS["sparsemixer"], jitter_eps)
        choice = round((probs > 0).sum(-1).gt(1).float().mean().item(), 4)
        estimators = {
            name: estimator
            for name, estimator in with_other_predictions(problem).items()
            if not estimator.continuous and (estimator.uses_mask or not masked)
        }
        for record in _measure_all(problem, estimators, jitter_eps, sample.seed):
            mask = {"mask": jitter_eps if masked else None, "tokens_with_choice": choice}
            records.append({**about, **mask, **record})
    return records


def _read_sentences(translator: Translator, corpus: Path, sample: Sample) -> List[Sentences]:
    """Those that tokens are drawn from, and others that predictions are fitted on."""
    return [
        Sentences(
            translator.model,
            _read_pairs(translator, corpus, subset, count, sample),
            translator.target_dictionary.pad(),
            translator.target_dictionary.eos(),
        )
        # As many sentences as tokens: about one token of each is drawn.
        for subset, count in ((sample.subset, sample.tokens), ("train", sample.fit_sentences))
    ]


def _read_pairs(
    translator: Translator, corpus: Path, subset: str, count: int, sample: Sample
) -> List[EncodedPair]:
    """``count`` sentence pairs, not longer than --max-length, drawn by the seed."""
    paths = [raw_path(corpus, subset, ending) for ending in translator.endings]
    for path in paths:
        if not path.is_file():
            raise UserError(f"there is no {path}; name a prepared corpus with --data")
    with unchanged(corpus):
        lines = list(zip(*map(read_lines, paths)))
    generator = torch.Generator().manual_seed(sample.seed)
    pairs: List[EncodedPair] = []
    for place in torch.randperm(len(lines), generator=generator).tolist():
        pair = translator.encode_pair(*lines[place])
        if max(map(len, pair)) <= sample.max_length:
            pairs.append(pair)
        if len(pairs) == count:
            break
    if not pairs:
        raise UserError(f"no sentence of {paths[0]} fits --max-length {sample.max_length}")
    return pairs
