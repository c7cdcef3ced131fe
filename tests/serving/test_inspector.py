"""What the page is told: translations, experts, and swaps, against the model run by hand."""

import copy
import dataclasses

import pytest
import torch
from fairseq.models import build_model

from fairseq_sparsemixer.errors import UserError
from fairseq_sparsemixer.evaluation.translator import Translator
from fairseq_sparsemixer.models.layers import switch_layers
from fairseq_sparsemixer.serving import inspector as inspecting
from fairseq_sparsemixer.serving.inspector import Inspector

pytestmark = pytest.mark.usefixtures("one_thread")

TEXT = "the red house is not here"


@pytest.fixture(scope="module")
def greedy(translator):
    return Inspector(translator, beam=1, lenpen=1.0)


@pytest.fixture(scope="module")
def of_router(translator):
    """Inspectors of models with another router, not trained, by the router's flags."""

    def build(**settings):
        cfg = copy.deepcopy(translator.cfg.model)
        for name, value in settings.items():
            setattr(cfg, name, value)
        torch.manual_seed(0)
        return Inspector(translator.with_model(build_model(cfg, translator.task)), 1, 1.0)

    return build


def swap(layer, position, *experts):
    return {"layer": layer, "position": position, "experts": list(experts)}


def by_hand(translator, text, layer, position, expert):
    """Greedy search without a cache, the whole model at each step: tokens and log-probabilities."""
    model, dictionary = translator.model, translator.target_dictionary
    source = translator.encode_pair(text, "").source[None]

    def hook(router, args, routing):
        index, gate = routing.expert_index.clone(), routing.gate.clone()
        if position < len(index):
            z = routing.logits[position]
            best = z.max()
            near = (best - z) / torch.maximum(z.abs(), best) <= 2 * router.jitter_eps
            near[expert] = True
            index[position] = expert
            gate[position] = z[expert].exp() / z[near].exp().sum()
        return dataclasses.replace(routing, expert_index=index, gate=gate)

    handle = switch_layers(model)[layer].moe.router.register_forward_hook(hook)
    tokens, log_probs = [dictionary.eos()], []
    try:
        while len(tokens) == 1 or tokens[-1] != dictionary.eos():
            output = model(source, torch.tensor([source.shape[1]]), torch.tensor([tokens]))
            scores = model.get_normalized_probs(output, log_probs=True)[0, -1]
            scores[dictionary.pad()] = -torch.inf
            tokens.append(int(scores.argmax()))
            log_probs.append(float(scores.max()))
            assert len(tokens) < 40
    finally:
        handle.remove()
    return [dictionary[token] for token in tokens[1:]], log_probs


@torch.no_grad()
def test_a_swap_is_what_the_model_does_with_that_choice(translator, greedy):
    plain = greedy.translate({"text": TEXT})
    changed = 0
    for layer, side in (("encoder.0", "encoder"), ("decoder.0", "decoder")):
        for position in range(min(6, len(plain[side]["pieces"]))):
            own = plain[side]["layers"][layer][position]["experts"][0]
            expert = (own + 1 + position % 3) % 4
            found = greedy.translate({"text": TEXT, "swaps": [swap(layer, position, expert)]})
            pieces, log_probs = by_hand(translator, TEXT, layer, position, expert)
            assert found["decoder"]["pieces"] == pieces
            assert found["log_probs"] == pytest.approx(log_probs, abs=1e-4)
            assert found["score"] == pytest.approx(sum(log_probs) / len(log_probs), abs=1e-4)
            assert found[side]["layers"][layer][position]["experts"] == [expert]
            changed += found["translation"] != plain["translation"]
    assert changed > 1


def test_without_swaps_it_is_the_usual_translation(translator, inspector):
    for text in (TEXT, "a", "an old lamp was there"):
        (usual,) = translator.translate([text], beam=3)
        found = inspector.translate({"text": text})
        assert (found["translation"], found["score"]) == (usual.text, usual.score)
        assert found["encoder"]["pieces"][-1] == found["decoder"]["pieces"][-1] == "</s>"


def test_swaps_to_the_routers_own_choice_change_nothing(inspector, greedy):
    for each, sides in ((inspector, ["encoder"]), (greedy, ["encoder", "decoder"])):
        plain = each.translate({"text": TEXT})
        swaps = [
            swap(layer, position, *entry["experts"])
            for side in sides
            for layer, entries in plain[side]["layers"].items()
            for position, entry in enumerate(entries)
        ]
        assert len(swaps) > 9
        assert each.translate({"text": TEXT, "swaps": swaps}) == plain


def test_pieces_of_a_word_share_its_number(inspector):
    side = inspector.translate({"text": "red lamp"})["encoder"]
    words = {}
    for piece, word in zip(side["pieces"], side["words"]):
        words[word] = words.get(word, "") + piece
    assert words == {0: "▁red", 1: "▁lamp", 2: "</s>"}
    assert len(side["pieces"]) > 3


@pytest.mark.parametrize(
    ("settings", "experts"),
    [
        ({"router": "hash"}, [2]),
        ({"router": "hash", "router_options": '{"gate": "full"}'}, [1]),
        ({"router": "sparsemixer-v2", "top_k": 2}, [3, 1]),
        ({"router": "default-moe", "top_k": 2}, [0, 2]),
    ],
)
def test_other_routers(of_router, settings, experts):
    inspector = of_router(**settings)
    about = inspector.describe()
    assert (about["swappable"], about["top_k"]) == (True, len(experts))
    assert about["learnt"] == (settings["router"] != "hash")
    plain = inspector.translate({"text": TEXT})
    swaps = [swap("encoder.0", 1, *experts), swap("decoder.0", 0, *experts)]
    found = inspector.translate({"text": TEXT, "swaps": swaps})
    assert found["encoder"]["layers"]["encoder.0"][1]["experts"] == experts
    assert found["decoder"]["layers"]["decoder.0"][0]["experts"] == experts
    assert found["log_probs"] != plain["log_probs"]


def test_experts_that_choose_their_tokens_cannot_be_swapped(of_router):
    inspector = of_router(router="expert-choice", decoder_moe_layers="none")
    assert not inspector.describe()["swappable"]
    entries = inspector.translate({"text": TEXT})["encoder"]["layers"]["encoder.0"]
    assert {expert for entry in entries for expert in entry["experts"]} == {0, 1, 2, 3}
    with pytest.raises(UserError, match="no choice to swap"):
        inspector.translate({"text": TEXT, "swaps": [swap("encoder.0", 0, 1)]})


def test_a_dense_model_has_no_layers(of_router):
    inspector = of_router(encoder_moe_layers="none", decoder_moe_layers="none")
    assert inspector.describe()["layers"] == {}
    assert inspector.translate({"text": TEXT})["encoder"]["layers"] == {}
    with pytest.raises(UserError, match="the model is dense"):
        inspector.translate({"text": TEXT, "swaps": [swap("encoder.0", 0, 1)]})


def test_an_ensemble_is_refused(run_dir, corpus):
    files = ":".join([str(run_dir / "checkpoint_best.pt")] * 2)
    with pytest.raises(UserError, match="an ensemble of 2 models cannot be shown"):
        Inspector(Translator(files, data=corpus), 1, 1.0)


LONG = " ".join(["house"] * 20)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (None, "the request is no object"),
        ([], "the request is no object"),
        ({}, "there is no text"),
        ({"text": 3}, "its text is no text"),
        ({"text": TEXT, "swaps": {}}, "its swaps is no list"),
        ({"text": TEXT, "swaps": [3]}, "entry 0 of its swaps is no object"),
        ({"text": TEXT, "swaps": [swap("encoder.0", True, 1)]}, "its position is no whole number"),
        ({"text": TEXT, "swaps": [swap("encoder.0", 1.0, 1)]}, "its position is no whole number"),
        ({"text": TEXT, "swaps": [swap("encoder.0", 0, "1")]}, "of its experts is no whole"),
        ({"text": TEXT, "swap": []}, "there is no 'swap' in a request"),
        ({"text": TEXT, "swaps": [{**swap("encoder.0", 0, 1), "to": 1}]}, "there is no 'to' in"),
        ({"text": TEXT, "swaps": [swap("encoder.1", 0, 1)]}, "no layer 'encoder.1' with experts"),
        ({"text": TEXT, "swaps": [swap("encoder.0", 0, 4)]}, "1 of experts 0 to 3"),
        ({"text": TEXT, "swaps": [swap("encoder.0", 0, -1)]}, "1 of experts 0 to 3"),
        ({"text": TEXT, "swaps": [swap("encoder.0", 0, 1, 2)]}, "1 of experts 0 to 3"),
        ({"text": TEXT, "swaps": [swap("encoder.0", 0)]}, "1 of experts 0 to 3"),
        ({"text": TEXT, "swaps": [swap("encoder.0", -1, 1)]}, "position -1 of encoder.0 is none"),
        ({"text": TEXT, "swaps": [swap("encoder.0", 29, 1)]}, "position 29 of encoder.0 is none"),
        ({"text": TEXT, "swaps": [swap("decoder.0", 40, 1)]}, "position 40 of decoder.0 is none"),
        ({"text": TEXT, "swaps": [swap("decoder.0", 0, 1)] * 2}, "two swaps are of position 0"),
        ({"text": TEXT, "swaps": [swap("decoder.0", 0, 1)] * 65}, "65 swaps are too many"),
        ({"text": " \t\u200b"}, "there is nothing to translate"),
        ({"text": "\ud800"}, "surrogate pairs"),
        ({"text": LONG}, "at most 30 are taken"),
    ],
)  # fmt: skip
def test_requests_that_are_refused(inspector, request_, message):
    with pytest.raises(UserError, match=message):
        inspector.translate(request_)


def test_the_longest_sentence(inspector, monkeypatch):
    """No longer than the model can read, and no longer than is allowed."""
    assert inspector.describe()["most_pieces"] == 30
    pieces = len(inspector.translate({"text": TEXT})["encoder"]["pieces"])
    monkeypatch.setattr(inspecting, "MOST_PIECES", pieces)
    limited = Inspector(inspector._translator, 1, 1.0)
    assert limited.translate({"text": TEXT})["translation"]
    with pytest.raises(UserError, match=f"{pieces} are taken"):
        limited.translate({"text": f"{TEXT} and"})
