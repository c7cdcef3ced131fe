"""How good are the routers' gradients? Estimators against the exact one, every expert computed."""

import argparse
import functools
import json
import time
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Tuple

import torch

from fairseq_sparsemixer.errors import UserError
from fairseq_sparsemixer.files import check_writable, read_lines, write_json, write_lines

Record = Dict[str, Any]

TOY_EXPERTS = (2, 4, 8)
TOY_TEMPERATURES = (0.5, 1.0, 2.0)
SCALES = (1 / 4, 1 / 8, 1 / 16, 1 / 32)


def run(args: argparse.Namespace) -> None:
    """Measure, write, print."""
    from fairseq_sparsemixer.laboratory import plots, tables

    for flag in ("tokens", "fit_sentences", "max_length"):
        if getattr(args, flag) < 1:
            raise UserError(f"--{flag.replace('_', '-')} must be at least 1")
    with_model = args.run_dir is not None
    if with_model:
        run_dir = Path(args.run_dir)
        output = args.output or (run_dir if run_dir.is_dir() else run_dir.parent) / "gradients"
        names = ("subset", "tokens", "fit_sentences", "max_length", "seed")
        settings = {name: getattr(args, name) for name in names}
        settings["run_dir"] = str(run_dir.resolve())
        settings["data"] = str(args.data.resolve()) if args.data else None
        cases = _checkpoint_cases(args)
    else:
        output = args.output or Path("gradients")
        settings = {"seed": args.seed}
        cases = _toy_cases(args.seed)
    path = output / "gradients.json"
    check_writable(path)
    results = _read_results(path, settings)
    for name, measure_case in cases:
        if name in results["cases"]:
            continue
        started = time.monotonic()
        results["cases"][name] = measure_case()
        write_json(path, results)
        print(f"{name}: {time.monotonic() - started:.0f} s", flush=True)
    records = [record for case in results["cases"].values() for record in case]
    text = tables.model_tables(records) if with_model else tables.toy_tables(records)
    print(f"\n{text}")
    written = [path, output / "gradients.md"]
    write_lines(written[1], [text])
    draw = plots.model_figures if with_model else plots.toy_figures
    try:
        written += draw(records, output)
    except ImportError:
        print("no figures: install matplotlib (pip install 'fairseq-sparsemixer[report]')")
    print("written: " + ", ".join(str(name) for name in written))


def _read_results(path: Path, settings: Dict[str, Any]) -> Dict[str, Any]:
    """What an earlier run with the same settings has measured."""
    if not path.is_file():
        return {"settings": settings, "cases": {}}
    results = json.loads(path.read_text(encoding="utf-8"))
    if results["settings"] != settings:
        raise UserError(
            f"{path} was measured with other settings: remove it, or name another folder with "
            "--output"
        )
    return results


def measure_all(
    problem: Any, estimators: Dict[str, Any], jitter_eps: float, seed: int
) -> List[Record]:
    """One record for each of some estimators.

    Args:
        problem: a :class:`~fairseq_sparsemixer.laboratory.problems.Problem`.
        estimators: by name.
        jitter_eps: of the mask.
        seed: of the draws, the same for each estimator.
    """
    from fairseq_sparsemixer.laboratory import estimators as lab
    from fairseq_sparsemixer.laboratory.measures import as_dict, measure

    records = []
    for name, estimator in estimators.items():
        torch.manual_seed(seed)
        exact = problem.exact_gradient(lab.target_probs(problem, estimator, jitter_eps))
        draws = lab.draw_gradients(problem, estimator, jitter_eps)
        records.append({"estimator": name, **as_dict(measure(draws, exact, problem.inputs))})
    return records


Case = Tuple[str, Callable[[], List[Record]]]


def _toy_cases(seed: int) -> Iterator[Case]:
    from fairseq_sparsemixer.laboratory import toys
    from fairseq_sparsemixer.laboratory.estimators import ESTIMATORS, NO_MASK

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
                records = measure_all(problem, ESTIMATORS, NO_MASK, seed)
                return [{**about, **record} for record in records]

            means = "" if mean_to_spread else ", experts with the same mean"
            yield f"{kind}, {num_experts} experts, temperature {temperature:g}{means}", case


def _checkpoint_cases(args: argparse.Namespace) -> Iterator[Case]:
    from fairseq_sparsemixer.evaluation.translator import Translator
    from fairseq_sparsemixer.models.layers import switch_layers

    for name in args.checkpoint.split(","):
        translator = Translator(args.run_dir, name, data=args.data)
        layers = switch_layers(translator.model)
        wanted = args.layers.split(",") if args.layers else list(layers)
        for layer_name in wanted:
            if layer_name not in layers:
                raise UserError(
                    f"--layers {layer_name}: the layers with experts are {', '.join(layers)}"
                )
        router = next(iter(layers.values())).moe.router if layers else None
        if router is None or not _gates_one_expert(router):
            raise UserError(
                f"{args.run_dir}: gradients are measured for models whose layers put out one "
                "expert's output times its probability (--top-k 1; not hash, random, default-moe "
                "or expert-choice)"
            )
        updates = translator.checkpoints[0].updates
        # Read and routed once, when the first layer is measured.
        sentences = functools.lru_cache(functools.partial(_read_sentences, translator, args))
        for layer_name in wanted:

            def case(
                sentences: Callable = sentences,
                layer_name: str = layer_name,
                updates: int = updates,
                name: str = name,
            ) -> List[Record]:
                about = {"checkpoint": name, "updates": updates, "layer": layer_name}
                return _measure_layer(sentences(), layer_name, about, args)

            yield f"{name} ({updates} updates), {layer_name}", case


def _gates_one_expert(router: Any) -> bool:
    """Whether the layer computes p_D E_D in evaluation, with learnt logits."""
    one = router.top_k == 1 and router.causal and router.weight is not None
    return one and router.name != "default-moe"


def _measure_layer(
    sentences_and_fit: Any, layer_name: str, about: Dict[str, Any], args: argparse.Namespace
) -> List[Record]:
    """Without the mask, and with the one that the model was trained with."""
    from fairseq_sparsemixer.laboratory import checkpoint as lab
    from fairseq_sparsemixer.laboratory.estimators import (
        ESTIMATORS,
        NO_MASK,
        target_probs,
        with_other_predictions,
    )
    from fairseq_sparsemixer.models.layers import switch_layers

    sentences, fit = sentences_and_fit
    layer = switch_layers(sentences.model)[layer_name]
    generator = torch.Generator().manual_seed(args.seed)
    places = lab.draw_places(sentences.pairs, layer_name.split(".")[0], args.tokens, generator)
    problem = lab.build_problem(sentences, fit, layer, places)
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
    for jitter_eps in (NO_MASK, layer.moe.router.jitter_eps):
        masked = jitter_eps != NO_MASK
        probs = target_probs(problem, ESTIMATORS["sparsemixer"], jitter_eps)
        choice = round((probs > 0).sum(-1).gt(1).float().mean().item(), 4)
        estimators = {
            name: estimator
            for name, estimator in with_other_predictions(problem).items()
            if not estimator.continuous and (estimator.uses_mask or not masked)
        }
        for record in measure_all(problem, estimators, jitter_eps, args.seed):
            mask = {"mask": jitter_eps if masked else None, "tokens_with_choice": choice}
            records.append({**about, **mask, **record})
    return records


def _read_sentences(translator: Any, args: argparse.Namespace) -> List[Any]:
    """:class:`Sentences` that tokens are drawn from, and others that predictions are fitted on."""
    from fairseq_sparsemixer.laboratory.checkpoint import Sentences

    return [
        Sentences(
            translator.model,
            _read_pairs(translator, subset, count, args),
            translator.target_dictionary.pad(),
            translator.target_dictionary.eos(),
        )
        # As many sentences as tokens: about one token of each is drawn.
        for subset, count in ((args.subset, args.tokens), ("train", args.fit_sentences))
    ]


def _read_pairs(translator: Any, subset: str, count: int, args: argparse.Namespace) -> List[Any]:
    """``count`` sentence pairs, not longer than --max-length, drawn by the seed."""
    from fairseq_sparsemixer.corpora.folder import raw_path
    from fairseq_sparsemixer.laboratory.checkpoint import Pair

    corpus = args.data or translator.trained_on.parent
    paths = [
        raw_path(corpus, subset, language)
        for language in (translator.source_lang, translator.target_lang)
    ]
    for path in paths:
        if not path.is_file():
            raise UserError(f"there is no {path}; name a prepared corpus with --data")
    lines = list(zip(*map(read_lines, paths)))
    generator = torch.Generator().manual_seed(args.seed)
    pairs = []
    for place in torch.randperm(len(lines), generator=generator).tolist():
        pair = Pair(*translator.encode_pair(*lines[place]))
        if max(map(len, pair)) <= args.max_length:
            pairs.append(pair)
        if len(pairs) == count:
            break
    if not pairs:
        raise UserError(f"no sentence of {paths[0]} fits --max-length {args.max_length}")
    return pairs
