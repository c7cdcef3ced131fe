"""Models with experts that are made of dense ones begin as these."""

import shlex

import pytest
import torch
from support import dense
from support.commands import PACKAGE, command, hypotheses, load, logged
from support.full_disk import room_for
from support.models import sample
from support.routers import OF_ANY_TEXT
from torch.nn.functional import nll_loss

from fairseq_sparsemixer import cli
from fairseq_sparsemixer.conversion.upcycling import sum_of_gates
from fairseq_sparsemixer.errors import UserError
from fairseq_sparsemixer.files import read_lines
from fairseq_sparsemixer.models.layers import switch_layers
from fairseq_sparsemixer.moe import ROUTERS, build_router

pytestmark = pytest.mark.usefixtures("one_thread")

EXACT = 1e-4
DRAW_M = {"sparsemixer", "sparsemixer-cv", "sparsemixer-v2", "sparsemixer-v2-star", "composed"}
"""Training multiplies some of their outputs by m, whatever the experts are."""


def upcycled(path, *flags, router="switch", experts=4):
    """The model that is made of a checkpoint."""
    output = path.with_name("upcycled.pt")
    flags = ["--experts", experts, "--router", router, *flags]
    command("upcycle", path, "--output", output, *flags)
    return dense.read(output)


def loss(model):
    """Per token, in nats, on one batch."""
    read = sample(((9, 8), (5, 11)))
    with torch.no_grad():
        output = model(**read["net_input"])
        log_probs = model.get_normalized_probs(output, log_probs=True)
    return float(nll_loss(log_probs.flatten(0, 1), read["target"].flatten(), ignore_index=1))


def without_dropout(model):
    for module in model.modules():
        if type(module).__name__ == "FairseqDropout":
            module.p = 0.0
    return model


ROUTER_FLAGS = [
    *((name, []) for name in OF_ANY_TEXT),
    ("topk", ["--top-k", 3]),
    ("topk", ["--top-k", 2, "--router-options", '{"renormalise": true}']),
    ("sparsemixer-v2", ["--top-k", 3]),
    ("switch", ["--no-router-bias"]),
    ("sparsemixer", ["--balance-bias-rate", 0.01]),
    ("sparsemixer", ["--router-options", '{"gate": "full"}', "--no-router-bias"]),
    ("hash", ["--router-options", '{"gate": "full"}']),
    ("composed", ["--router-options", '{"choice": "full-sample", "gate": "one"}']),
    ("composed", ["--router-options",
                  '{"choice": "argmax", "gate": "masked", "estimator": "grad-1"}']),
]  # fmt: skip


@pytest.mark.parametrize(("router", "flags"), ROUTER_FLAGS)
def test_the_first_loss_is_the_dense_ones(router, flags, tmp_path):
    expected = loss(dense.write(tmp_path / "dense.pt"))
    kind = ROUTERS[router]
    if kind.min_top_k > 1:
        flags = ["--top-k", kind.min_top_k]
    if not kind.causal:
        options = ["--router-options", '{"renormalise": true}']
        flags = [*options, "--decoder-moe-layers", "none"]
    model = without_dropout(upcycled(tmp_path / "dense.pt", *flags, router=router))
    assert loss(model) == pytest.approx(expected, abs=EXACT)
    if router not in DRAW_M:
        assert loss(model.train()) == pytest.approx(expected, abs=EXACT)
    # Tokens go to several experts although these are alike.
    layer = switch_layers(model)["encoder.0"].moe.eval()
    index = layer(torch.randn(200, 16), token_ids=torch.arange(200))[1].expert_index
    assert len(index[index >= 0].unique()) == 4


@pytest.mark.parametrize(
    "settings",
    [
        {"encoder_normalize_before": True, "decoder_normalize_before": True},
        {"encoder_learned_pos": True, "decoder_learned_pos": True, "layernorm_embedding": True},
        {"share_all_embeddings": True, "activation_fn": "gelu", "no_scale_embedding": True},
        {"share_decoder_input_output_embed": True, "encoder_ffn_embed_dim": 40},
        {"no_cross_attention": True, "decoder_layers": 1},
        {"old": True},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_transformers_of_all_kinds(settings, tmp_path):
    expected = loss(dense.write(tmp_path / "dense.pt", **settings))
    model = upcycled(tmp_path / "dense.pt")
    assert loss(model) == pytest.approx(expected, abs=EXACT)
    state = load(tmp_path / "upcycled.pt")
    assert "last_optimizer_state" not in state
    embeddings = [state["model"][f"{side}.embed_tokens.weight"] for side in ("encoder", "decoder")]
    shared = "share_all_embeddings" in settings
    assert (embeddings[0].data_ptr() == embeddings[1].data_ptr()) == shared


def test_half_precision_stays(tmp_path):
    expected = loss(dense.write(tmp_path / "dense.pt", torch.float16, share_all_embeddings=True))
    model = upcycled(tmp_path / "dense.pt")
    assert loss(model) == pytest.approx(expected, abs=EXACT)
    parameters = load(tmp_path / "upcycled.pt")["model"]
    kinds = {name: value.dtype for name, value in parameters.items()}
    assert {kinds[name] for name in kinds if ".router." not in name} == {torch.float16}
    weight = parameters["encoder.layers.0.moe.router.weight"]
    assert weight.dtype == torch.float32 and weight.half().float().std() > 0.9 * weight.std()


def test_layers_are_chosen_as_in_training(tmp_path):
    dense.write(tmp_path / "dense.pt")
    model = upcycled(tmp_path / "dense.pt", "--encoder-moe-layers", "1,2", "--moe-offset", 1)
    assert list(switch_layers(model)) == ["encoder.1", "encoder.2", "decoder.1"]


def test_experts_are_copies_up_to_what_is_drawn_anew(tmp_path):
    old = dense.write(tmp_path / "dense.pt").encoder.layers[0]
    new = switch_layers(upcycled(tmp_path / "dense.pt", "--reinitialise", 0.25, "--seed", 3))
    experts = new["encoder.0"].moe.experts
    kept = (experts.w1 == old.fc1.weight).all(-1)  # (experts, units)
    assert kept.sum(-1).tolist() == [18] * 4  # of 24
    assert len({tuple(row) for row in kept.tolist()}) == 4
    for i in range(4):
        assert torch.equal((experts.b1[i] == old.fc1.bias), kept[i])
        same = torch.isclose(experts.w2[i], 4 * old.fc2.weight, rtol=1e-3).all(0)
        assert torch.equal(same, kept[i])
        assert torch.allclose(experts.b2[i], 4 * old.fc2.bias, rtol=1e-3)
    # As those that they take the place of: 6 units of 16 weights each.
    ratio = experts.w1[~kept].std() / old.fc1.weight.std()
    assert 0.8 < ratio < 1.2


def test_fairseq_trains_it_further(dense_run, corpus, server, tmp_path, capsys):
    """The first update's loss is that of the dense model's first further update."""
    output = tmp_path / "up.pt"
    flags = ["--checkpoint", "checkpoint_last.pt", "--experts", 3, "--router", "switch-omega"]
    command("upcycle", dense_run, *flags, "--output", output)
    printed = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert printed[:2] == ["--finetune-from-model", str(output)]
    common = [
        corpus / "bin",
        "--user-dir",
        PACKAGE,
        *dense.TRAINING,
        "--max-update",
        2,
        "--no-save",
    ]
    finetune = ["--finetune-from-model", dense_run / "checkpoint_last.pt"]
    further = ["--arch", "transformer", *dense.SIZE, *finetune, "--save-dir", tmp_path / "a"]
    ours = [*printed, "--save-dir", tmp_path / "b"]
    logs = [tmp_path / "further.log", tmp_path / "ours.log"]
    for arguments, log in zip((further, ours), logs):
        assert server.run(["fairseq_cli.train", *common, *arguments], output=log) == [0]
    begins = [logged(log.read_text(), "train_inner")[0]["loss"] for log in logs]
    assert begins[0] == pytest.approx(begins[1], abs=0.0011) and begins[0] < 4


def test_it_translates_as_the_dense_model(dense_run, corpus, server, tmp_path):
    output = tmp_path / "up.pt"
    command("upcycle", dense_run / "checkpoint_last.pt", "--experts", 3, "--output", output)
    found = []
    for path in (output, dense_run / "checkpoint_last.pt"):
        log = tmp_path / f"{path.name}.log"
        flags = ["--path", path, "--required-batch-size-multiple", 1, "--cpu"]
        generate = ["fairseq_cli.generate", corpus / "bin", "--user-dir", PACKAGE, *flags]
        assert server.run(generate, output=log) == [0]
        found.append(hypotheses(log.read_text()))
    assert found[0] == found[1]
    assert len(found[0]) == len(read_lines(corpus / "raw" / "test.en"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--experts", 0], "--num-experts must be at least 1"),
        (["--router", "nobody"], "unknown router 'nobody'"),
        (["--router", "gshard"], "--top-k must be 2 for router 'gshard'"),
        (["--encoder-moe-layers", "none", "--decoder-moe-layers", "none"], "no layer would have"),
        (["--encoder-moe-layers", "7"], "there is no layer 7"),
        (["--router", "expert-choice"], "--decoder-moe-layers none"),
        (["--router", "expert-choice", "--decoder-moe-layers", "none"], '"renormalise": true'),
        (["--no-router-bias"], "router 'sparsemixer' must have a bias"),
        (["--router-options", "{"], "--router-options is not JSON"),
        (["--reinitialise", 1.5], "--reinitialise must be 0 to 1"),
        (["--checkpoint", "other.pt"], "choose from a run folder"),
    ],
)
def test_wrong_flags(flags, message, tmp_path):
    dense.write(tmp_path / "dense.pt")
    output = ["--output", tmp_path / "up.pt"]
    with pytest.raises(UserError, match=message):
        command("upcycle", tmp_path / "dense.pt", "--experts", 4, *output, *flags)
    assert [path.name for path in tmp_path.iterdir()] == ["dense.pt"]


def test_wrong_models(run_dir, tmp_path, capsys):
    def refused(path):
        arguments = [path, "--experts", 2, "--output", tmp_path / "up.pt"]
        assert cli.main(["upcycle", *map(str, arguments)]) == 2
        (message,) = capsys.readouterr().err.splitlines()
        return message

    assert "has experts already" in refused(run_dir)
    assert "there is no run folder or checkpoint" in refused(tmp_path / "nothing")
    dense.write(tmp_path / "dense.pt")
    state = load(tmp_path / "dense.pt")
    path = tmp_path / "other.pt"
    torch.save({**state, "model": {"encoder.lstm": torch.zeros(2)}}, path)
    assert "of no transformer that translates (it has no encoder.embed_tok" in refused(path)
    state["cfg"]["model"]["_name"] = "lstm"
    torch.save(state, path)
    assert "asks for fairseq's architecture lstm" in refused(path)
    state["cfg"]["model"].update(_name="transformer", encoder_layers=5)
    torch.save(state, path)
    assert "cannot build the model of the checkpoint" in refused(path)
    state["model"]["encoder.layers.0.fc1.weight"][0, 0] = torch.nan
    torch.save(state, path)
    assert "is of a training that diverged" in refused(path)


def test_expert_choice_that_is_renormalised():
    """Gates of a token add up to 1, and none is left out."""
    options = {"embed_dim": 6, "num_experts": 4, "top_k": 1}
    plain = build_router("expert-choice", **options)
    router = build_router("expert-choice", **options, renormalise=True)
    z = torch.randn(40, 4, generator=torch.Generator().manual_seed(1))
    padding = torch.arange(40) > 35
    before, after = (each.route(z, padding) for each in (plain, router))
    left_out = (before.expert_index < 0).all(-1) & ~padding
    assert left_out.any()
    assert torch.equal(after.expert_index[~left_out], before.expert_index[~left_out])
    probs = z.softmax(-1)
    for token in range(40):
        taken = [i for i in range(4) if before.expert_index[token, i] >= 0]
        if left_out[token]:
            taken = [int(z[token].argmax())]
        expected = torch.zeros(4)
        expected[taken] = probs[token, taken] / probs[token, taken].sum()
        assert torch.allclose(after.gate[token], expected * ~padding[token])
        assert [i for i in range(4) if after.expert_index[token, i] >= 0] == (
            [] if padding[token] else taken
        )


def test_a_masked_gate_begins_far_from_zero():
    """The mask goes by the size of logits: of small ones it leaves some tokens one expert."""
    router = build_router("sparsemixer", embed_dim=16, num_experts=4)
    router.begin_undecided()
    assert sum_of_gates(router) == pytest.approx(1 / 4, rel=1e-3)
    with torch.no_grad():
        router.bias.fill_(0)
    with pytest.raises(
        ValueError, match=r"the gates of a token add up to 0\.[2-5].* up to 1 where"
    ):
        sum_of_gates(router)


def test_mean_outputs_come_in_slowly(tmp_path):
    """Those of default-moe add to the output as soon as an update has ended."""
    expected = loss(dense.write(tmp_path / "dense.pt"))
    model = without_dropout(upcycled(tmp_path / "dense.pt", router="default-moe")).train()
    model(**sample(((9, 8), (5, 11)))["net_input"])
    layers = [layer.moe for layer in switch_layers(model).values()]
    for layer in layers:
        layer.end_update()
    model.eval()
    after_one = abs(loss(model) - expected)
    for layer in layers:
        layer.router.expert_means.mean.mul_(100)  # all of the way
    assert 0 < after_one < 0.02 < abs(loss(model) - expected)


def test_a_full_disk(tmp_path, capsys):
    dense.write(tmp_path / "dense.pt")
    command_line = [
        "upcycle",
        tmp_path / "dense.pt",
        "--experts",
        2,
        "--output",
        tmp_path / "up.pt",
    ]
    with room_for(5000):
        assert cli.main(list(map(str, command_line))) == 2
    assert "error: cannot write " in capsys.readouterr().err.splitlines()[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["dense.pt"]
