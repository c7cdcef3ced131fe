"""What experts are worth, models of fewer experts, and dense ones."""

import json

import pytest
import torch
from fairseq import models, tasks
from support import small_run
from support.commands import PACKAGE, command, hypotheses, load
from support.models import build

from fairseq_sparsemixer import cli
from fairseq_sparsemixer.conversion.smaller import as_dense, keep_experts, scale_outputs
from fairseq_sparsemixer.conversion.usage import TextLoss, Usage
from fairseq_sparsemixer.errors import UserError
from fairseq_sparsemixer.evaluation.translator import Translator
from fairseq_sparsemixer.files import read_lines
from fairseq_sparsemixer.models.layers import switch_layers
from fairseq_sparsemixer.models.teacher_forcing import EncodedPair
from fairseq_sparsemixer.moe import MoEFeedForward

pytestmark = pytest.mark.usefixtures("one_thread")

PAD, EOS = 1, 2


def layer(router, **options):
    torch.manual_seed(0)
    made = MoEFeedForward(8, 12, 5, router=router, **options).eval()
    for name, value in made.named_buffers():
        if name.endswith("bias"):  # of the balance
            value.normal_()
    if made.router.output_scale is not None:
        torch.nn.init.normal_(made.router.output_scale)
    return made


@pytest.mark.parametrize(
    ("router", "options"),
    [("default-moe", {}), ("sparsemixer-cv", {}), ("sparsemixer-cv", {"prediction": "linear"})],
)
def test_predicted_outputs_are_scaled_with_the_experts(router, options):
    one, other, x = layer(router, **options), layer(router, **options), torch.randn(60, 8)
    scale_outputs(other, 0.5)
    for made in (one, other):
        made.train()
        for _ in range(10):
            torch.manual_seed(1)
            made(x)
            made.router.end_update()
    scale_outputs(one, 0.5)
    expected, actual = (made.router.expert_means.predict(x) for made in (one, other))
    assert expected.abs().max() > 0
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize(
    ("router", "options"),
    [
        ("switch", {}),
        ("sparsemixer", {"balance_bias_rate": 0.1}),
        ("sparsemixer-cv", {}),
        ("sparsemixer-v2", {"top_k": 2}),
        ("noisy-topk", {"top_k": 2}),
        ("default-moe", {}),
        ("random", {}),
    ],
)
def test_tokens_of_an_expert_that_is_gone_go_to_the_next_best(router, options):
    made = layer(router, **options)
    x = torch.randn(300, 8)
    before = made(x)[1].expert_index
    smaller = keep_experts(made, [0, 2, 4])
    y, routing = smaller(x)
    logits = made.router.logits

    def masked(x):
        return logits(x).index_fill(-1, torch.tensor([1, 3]), -torch.inf)

    made.router.logits = masked
    expected, of_all = made(x)
    numbers = torch.tensor([0, 2, 4])[routing.expert_index]
    assert torch.equal(numbers, of_all.expert_index) and not torch.equal(before, numbers)
    assert torch.allclose(y, expected, atol=1e-6)
    assert made.router.num_experts == len(made.experts.w1) == 5
    assert smaller.state_dict().keys() == made.state_dict().keys()


def test_a_dense_network_has_gate_and_omega_in_it():
    made, x = layer("sparsemixer"), torch.randn(20, 8)
    outputs = made.experts(x.repeat(5, 1), [20] * 5).view(5, 20, 8)
    for expert in range(5):
        weights = torch.eye(5)[expert]
        dense = as_dense(made, Usage(weights, 0.7), weights)
        expected = 0.7 * made.router.output_scale * outputs[expert]
        assert torch.allclose(dense(x)[0], expected, atol=1e-6)
    merged = as_dense(made, Usage(weights, 1.0), torch.tensor([0.5, 0, 0.5, 0, 0]))
    mean = (made.experts.w1[0] + made.experts.w1[2]) / 2
    assert torch.allclose(merged.experts.w1[0], mean)


def sentence(generator, length):
    words = torch.randint(4, 12, (length,), generator=generator)
    return torch.cat([words, torch.tensor([EOS])])


def test_loss_and_usage_are_those_of_the_sentences_one_by_one():
    model = build(router="topk", top_k=2).eval()
    draw = torch.Generator().manual_seed(0)
    pairs = [EncodedPair(sentence(draw, n), sentence(draw, 12 - n)) for n in (3, 7, 5, 1)]
    measured = TextLoss(model, pairs, PAD, EOS)
    total, gates, counts = 0.0, 0.0, torch.zeros(4)
    watched = switch_layers(model)["decoder.2"].moe
    handle = watched.register_forward_hook(lambda _, __, output: seen.append(output[1]))
    with torch.no_grad():
        for pair in pairs:
            seen = []
            previous = torch.cat([pair.target[-1:], pair.target[:-1]])
            output = model(pair.source[None], torch.tensor([len(pair.source)]), previous[None])
            chosen = output[0].log_softmax(-1)[0, torch.arange(len(previous)), pair.target]
            total -= float(chosen.sum()) / 0.6931471805599453
            gates += float(seen[0].gate.sum())
            counts += torch.bincount(seen[0].expert_index.flatten(), minlength=4)
    handle.remove()
    tokens = sum(len(pair.target) for pair in pairs)
    assert measured.bits() == pytest.approx(total / tokens, rel=1e-5)
    usage = measured.usage()["decoder.2"]
    assert usage.gate == pytest.approx(gates / tokens, rel=1e-5)
    assert torch.allclose(usage.shares, counts / (2 * tokens))


def test_a_layer_is_itself_again_after_it_was_measured():
    model = build().eval()
    measured = TextLoss(
        model, [EncodedPair(torch.tensor([5, 6, EOS]), torch.tensor([7, EOS]))], 1, 2
    )
    place = switch_layers(model)["encoder.0"]
    mixture = place.moe

    def fails(mixture, expert):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measured.bits_with(place, fails)
    assert place.moe is mixture
    losses = measured.bits_with(place, lambda mixture, i: keep_experts(mixture, [i]))
    assert place.moe is mixture and len(set(losses)) > 1


def pruned(run, corpus, output, *flags):
    """The figures of a command's checkpoint."""
    few = ["--data", corpus, "--beam", 1, "--sentences", 10]
    command("prune", run, *few, "--output", output, *flags)
    return json.loads(output.with_name(f"{output.name}.json").read_text())


def test_the_needless_are_dropped_step_by_step(run_dir, corpus, tmp_path, capsys):
    output = tmp_path / "small.pt"
    found = pruned(run_dir, corpus, output, "--experts", 2)
    steps = found["steps"]
    assert [step["experts"] for step in steps] == [4, 3, 2]
    sizes = [step["parameters"] for step in steps]
    # Two layers of 32 x 64 networks, with a row of the router each.
    assert sizes[0] - sizes[1] == sizes[1] - sizes[2] == 2 * (2 * 32 * 64 + 32 + 64 + 32 + 1)
    state, before = load(output), load(run_dir / "checkpoint_best.pt")
    assert state["cfg"]["model"]["num_experts"] == 2
    assert state["cfg"]["model"]["router"] == "sparsemixer"
    w1 = "layers.0.moe.experts.w1"
    for side in ("encoder", "decoder"):
        of_layer = found["layers"][f"{side}.0"]
        assert sum(of_layer["shares"]) == pytest.approx(1)
        needless = of_layer["bits_without"].index(min(of_layer["bits_without"]))
        old, new = (each["model"][f"{side}.{w1}"] for each in (before, state))
        kept = [i for i in range(4) if any(torch.equal(old[i], each) for each in new)]
        assert len(kept) == 2 and needless not in kept
    # What was measured last is what is read back.
    translator = Translator(str(output), data=corpus)
    lines = [read_lines(corpus / "raw" / f"valid.{side}")[:10] for side in ("en", "de")]
    pairs = [translator.encode_pair(*pair) for pair in zip(*lines)]
    bits = TextLoss(translator.model, pairs, PAD, EOS).bits()
    assert bits == pytest.approx(steps[-1]["bits"], rel=1e-4)
    printed = capsys.readouterr().out
    assert f"{steps[-1]['bleu']:.2f}" in printed and "bits more without it" in printed


@pytest.mark.parametrize("how", ["merge", "keep"])
def test_experts_that_are_alike_make_the_dense_model_again(how, dense_run, corpus, tmp_path):
    dense = dense_run / "checkpoint_last.pt"
    up, output = tmp_path / "up.pt", tmp_path / "dense.pt"
    command("upcycle", dense, "--experts", 3, "--router", "sparsemixer", "--output", up)
    found = pruned(up, corpus, output, "--to-dense", how)
    first, last = found["steps"]
    assert last["experts"] == 0 and last["bits"] == pytest.approx(first["bits"], abs=1e-3)
    before, after = (load(path)["model"] for path in (dense, output))
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert torch.allclose(value, after[name], rtol=1e-3, atol=1e-5), name


def test_fairseq_alone_translates_with_a_dense_one(run_dir, corpus, server, tmp_path):
    """No --user-dir, and a Python that has never loaded this package."""
    output = tmp_path / "dense.pt"
    pruned(run_dir, corpus, output, "--to-dense", "keep")
    generate = [corpus / "bin", "--path", output, "--required-batch-size-multiple", 1, "--cpu"]
    alone = hypotheses(small_run.python("-m", "fairseq_cli.generate", *generate))
    log = tmp_path / "ours.log"
    ours = ["fairseq_cli.generate", *generate, "--user-dir", PACKAGE]
    assert server.run(ours, output=log) == [0]
    assert alone == hypotheses(log.read_text())
    assert len(alone) == len(read_lines(corpus / "raw" / "test.en"))
    # Converters read attributes, of what torch loads without trust, and set some.
    settings = torch.load(output, weights_only=True)["cfg"]["model"]
    settings.data, settings.source_lang, settings.target_lang = str(corpus / "bin"), "en", "de"
    assert settings.arch == "transformer" and settings.encoder_ffn_embed_dim == 64
    model = models.build_model(settings, tasks.setup_task(settings))
    model.load_state_dict(load(output)["model"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--experts", 4, "--output", "x.pt"], "--experts 4 must be at least 1, as many as each"),
        (["--experts", 0, "--output", "x.pt"], "--experts 0 must be at least 1"),
        (["--experts", 2], "--output goes with --experts or --to-dense"),
        (["--output", "x.pt"], "--output goes with --experts or --to-dense"),
        (["--sentences", 0], "--sentences 0 measures nothing"),
        (["--checkpoint", "checkpoint9.pt:checkpoint18.pt"], "an ensemble cannot be pruned"),
        (["--subset", "nothing"], "there is no test set"),
    ],
)
def test_wrong_flags(flags, message, run_dir, corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        command("prune", run_dir, "--data", corpus, *flags)
    assert not list(tmp_path.iterdir())


def test_a_dense_model_has_nothing_to_drop(dense_run, corpus, capsys):
    command_line = ["prune", dense_run / "checkpoint_last.pt", "--data", corpus]
    assert cli.main(list(map(str, command_line))) == 2
    assert "has no experts to drop" in capsys.readouterr().err


def test_experts_that_words_fix_have_no_next_best(dense_run, corpus, tmp_path):
    hashed = tmp_path / "hash.pt"
    upcycled = ["--experts", 3, "--router", "hash", "--output", hashed]
    command("upcycle", dense_run / "checkpoint_last.pt", *upcycled)
    for flags in ([], ["--experts", 2, "--output", tmp_path / "small.pt"]):
        with pytest.raises(UserError, match="router hash, which knows one expert for each word"):
            command("prune", hashed, "--data", corpus, *flags)
    found = pruned(hashed, corpus, tmp_path / "dense.pt", "--to-dense", "merge")
    assert found["layers"]["encoder.0"]["bits_without"] is None
    first, last = found["steps"]
    assert last["bits"] == pytest.approx(first["bits"], abs=1e-3)
