"""What is measured at each validation: in the file of points and in TensorBoard."""

import json
import math
import shutil
import struct

import numpy as np
import pytest
import torch
from support.small_study import DOMAINS, lines_of, study, write_plan

from fairseq_sparsemixer.errors import UserError
from fairseq_sparsemixer.evaluation import scoring, translator
from fairseq_sparsemixer.files import read_lines, write_lines
from fairseq_sparsemixer.models.watching import watch_routing
from fairseq_sparsemixer.runs import points
from fairseq_sparsemixer.runs.logs import by_layer, read_log
from fairseq_sparsemixer.tasks import measuring, translated


def test_points_agree_with_what_fairseq_logs(finished):
    folder = finished / "switch-2-seed1"
    found, validations = lines_of(folder), read_log(folder / "hydra_train.log").validations
    assert [point["updates"] for point in found] == [v.updates for v in validations] == [30, 60, 90]
    for point, validation in zip(found, validations):
        assert point["nll_loss"] == pytest.approx(validation.nll_loss, abs=6e-4)
        domains = point["by_domain"].values()
        mean = sum(d["nll_loss"] * d["tokens"] for d in domains) / sum(d["tokens"] for d in domains)
        assert mean == pytest.approx(point["nll_loss"], abs=2e-3)
        for metric, figure in (("max_expert_share", max), ("min_expert_share", min)):
            for layer, share in by_layer(validation.stats, metric).items():
                assert figure(point["layers"][layer]["load"]) == pytest.approx(share, abs=1e-4)
        for layer, entropy in by_layer(validation.stats, "router_entropy").items():
            assert point["layers"][layer]["entropy"] == pytest.approx(entropy, abs=1e-4)
        assert point["layers"].keys() == {"encoder.0", "decoder.0"}


def test_choices_of_the_last_point_are_those_of_the_last_checkpoint(finished, prepared):
    """Sentence by sentence, without padding; and the loads are those of the choices."""
    folder = finished / "switch-2-seed1"
    first, *_, last = lines_of(folder)
    kept = points.load_choices(folder / points.FILE, last["updates"] + 1)
    model = translator.Translator(str(folder), "checkpoint_last.pt")
    texts = [read_lines(prepared / "raw" / f"valid.{language}") for language in ("en", "de")]
    found = {"encoder.0": [], "decoder.0": []}
    for source, target in (model.encode_pair(*pair) for pair in zip(*texts)):
        previous = torch.cat([target[-1:], target[:-1]])
        with watch_routing(model.model) as seen, torch.no_grad():
            model.model(source[None], torch.tensor([len(source)]), previous[None])
        for layer, routing in seen.items():
            found[layer] += routing.expert_index.tolist()
    for layer, choices in found.items():
        # Padding rounds otherwise, which may turn a choice or two.
        assert np.mean(kept[layer] != np.array(choices)) < 0.01
        shares = np.bincount(kept[layer].ravel(), minlength=2) / kept[layer].size
        assert last["layers"][layer]["load"] == pytest.approx(shares.tolist(), abs=1e-5)
        assert last["layers"][layer]["load_by_domain"].keys() == set(DOMAINS)
        assert first["layers"][layer]["drift"] is None
        assert last["layers"][layer]["drift"] is not None


def test_drift_is_from_the_point_before_whatever_was_written_last(tmp_path):
    """A crash between the choices of a point and its line: it is measured again."""
    path = tmp_path / points.FILE
    for updates in (10, 20):
        points.save_choices(path, updates, {"encoder.0": np.full((3, 1), updates)})
    assert points.load_choices(path, 20)["encoder.0"].tolist() == [[10]] * 3
    assert points.load_choices(path, 10) == {}
    points.forget_choices(path, 20)
    assert points.load_choices(path, 21)["encoder.0"].tolist() == [[20]] * 3
    assert [each.name for each in tmp_path.iterdir()] == ["points.20.npz"]


def test_a_line_is_json_and_takes_the_place_of_what_came_after(tmp_path):
    path = tmp_path / points.FILE
    measured = {"seconds": 1.0, "loss": 2.0, "nll_loss": points.number(math.nan), "layers": {}}
    for updates in (10, 20, 30, 20):
        points.add_point(path, {"updates": updates, **measured})
    assert points.read_points(path) == [{"updates": n, **measured} for n in (10, 20)]
    points.add_point(path, {"updates": 30, **measured, "loss": math.inf})
    assert [each["loss"] for each in points.read_points(path)] == [2.0, 2.0, None]
    assert json.loads(path.read_text().splitlines()[2])["nll_loss"] is None


def test_translations_of_the_last_point_are_those_of_the_last_checkpoint(
    finished, prepared, monkeypatch
):
    """Against the project's translator: greedy, the same lines, the same scores."""
    # A model of so few updates runs into the limit.
    monkeypatch.setattr(translator, "MAX_LEN_B", translated.MAX_OUTPUT)
    folder = finished / "switch-2-seed1"
    point = lines_of(folder)[-1]
    sources, references = (read_lines(prepared / "raw" / f"valid.{x}") for x in ("en", "de"))
    domains = read_lines(prepared / "raw" / "valid.domain")
    chosen = measuring.choose_lines(12, dict.fromkeys(range(len(sources))), domains)
    assert len(chosen) == point["sentences"] == 12
    assert sorted(domains[n] for n in chosen) == sorted(DOMAINS * 6)
    model = translator.Translator(str(folder), "checkpoint_last.pt")
    texts = [t.text for t in model.translate([sources[n] for n in chosen], beam=1)]
    expected = scoring.score(texts, [references[n] for n in chosen], "13a")
    assert point["bleu"] == pytest.approx(expected["bleu"]["score"], abs=1e-3)
    assert point["chrf"] == pytest.approx(expected["chrf"]["score"], abs=1e-3)
    assert point["chrf"] > 1
    assert point["signatures"]["bleu"] == expected["bleu"]["signature"]
    poems = [place for place, n in enumerate(chosen) if domains[n] == "poems"]
    of_poems = scoring.score(
        [texts[i] for i in poems], [references[chosen[i]] for i in poems], "13a"
    )
    expected_poems = of_poems["chrf"]["score"]
    assert point["by_domain"]["poems"]["chrf"] == pytest.approx(expected_poems, abs=1e-3)


def test_time_and_words_add_up(finished):
    for name in ("switch-2-seed1", "dense-seed1"):
        found = lines_of(finished / name)
        log = (finished / name / "hydra_train.log").read_text()
        for before, after in zip(found, found[1:]):
            assert 0 < before["seconds"] < after["seconds"]
            assert 0 < before["cpu_seconds"] < after["cpu_seconds"]
        # Validation is left out, so it is less than what fairseq says of the whole.
        whole = float(log.rpartition("done training in ")[2].split()[0])
        assert found[-1]["seconds"] < whole + 0.1
        inner = [json.loads(x.partition("- ")[2]) for x in log.splitlines() if "train_inner" in x]
        words = sum(5 * float(line["wpb"]) for line in inner)
        assert found[-1]["words"] == pytest.approx(words, rel=1e-3)


def test_a_dense_model_has_points_too(finished):
    point = lines_of(finished / "dense-seed1")[-1]
    assert point["layers"] == {}
    assert {"bleu", "nll_loss", "by_domain"} <= point.keys()


def test_damaged_points_are_told(tmp_path):
    path = tmp_path / points.FILE
    path.write_text('{"updates": 10}\n{"upda')
    with pytest.raises(UserError, match=f"cannot read {path}"):
        points.read_points(path)


@pytest.mark.slow
def test_text_that_does_not_belong_to_the_data_is_refused(prepared, tmp_path):
    other = shutil.copytree(prepared, tmp_path / "other")
    write_lines(other / "raw" / "valid.de", ["nur eine Zeile"])
    plan = write_plan(tmp_path / "plan.yaml", other, updates=30, arms={"d": {"router": "dense"}})
    errors = study(plan, "--output", tmp_path / "study", status=2)
    assert "1 of 1 runs failed: d-seed1 (train: see " in errors
    log = (tmp_path / "study" / "d-seed1" / "train.log").read_text()
    assert "has 1 lines and the validation set 20 pairs: give --points-text" in log


# TensorBoard


def events(folder):
    """(tag, step) and the kind of value of every event, from the files' own framing."""
    from tensorboardX.proto.event_pb2 import Event

    found = {}
    for path in sorted(folder.rglob("events.out.tfevents.*")):
        data = path.read_bytes()
        place = 0
        while place < len(data):
            (length,) = struct.unpack_from("<Q", data, place)
            event = Event.FromString(data[place + 12 : place + 12 + length])
            place += 12 + length + 4
            for value in event.summary.value:
                found[value.tag, event.step] = value
    return found


def test_tensorboard_shows_the_points(finished):
    folder = finished / "switch-2-seed1"
    found = events(folder / "tensorboard" / "valid")
    for point in lines_of(folder):
        for name, number in measuring.scalars(point).items():
            assert found[name, point["updates"]].simple_value == pytest.approx(number, rel=1e-5)
        image = found["expert_load", point["updates"]].image
        assert image.width > 100 and image.encoded_image_string[:4] == b"\x89PNG"
        assert ("loss", point["updates"]) in found
    names = measuring.scalars(lines_of(folder)[-1])
    assert {"bleu", "bleu/poems", "drift/encoder.0", "load/decoder.0/1"} <= names.keys()
