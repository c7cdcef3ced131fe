"""Which experts a model chooses on the test set, against sentences one at a time."""

import collections
import json
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.metrics import mutual_info_score
from support.report_study import DOMAINS, LAYERS

from fairseq_sparsemixer.comparison import results as scores
from fairseq_sparsemixer.errors import UserError
from fairseq_sparsemixer.evaluation.translator import Translator
from fairseq_sparsemixer.files import read_lines
from fairseq_sparsemixer.models.layers import switch_layers
from fairseq_sparsemixer.report import routing
from fairseq_sparsemixer.report.specialisation import MIN_COUNT, entropy
from fairseq_sparsemixer.runs.folder import ROUTING, read_run


def test_routing_against_sentences_one_at_a_time(study, report, one_thread):
    """Without batches and padding: shares, words and their lifts, domains, samples."""
    folder = study / "sparsemixer-4-seed1"
    found = json.loads((folder / ROUTING).read_text())
    translator = Translator(str(folder), "checkpoint_last.pt", data=study / "data")
    raw = study / "data" / "raw"
    sources, references = (read_lines(raw / f"test.{language}") for language in ("en", "de"))
    assert (found["sentences"], found["left_out"]) == (len(sources), 0)
    eos = translator.target_dictionary.eos()

    def run(source, target):
        """{layer: [(piece, expert), ...]}"""
        source, target = translator.encode_pair(source, target)
        previous = torch.cat([torch.tensor([eos]), target[:-1]])
        indices = {}
        handles = [
            layer.moe.register_forward_hook(
                lambda _, __, output, name=name: indices.update({name: output[1].expert_index})
            )
            for name, layer in switch_layers(translator.model).items()
        ]
        with torch.no_grad():
            translator.model(source[None], torch.tensor([len(source)]), previous[None])
        for handle in handles:
            handle.remove()
        read = {"encoder.0": source, "decoder.0": previous}
        return {
            name: [
                (translator.target_dictionary[token], expert)
                for token, (expert,) in zip(read[name].tolist(), indices[name].tolist())
            ]
            for name in read
        }

    seen = collections.defaultdict(list)
    for n, pair in enumerate(zip(sources, references)):
        for name, choices in run(*pair).items():
            seen[name] += [(word, expert, DOMAINS[n % 2]) for word, expert in choices]
    assert set(found["layers"]) == set(seen) == set(LAYERS)
    for name, layer in found["layers"].items():
        words, experts, domains = zip(*seen[name])
        assert (layer["num_experts"], layer["tokens"]) == (4, len(words))
        assert layer["unrouted"] == 0
        given = [mutual_info_score(experts, words), mutual_info_score(experts, domains)]
        assert layer["words"]["share"] == pytest.approx(given[0] / entropy(np.array(experts)))
        codes = np.array([DOMAINS.index(domain) for domain in domains])
        assert layer["domains"]["share"] == pytest.approx(given[1] / entropy(codes), abs=1e-9)
        assert layer["domain_shares"][DOMAINS[0]] == pytest.approx((codes == 0).mean())
        for expert, each in enumerate(layer["experts"]):
            own = [word for word, chosen, _ in seen[name] if chosen == expert]
            assert each["share"] == pytest.approx(len(own) / len(words))
            for word in each["words"]:
                assert word["count"] == own.count(word["word"]) >= MIN_COUNT
                lift = word["count"] / len(own) / (words.count(word["word"]) / len(words))
                assert word["lift"] == pytest.approx(lift)
                assert lift > 1
    for sample in found["samples"]:
        choices = run(sample["source"], sample["translation"])
        assert sample["domain"] == DOMAINS[sample["line"] % 2]
        for side in ("encoder", "decoder"):
            assert sample[side]["layer"] == f"{side}.0"
            pairs = list(zip(sample[side]["pieces"], (e for (e,) in sample[side]["experts"])))
            assert pairs == choices[f"{side}.0"]


def test_several_experts_of_a_token_and_none():
    """Tokens 0 to 5; the first has no expert, the third only one of two."""
    translator = SimpleNamespace(model=SimpleNamespace(encoder=SimpleNamespace(dictionary="abc")))
    choices = [{"encoder.1": np.array([[-1, -1], [0, 1], [2, -1]], np.int16)}] * 2
    pairs = [routing._Pair(n, torch.tensor([0, 1, 2]), torch.tensor([9])) for n in (5, 7)]
    domains = ["x"] * 6 + ["y"] * 2
    layer = routing._describe_layer(translator, "encoder.1", 4, pairs, choices, domains)
    assert (layer["tokens"], layer["unrouted"]) == (6, pytest.approx(1 / 3))
    assert [each["share"] for each in layer["experts"]] == pytest.approx([1 / 3] * 3 + [0])
    assert layer["domain_shares"] == {"x": 0.5, "y": 0.5}
    assert layer["experts"][3]["domain_shares"] == {}
    assert layer["domains"]["share"] == pytest.approx(0, abs=1e-9)
    assert layer["words"]["share"] == pytest.approx(entropy(np.array([0, 0, 1])) / math.log(3))
    without = routing._describe_layer(translator, "encoder.1", 4, pairs, choices, None)
    assert without["domains"] is None
    assert without["domain_shares"] == {}


def test_domains_that_experts_know_nothing_of_are_within_chance():
    """Sentences of one word each differ in their words, and so in experts, but not by domain."""
    rng = np.random.default_rng(3)
    translator = SimpleNamespace(model=SimpleNamespace(encoder=SimpleNamespace(dictionary="ab")))
    pairs = [routing._Pair(n, torch.zeros(30, dtype=int), torch.tensor([0])) for n in range(200)]
    choices = [
        {"encoder.0": np.full((30, 1), expert, np.int16)} for expert in rng.integers(0, 4, 200)
    ]
    domains = [str(each) for each in rng.integers(0, 4, 200)]
    found = routing._describe_layer(translator, "encoder.0", 4, pairs, choices, domains)["domains"]
    # Of 200 sentences, not of 6,000 choices: (4 - 1) (4 - 1) / 2T nats.
    assert found["shuffled"] == pytest.approx(9 / 400 / math.log(4), rel=0.3)
    assert found["share"] < found["chance"]


def test_samples_are_spread_over_domains_and_of_moderate_length():
    sources = ["one two three four five"] * 40 + ["short"] * 40 + [" ".join("x" * 21)]
    assert routing.choose_samples(sources, None) == [3, 10, 16, 23, 30, 36]
    domains = ["a"] * 10 + ["b"] * 29 + ["c"] * 42
    assert routing.choose_samples(sources, domains) == [2, 7, 17, 31, 39]


def test_routing_is_kept_and_made_anew_where_the_checkpoint_changed(
    study, report, tmp_path, monkeypatch
):
    folder = shutil.copytree(study / "sparsemixer-4-seed1", tmp_path / "run")
    run = read_run(folder)
    kept = (folder / ROUTING).read_text()
    (folder / "checkpoint_last.pt").unlink()
    problem = "the text is gone"
    assert routing.routing_of_run(run, None, problem) == json.loads(kept)
    run.evaluation["checkpoints"][0]["sha256"] = "another"
    with pytest.raises(UserError, match=problem):
        routing.routing_of_run(run, None, problem)
    text = scores.read_test_text([read_run(study / "sparsemixer-4-seed1")])
    run.evaluation["checkpoints"][0]["path"] = "nowhere.pt"
    with pytest.raises(UserError, match=r"there is no .*checkpoint_last.pt, the check"):
        routing.routing_of_run(run, text, "")
    shutil.copy(study / "sparsemixer-4-seed1" / "checkpoint_best.pt", folder / "checkpoint_last.pt")
    with pytest.raises(UserError, match="is not the checkpoint that"):
        routing.routing_of_run(run, text, "")
    shutil.copy(study / "sparsemixer-4-seed1" / "checkpoint_last.pt", folder)
    for damaged in ("{", "[]", '{"of": []}'):
        (folder / ROUTING).write_text(damaged)
        run = read_run(folder)
        assert routing._identity(run, routing._read(folder / ROUTING), None)
    monkeypatch.setattr(routing, "BATCH_TOKENS", 50)
    again = routing.routing_of_run(run, text, "")
    assert again["layers"].keys() == json.loads(kept)["layers"].keys()
    for name, layer in again["layers"].items():
        assert layer["experts"] == json.loads(kept)["layers"][name]["experts"]
    # Other labels, of the same domains.
    changed = text._replace(domains=text.domains[1:] + text.domains[:1])
    assert routing._identity(run, again, changed) != again["of"]
    assert routing._identity(run, again, None) == again["of"]

    def refuse(*_):
        raise PermissionError

    monkeypatch.setattr(routing, "write_json", refuse)
    of_changed = routing.routing_of_run(run, changed, "")
    assert [sample["domain"] for sample in of_changed["samples"]] != [
        sample["domain"] for sample in again["samples"]
    ]
