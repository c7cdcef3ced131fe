"""The gradient laboratory against autograd, against itself, and on a trained model."""

import json

import pytest
import torch

from fairseq_sparsemixer import cli
from fairseq_sparsemixer.evaluation.translator import Translator
from fairseq_sparsemixer.laboratory import checkpoint, gradients, toys
from fairseq_sparsemixer.laboratory.estimators import (
    ESTIMATORS,
    NO_MASK,
    draw_gradients,
    target_gradient,
    target_probs,
)
from fairseq_sparsemixer.laboratory.measures import measure
from fairseq_sparsemixer.moe import build_router

pytestmark = pytest.mark.usefixtures("one_thread")


def quadratic(h_MD, row_M):
    """f(h) = h . a + (h . b)^2, and its gradient by hand."""
    a, b = torch.linspace(-1, 1, h_MD.shape[1]), torch.linspace(1, 0, h_MD.shape[1])
    along = h_MD @ b
    return h_MD @ a + along**2, a + 2 * along.unsqueeze(-1) * b


def problem(rows=5, num_experts=3, seed=0):
    made = toys.toy_problem("quadratic", num_experts, 1.0, seed=seed, rows=rows)
    made.loss = quadratic
    return made


def test_exact_gradient_equals_autograd_of_the_expected_loss():
    made = problem()
    z = made.logits.clone().requires_grad_()
    p = z.softmax(-1)
    h = p.unsqueeze(-1) * made.outputs
    losses = quadratic(h.flatten(0, 1), None)[0].view(p.shape)
    (expected,) = torch.autograd.grad((p * losses).sum(), z)
    actual = made.exact_gradient(made.logits.softmax(-1))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_exact_gradient_of_a_masked_softmax_leaves_masked_experts_alone():
    made = problem(num_experts=6)
    masked = target_probs(made, ESTIMATORS["sparsemixer"], 0.1)
    assert (masked == 0).any()
    exact = made.exact_gradient(masked)
    assert (exact[masked == 0] == 0).all()


@pytest.mark.parametrize("eps", [0.1, NO_MASK])
def test_exact_gradient_of_a_gate_of_all_experts_equals_autograd(eps):
    made = problem(num_experts=6)
    estimator = ESTIMATORS["sparsemixer, full gate"]
    kept = target_probs(made, estimator, eps) > 0
    assert kept.all() == (eps == NO_MASK)
    z = made.logits.clone().requires_grad_()
    q = z.masked_fill(~kept, float("-inf")).softmax(-1)
    h = z.softmax(-1).unsqueeze(-1) * made.outputs
    losses = quadratic(h.flatten(0, 1), None)[0].view(q.shape)
    (expected,) = torch.autograd.grad((q * losses).sum(), z)
    actual = target_gradient(made, estimator, eps)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("eps", [0.4, NO_MASK])
def test_the_full_gate_is_found_unbiased_on_a_quadratic(eps):
    torch.manual_seed(0)
    made = problem(rows=8, num_experts=4)
    for name, biased in (
        ("sparsemixer, full gate, no override", False),
        ("sparsemixer-1st, full gate", True),
    ):
        exact = target_gradient(made, ESTIMATORS[name], eps)
        found = measure(draw_gradients(made, ESTIMATORS[name], eps, draws=4000), exact)
        assert (found.bias > 0.05) == biased, (name, found)


@pytest.mark.parametrize(
    "name",
    [
        "reinforce",
        "sparsemixer, no override",
        "sparsemixer-v2-star, no override",
        "reinmax (dense)",
    ],
)
def test_unbiased_estimators_are_found_unbiased_on_a_quadratic(name):
    torch.manual_seed(0)
    made = problem(rows=8)
    exact = made.exact_gradient(made.logits.softmax(-1))
    found = measure(draw_gradients(made, ESTIMATORS[name], NO_MASK, draws=4000), exact)
    assert found.bias < 0.05
    assert found.cosine > 0.998
    assert abs(found.length - 1) < 0.05


def test_first_order_estimators_are_found_biased_on_a_quadratic():
    torch.manual_seed(0)
    made = problem(rows=8)
    exact = made.exact_gradient(made.logits.softmax(-1))
    for name in ("sparsemixer-1st", "backprop, sampled", "straight-through (dense)"):
        found = measure(draw_gradients(made, ESTIMATORS[name], NO_MASK, draws=4000), exact)
        assert found.bias > 0.1, name


def test_a_single_draw_is_backpropagation_through_the_router():
    """The arg-max router has one draw: its gradient by autograd through f itself."""
    made = problem()
    (draw,) = draw_gradients(made, ESTIMATORS["switch (arg-max)"], NO_MASK).unbind(1)
    z = made.logits.clone().requires_grad_()
    p = z.softmax(-1)
    best = p.argmax(-1, keepdim=True)
    gate = p.gather(-1, best)
    h = gate * made.outputs[torch.arange(len(z)), best.squeeze(-1)]
    (expected,) = torch.autograd.grad(quadratic(h, None)[0].sum(), z)
    torch.testing.assert_close(draw, expected, rtol=1e-4, atol=1e-5)


def test_every_h_is_evaluated_once():
    made = problem()
    seen = []

    def counting(h_MD, row_M):
        seen.append(len(h_MD))
        return quadratic(h_MD, row_M)

    made.loss = counting
    draw_gradients(made, ESTIMATORS["sparsemixer-1st"], NO_MASK, draws=500)
    assert sum(seen) <= 5 * 3
    draw_gradients(made, ESTIMATORS["sparsemixer, no override"], NO_MASK, draws=500)
    assert sum(seen) <= 2 * 5 * 3


def test_measures_of_known_draws():
    torch.manual_seed(0)
    exact = torch.tensor([[3.0, -3.0], [4.0, -4.0]])  # length sqrt(50)
    offset = torch.tensor([[1.0, 1.0], [0.0, 0.0]])  # orthogonal to it, length sqrt(2)
    draws = exact.unsqueeze(1) * 0.5 + offset.unsqueeze(1) + 0.5 * torch.randn(2, 20_000, 2)
    found = measure(draws, exact)
    assert found.length == pytest.approx(0.5, abs=0.01)
    assert found.bias == pytest.approx((0.25 + 2 / 50) ** 0.5, abs=0.01)
    assert found.noise == pytest.approx((4 * 0.25 / 50) ** 0.5, abs=0.01)
    assert found.rmse == pytest.approx((found.bias**2 + found.noise**2) ** 0.5, abs=1e-6)
    assert found.cosine == pytest.approx(0.5 / (0.25 + 2 / 50) ** 0.5, abs=0.01)


def test_noise_of_few_draws_is_not_taken_for_bias():
    torch.manual_seed(0)
    exact = torch.randn(500, 4)
    draws = exact.unsqueeze(1) + 3 * torch.randn(500, 8, 4)
    found = measure(draws, exact, inputs_RD=torch.randn(500, 6))
    assert found.bias < 0.2
    assert found.cosine > 0.97
    assert 0 < found.batch_cosine < 0.9


def test_without_a_choice_there_is_nothing_to_measure():
    made = problem(num_experts=1)
    exact = made.exact_gradient(made.logits.softmax(-1))
    draws = draw_gradients(made, ESTIMATORS["sparsemixer"], NO_MASK, draws=5)
    assert set(measure(draws, exact)) == {None}


def test_order_of_accuracy():
    slopes = toys.slopes(list(gradients.SCALES), toys.order_of_accuracy(list(gradients.SCALES)))
    assert slopes["sparsemixer-1st"] == pytest.approx(1, abs=0.2)
    assert slopes["sparsemixer"] == pytest.approx(2, abs=0.2)
    assert slopes["sparsemixer-v2-star"] == pytest.approx(3, abs=0.2)


# A trained model


def sentences_of(translator, corpus, count=6):
    pairs = []
    lines = [(corpus / "raw" / f"valid.{lang}").read_text().splitlines() for lang in ("en", "de")]
    for source, target in list(zip(*lines))[:count]:
        pairs.append(translator.encode_pair(source, target))
    dictionary = translator.target_dictionary
    return checkpoint.Sentences(translator.model, pairs, dictionary.pad(), dictionary.eos())


@pytest.mark.parametrize(
    ("layer_name", "gate"),
    [("encoder.0", "masked"), ("decoder.0", "masked"), ("encoder.0", "full")],
)
def test_a_problem_holds_the_loss_of_the_model_itself(
    layer_name, gate, corpus, run_dir, monkeypatch
):
    monkeypatch.setattr(checkpoint, "TOKENS_AT_ONCE", 60)  # several batches
    translator = Translator(str(run_dir))
    for each in checkpoint.switch_layers(translator.model).values():
        each.moe.router.gate = gate
    sentences = sentences_of(translator, corpus)
    layer = checkpoint.switch_layers(translator.model)[layer_name]
    generator = torch.Generator().manual_seed(0)
    places = checkpoint.draw_places(sentences.pairs, layer_name.split(".")[0], 8, generator)
    assert len(set(places)) == 8
    made = checkpoint.build_problem(sentences, sentences, layer, places)
    # The evaluation-mode routing is the arg-max with the model's own gate.
    router = layer.moe.router
    routing = router.eval().route(made.logits)
    weights = torch.zeros_like(made.logits).scatter(-1, routing.expert_index, routing.gate)
    rows = torch.arange(len(places))
    at_h = made.evaluate(rows, weights, torch.zeros_like(weights))
    with torch.no_grad():
        plain = torch.cat([sentences.losses([place.sentence]) for place in places])
    torch.testing.assert_close(at_h.loss, plain, rtol=1e-4, atol=1e-4)
    # Slopes against finite differences along the chosen expert's output.
    step = 1e-2
    moved = [
        made.evaluate(rows, weights * (1 + sign * step), torch.zeros_like(weights)).loss
        for sign in (1, -1)
    ]
    expected = (moved[0] - moved[1]) / (2 * step)
    actual = (at_h.expert_slope * weights).sum(-1)
    torch.testing.assert_close(actual, expected, rtol=0.05, atol=2e-3)


@pytest.mark.parametrize("layer_name", ["encoder.0", "decoder.0"])
def test_other_tokens_and_layers_keep_their_experts(layer_name, corpus, run_dir):
    translator = Translator(str(run_dir))
    sentences = sentences_of(translator, corpus)
    layers = checkpoint.switch_layers(translator.model)
    seen = {name: [] for name in layers}

    def note(name):
        return lambda _, __, output: seen[name].append(output[1].expert_index.clone())

    for name, layer in layers.items():
        layer.moe.register_forward_hook(note(name))
    generator = torch.Generator().manual_seed(0)
    places = checkpoint.draw_places(sentences.pairs, layer_name.split(".")[0], 1, generator)
    loss = checkpoint._sentence_loss(sentences, layers[layer_name], places)
    width = translator.model.encoder.embed_tokens.embedding_dim
    nothing, much = torch.zeros(1, width), 100 * torch.randn(1, width, generator=generator)
    values = [loss(h, torch.tensor([0]))[0] for h in (nothing, much)]
    assert not torch.allclose(*values)
    for first, second in seen.values():
        assert torch.equal(first, second)


def test_models_that_do_not_put_out_one_gated_expert_are_refused(corpus, own_run, capsys):
    state = torch.load(own_run / "checkpoint_best.pt")
    state["cfg"]["model"].update(router="hash")
    for name in list(state["model"]):
        if ".router." in name:
            del state["model"][name]
    torch.save(state, own_run / "hash.pt")
    command = ["gradients", str(own_run), "--data", str(corpus), "--checkpoint", "hash.pt"]
    assert cli.main(command) == 2
    assert "--top-k 1; not hash" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("router", "options", "measured"),
    [
        ("sparsemixer", {"gate": "full"}, True),
        ("composed", {"choice": "argmax", "gate": "masked", "estimator": "grad-1"}, True),
        ("composed", {"gate": "one"}, False),
        ("hash", {}, False),
        ("hash", {"gate": "full"}, False),  # for which a problem would need token ids
        ("default-moe", {}, False),
    ],
)
def test_which_layers_put_out_one_gated_expert(router, options, measured):
    built = build_router(router, embed_dim=4, num_experts=3, **options)
    assert gradients._gates_one_expert(built) == measured


@pytest.mark.parametrize(
    ("jitter_eps", "masks"), [(0.1, [NO_MASK, 0.1]), (0.0, [NO_MASK]), (NO_MASK, [NO_MASK])]
)
def test_a_mask_is_measured_where_there_is_one(jitter_eps, masks):
    assert gradients.masks(jitter_eps) == masks


def test_predictions_are_fitted_on_the_tokens_of_each_expert(corpus, run_dir):
    translator = Translator(str(run_dir))
    sentences = sentences_of(translator, corpus, count=20)
    layer = checkpoint.switch_layers(translator.model)["encoder.0"]
    places = checkpoint.draw_places(sentences.pairs, "encoder", 30, torch.Generator())
    made = checkpoint.build_problem(sentences, sentences, layer, places)
    spread = made.outputs.square().sum()

    def explained(name):
        return 1 - (made.outputs - made.predictions[name]).square().sum() / spread

    assert set(made.predictions) == {"mean", "token mean", "linear"}
    chosen = layer.moe.router.eval().route(made.logits).expert_index[:, 0]
    own = torch.arange(len(chosen))
    errors = (made.outputs - made.predictions["linear"])[own, chosen]
    assert errors.norm() < 0.7 * made.outputs[own, chosen].norm()
    assert explained("linear") > explained("mean")


def test_the_command_measures_a_model_and_goes_on_where_it_stopped(
    corpus, run_dir, tmp_path, capsys, monkeypatch
):
    command = [
        "gradients", str(run_dir), "--data", str(corpus), "--tokens", "6", "--fit-sentences", "30",
        "--checkpoint", "checkpoint_best.pt,checkpoint_last.pt", "--output", str(tmp_path),
    ]  # fmt: skip
    measured = gradients._measure_layer
    calls = []

    def stop_at_the_third(*args):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(args[1])
        return measured(*args)

    monkeypatch.setattr(gradients, "_measure_layer", stop_at_the_third)
    assert cli.main(command) == 130
    assert len(json.loads((tmp_path / "gradients.json").read_text())["cases"]) == 2
    monkeypatch.setattr(gradients, "_measure_layer", measured)
    assert cli.main(command) == 0
    cases = json.loads((tmp_path / "gradients.json").read_text())["cases"]
    assert len(cases) == 4
    assert [name.split()[-1] for name in cases] == 2 * ["encoder.0", "decoder.0"]
    for records in cases.values():
        names = [r["estimator"] for r in records if r["mask"] is None]
        assert {name for name, e in ESTIMATORS.items() if not e.continuous} < set(names)
        measured = [r for r in records if r["tokens_with_choice"] > 0]
        assert all(r["rmse"] >= r["bias"] >= 0 for r in measured)
        assert all(-1 <= r["batch_cosine"] <= 1 for r in measured)
        without = [r for r in records if r["tokens_with_choice"] == 0]
        # The gate of all experts has a gradient where there is no choice.
        assert all((r["cosine"] is None) != ("full gate" in r["estimator"]) for r in without)
    out = capsys.readouterr().out
    assert "mask of jitter-eps 0.1" in out
    for name in ("layers-all-experts", "layers-masked", "progress-all-experts"):
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000
        assert "</svg>" in (tmp_path / f"{name}.svg").read_text()
    # Other settings do not mix with these.
    assert cli.main([*command, "--seed", "2"]) == 2
    assert "other settings" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--data=x", "--layers=encoder.0", "--tokens=100"])
def test_flags_of_a_model_go_with_a_model(flag, tmp_path, capsys):
    assert cli.main(["gradients", flag, "--output", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert f"{flag.split('=')[0]}: such flags go with a model, and no RUN_DIR is given" in said
    assert not (tmp_path / "out").exists()


def test_the_command_without_a_model(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gradients, "TOY_EXPERTS", (2, 4))
    monkeypatch.setattr(gradients, "TOY_TEMPERATURES", (1.0,))
    monkeypatch.setattr(toys, "LOSSES", ("network",))
    assert cli.main(["gradients", "--output", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "Order of accuracy" in out
    assert (tmp_path / "exact.png").stat().st_size > 10_000
    records = json.loads((tmp_path / "gradients.json").read_text())["cases"]
    means_equal = records["network, 4 experts, temperature 1, experts with the same mean"]
    assert len(means_equal) == len(ESTIMATORS)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--layers", "encoder.7"], "the layers with experts are encoder.0, decoder.0"),
        (["--tokens", "0"], "--tokens must be at least 1"),
        (["--subset", "nowhere"], "name a prepared corpus with --data"),
        (["--max-length", "1"], "no sentence of"),
        (["--checkpoint", "checkpoint_7.pt"], "there is no checkpoint"),
    ],
)
def test_bad_flags(flags, message, corpus, run_dir, tmp_path, capsys):
    command = ["gradients", str(run_dir), "--data", str(corpus), "--output", str(tmp_path), *flags]
    assert cli.main(command) == 2
    assert message in capsys.readouterr().err
