"""Studies: plans, points, the runner that may be killed, TensorBoard. Real runs on a toy corpus."""

import json
import math
import os
import shutil
import signal
import struct
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import yaml
from support import small_run

from fairseq_sparsemixer import cli
from fairseq_sparsemixer.corpora.stages import RECORD
from fairseq_sparsemixer.errors import UserError
from fairseq_sparsemixer.evaluation import scoring, translator
from fairseq_sparsemixer.files import read_lines, write_json, write_lines
from fairseq_sparsemixer.models.watching import choices_of_batch, watch_routing
from fairseq_sparsemixer.moe import Routing
from fairseq_sparsemixer.runs import points
from fairseq_sparsemixer.runs.folder import find_runs, read_run
from fairseq_sparsemixer.runs.grouping import group_runs
from fairseq_sparsemixer.runs.logs import by_layer, read_log
from fairseq_sparsemixer.study import runner
from fairseq_sparsemixer.study.plan import read_plan
from fairseq_sparsemixer.tasks import measuring, translation_with_routing
from fairseq_sparsemixer.training.settings import CONFIGS

DOMAINS = ("poems", "manuals")
# Small batches: of the sentences of a second epoch fairseq makes other batches when it starts anew.
TINY = [
    "dataset.max_tokens=40",
    "+model.encoder_layers=1", "+model.decoder_layers=1", "+model.encoder_embed_dim=32",
    "+model.decoder_embed_dim=32", "+model.encoder_ffn_embed_dim=64",
    "+model.decoder_ffn_embed_dim=64", "+model.encoder_attention_heads=2",
    "+model.decoder_attention_heads=2", "model.dropout=0.01", "optimization.lr=[0.01]",
    "lr_scheduler.warmup_updates=60", "common.log_interval=5", "task.points_sentences=12",
]  # fmt: skip
PLAN = {
    "updates": 90,
    "evaluate_every": 30,
    "seeds": [1],
    "jobs": 1,
    "beam": 1,
    "overrides": TINY,
    "arms": {
        "switch-2": {"router": "switch", "experts": 2},
        "dense": {"router": "dense"},
    },
}


@pytest.fixture(scope="module")
def prepared(corpus, tmp_path_factory):
    """The toy corpus with a record and with domains."""
    folder = shutil.copytree(corpus, tmp_path_factory.mktemp("corpus") / "corpus")
    write_json(folder / RECORD, {"corpus": "toy"})
    for split in ("valid", "test"):
        lines = read_lines(folder / "raw" / f"{split}.en")
        write_lines(folder / "raw" / f"{split}.domain", (DOMAINS[n % 2] for n in range(len(lines))))
    return folder


def write_plan(path, data, **changes):
    path.write_text(yaml.safe_dump({**PLAN, "data": str(data), **changes}, sort_keys=False))
    return path


def start(*arguments, **options):
    return subprocess.Popen(
        [sys.executable, "-m", "fairseq_sparsemixer.cli", "study", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        **options,
    )


def study(*arguments, status=0, **options):
    """Run a study to its end; what it printed."""
    process = start(*arguments, **options)
    output, errors = process.communicate(timeout=240)
    assert process.returncode == status, errors[-3000:]
    return output if status == 0 else errors


@pytest.fixture(scope="module")
def finished(shared, prepared):
    """A study that nothing disturbed."""

    def build(folder):
        folder.mkdir()
        study(write_plan(folder / "p.yaml", prepared), "--output", folder / "study")

    return shared.directory("finished_study", build) / "study"


def lines_of(folder):
    return points.read_points(folder / points.FILE)


# Points


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
    for updates in (10, 20, 30, 20):
        points.add_point(path, {"updates": updates, "nll_loss": points.number(math.nan)})
    assert points.read_points(path) == [
        {"updates": 10, "nll_loss": None},
        {"updates": 20, "nll_loss": None},
    ]
    with pytest.raises(ValueError, match="JSON"):
        points.add_point(path, {"updates": 30, "nll_loss": math.inf})
    assert len(points.read_points(path)) == 2


def test_translations_of_the_last_point_are_those_of_the_last_checkpoint(
    finished, prepared, monkeypatch
):
    """Against the project's translator: greedy, the same lines, the same scores."""
    # A model of so few updates runs into the limit.
    monkeypatch.setattr(translator, "MAX_LEN_B", translation_with_routing.MAX_OUTPUT)
    folder = finished / "switch-2-seed1"
    point = lines_of(folder)[-1]
    sources, references = (read_lines(prepared / "raw" / f"valid.{x}") for x in ("en", "de"))
    domains = read_lines(prepared / "raw" / "valid.domain")
    chosen = measuring.choose_lines(12, dict.fromkeys(range(len(sources))), domains)
    assert len(chosen) == point["sentences"] == 12
    assert sorted(domains[n] for n in chosen) == sorted(DOMAINS * 6)
    model = translator.Translator(str(folder), "checkpoint_last.pt")
    texts = [t.text for t in model.translate([sources[n] for n in chosen], beam=1)]
    expected = scoring.score(texts, [references[n] for n in chosen])
    assert point["bleu"] == pytest.approx(expected["bleu"]["score"], abs=1e-3)
    assert point["chrf"] == pytest.approx(expected["chrf"]["score"], abs=1e-3)
    assert point["chrf"] > 1
    assert point["signatures"]["bleu"] == expected["bleu"]["signature"]
    poems = [place for place, n in enumerate(chosen) if domains[n] == "poems"]
    of_poems = scoring.score([texts[i] for i in poems], [references[chosen[i]] for i in poems])
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


def test_figures_of_layers_by_hand():
    choices = {0: [[0], [1], [1]], 3: [[2], [2]], 5: [[-1], [0], [0]]}
    sentences = {
        line: measuring.Sentence(2.0, 4, {"encoder.0": np.array(rows, dtype=np.int16)})
        for line, rows in choices.items()
    }
    before = {"encoder.0": np.array([[0], [0], [1], [2], [0], [1], [0], [0]])}
    domains = ["a", "-", "-", "b", "-", "a"]
    stats = {"router_entropy/encoder.0": 0.5}
    figures = measuring.layer_figures(sentences, domains, {"encoder.0": 4}, stats, before)
    assert figures == {
        "encoder.0": {
            "load": [round(3 / 7, 6), round(2 / 7, 6), round(2 / 7, 6), 0.0],
            "entropy": 0.5,
            "drift": round(2 / 7, 6),
            "load_by_domain": {"a": [0.6, 0.4, 0.0, 0.0], "b": [0.0, 0.0, 1.0, 0.0]},
        }
    }
    assert measuring.domain_losses(sentences, domains) == {
        "a": {"nll_loss": round(4 / 8 / math.log(2), 4), "tokens": 8},
        "b": {"nll_loss": round(2 / 4 / math.log(2), 4), "tokens": 4},
    }
    other = {"encoder.0": np.zeros((9, 1))}  # another validation set
    del figures["encoder.0"]["load_by_domain"]
    figures["encoder.0"].update(drift=None, entropy=None)
    assert measuring.layer_figures(sentences, None, {"encoder.0": 4}, {}, other) == figures


def test_choices_of_two_experts_drift_by_the_share_that_is_new():
    one, two = (np.array(rows) for rows in ([[0, 1], [2, 3]], [[1, 0], [3, 0]]))
    sentences = {0: measuring.Sentence(1.0, 1, {"encoder.0": two})}
    figures = measuring.layer_figures(sentences, None, {"encoder.0": 4}, {}, {"encoder.0": one})
    assert figures["encoder.0"]["drift"] == 0.25


def test_choices_leave_out_padding_on_either_side():
    pad, length, batch = 1, 4, 2
    tokens = torch.tensor([[pad, 5, 6, 2], [7, 8, 9, 2]])
    index = torch.arange(length * batch).view(length, batch)  # the layer's order
    index[0, 0] = -1
    routing = Routing(index.view(-1, 1), *[torch.zeros(8, 1)] * 4)
    net_input = {"src_tokens": tokens, "prev_output_tokens": tokens.flip(1)}
    first, second = choices_of_batch({"encoder.0": routing}, net_input, pad)
    assert first["encoder.0"].tolist() == [[2], [4], [6]]
    assert second["encoder.0"].tolist() == [[1], [3], [5], [7]]
    flipped, _ = choices_of_batch({"decoder.0": routing}, net_input, pad)
    assert flipped["decoder.0"].tolist() == [[-1], [2], [4]]


@pytest.mark.parametrize(
    ("count", "expected"),
    [(1, [0, 1]), (4, [0, 1, 2, 5]), (6, [0, 1, 2, 3, 4, 6]), (99, range(8))],
)
def test_lines_are_spread_over_domains(count, expected):
    domains = ["a", "b", "a", "b", "a", "b", "b", "b"]
    assert measuring.choose_lines(count, dict.fromkeys(range(8)), domains) == list(expected)


def test_damaged_points_are_told(tmp_path):
    path = tmp_path / points.FILE
    path.write_text('{"updates": 10}\n{"upda')
    with pytest.raises(UserError, match=f"cannot read {path}"):
        points.read_points(path)


def test_text_that_does_not_belong_to_the_data_is_refused(prepared, tmp_path):
    other = shutil.copytree(prepared, tmp_path / "other")
    write_lines(other / "raw" / "valid.de", ["nur eine Zeile"])
    plan = write_plan(tmp_path / "plan.yaml", other, updates=30, arms={"d": {"router": "dense"}})
    errors = study(plan, "--output", tmp_path / "study", status=2)
    assert "1 of 1 runs failed: d-seed1 (train: see " in errors
    log = (tmp_path / "study" / "d-seed1" / "train.log").read_text()
    assert "has 1 lines and the validation set 20 pairs: give --points-text" in log


# The runner


def strip_times(point):
    timed = ("seconds", "cpu_seconds", "words_per_second")
    return {key: value for key, value in point.items() if key not in timed}


def test_what_the_runs_leave_can_be_compared(finished):
    """By `fairseq-sparsemixer table`: finished, scored, told apart."""
    arms = group_runs(map(read_run, find_runs([finished])))
    assert [(arm.name, [run.note for run in arm.runs]) for arm in arms] == [
        ("dense", [""]),
        ("switch-2", [""]),
    ]
    assert all(arm.runs[0].parameters["active"] for arm in arms)
    names = sorted(path.name for path in (finished / "dense-seed1").glob("*.pt"))
    assert names == ["checkpoint_last.pt"]


def test_the_same_command_does_nothing_more(finished, prepared, tmp_path):
    before = {p: p.stat().st_mtime_ns for p in finished.rglob("points.jsonl")}
    assert "2 runs, 2 of them finished before" in study(finished)
    assert {p: p.stat().st_mtime_ns for p in finished.rglob("points.jsonl")} == before


def test_killed_it_goes_on_and_loses_no_point(finished, prepared, tmp_path):
    """Killed in training, twice, moved, and gone on with from elsewhere: the points of a study that
    nothing disturbed."""
    arms = {"switch-2": PLAN["arms"]["switch-2"]}
    plan = write_plan(tmp_path / "plan.yaml", prepared, arms=arms)
    folder = tmp_path / "study"
    kept = []
    for number, ending in enumerate((signal.SIGKILL, signal.SIGTERM), 1):
        process = start(plan, "--output", folder)
        limit = time.monotonic() + 120
        while len(lines_of(folder / "switch-2-seed1")) < number:
            assert process.poll() is None and time.monotonic() < limit
            time.sleep(0.01)
        process.send_signal(ending)
        process.communicate(timeout=30)
        assert process.returncode != 0
        before, kept = kept, lines_of(folder / "switch-2-seed1")
        assert len(kept) >= number and kept[: len(before)] == before
    moved = folder.rename(tmp_path / "moved")
    assert "all 1 runs are finished" in study(moved, cwd=tmp_path)
    found = lines_of(moved / "switch-2-seed1")
    assert found[: len(kept)] == kept
    undisturbed = lines_of(finished / "switch-2-seed1")
    assert [strip_times(point) for point in found] == [strip_times(p) for p in undisturbed]
    seconds = [point["seconds"] for point in found]
    assert None not in seconds and seconds == sorted(seconds)


def test_a_time_budget_ends_it_in_order(prepared, tmp_path):
    plan = write_plan(tmp_path / "plan.yaml", prepared, updates=4000, evaluate_every=20)
    folder = tmp_path / "study"
    began = time.monotonic()
    output = study(plan, "--output", folder, "--minutes", 0.6, "--jobs", 2)
    assert time.monotonic() - began < 36 + 15
    assert "time is up: 2 of 2 runs are left; the same command goes on" in output
    assert "nothing was gained" not in output
    assert all(len(lines_of(folder / f"{arm}-seed1")) >= 1 for arm in ("switch-2", "dense"))
    assert not list(folder.rglob("*.partial"))


def test_killed_in_scoring_it_trains_no_further(finished, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "study")
    state = json.loads((folder / "dense-seed1" / "study.json").read_text())
    write_json(folder / "dense-seed1" / "study.json", {**state, "finished_updates": 0})
    (folder / "dense-seed1" / runner.SCORES).unlink()
    output = study(folder)
    assert "training" not in output and "dense-seed1: finished" in output
    scores = json.loads((folder / "dense-seed1" / runner.SCORES).read_text())
    assert scores["checkpoints"][0]["updates"] == 90


def test_a_plan_may_grow_but_not_change(finished, prepared, tmp_path, capsys):
    folder = shutil.copytree(finished, tmp_path / "study")
    shutil.rmtree(folder / "switch-2-seed1")
    before = lines_of(folder / "dense-seed1")
    dense = {"dense": {"router": "dense"}}
    # The corpus that it began with need not be there any more.
    grown = write_plan(tmp_path / "grown.yaml", tmp_path / "gone", updates=120, arms=dense)
    assert "1 runs, 0 of them finished before" in study(grown, "--output", folder)
    after = lines_of(folder / "dense-seed1")
    assert after[:3] == before and [p["updates"] for p in after] == [30, 60, 90, 120]
    (run,) = (r for r in map(read_run, find_runs([folder])) if r.name == "dense")
    assert run.note == "" and run.evaluation["checkpoints"][0]["updates"] == 120
    kept = (folder / "plan.yaml").read_bytes()
    for change in (
        {"overrides": [*TINY, "model.jitter_eps=0"]},
        {"evaluate_every": 10},
        {"beam": 2},
        {"config": "demo"},
    ):
        changed = write_plan(tmp_path / "changed.yaml", prepared, arms=dense, **change)
        errors = told(capsys, changed, "--output", folder)
        assert f"was trained with other {next(iter(change))}" in errors
        assert "give the arm another name" in errors
    assert (folder / "plan.yaml").read_bytes() == kept


def test_a_run_that_fails_does_not_keep_the_others_from_work(prepared, tmp_path):
    arms = {
        "bad": {"router": "dense", "overrides": ["dataset.train_subset=lost"]},
        "good": {"router": "dense"},
    }
    plan = write_plan(tmp_path / "plan.yaml", prepared, updates=30, arms=arms)
    errors = study(plan, "--output", tmp_path / "study", status=2)
    assert "1 of 2 runs failed: bad-seed1 (train: see " in errors
    assert len(lines_of(tmp_path / "study" / "good-seed1")) == 1


def test_a_damaged_run_does_not_keep_the_others_from_work(finished, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "study")
    for name in ("switch-2-seed1", "dense-seed1"):
        (folder / name / "study.json").unlink()
    (folder / "switch-2-seed1" / "checkpoint_last.pt").write_bytes(b"half")
    errors = study(folder, status=2)
    assert "1 of 2 runs failed: switch-2-seed1 (start: " in errors
    assert "remove it to begin anew" in errors
    assert json.loads((folder / "dense-seed1" / "study.json").read_text())["finished_updates"] == 90


def test_a_folder_that_was_only_prepared_needs_nothing_else(prepared, tmp_path):
    """Wherever it is carried to."""
    corpus = shutil.copytree(prepared, tmp_path / "corpus")
    plan = write_plan(tmp_path / "plan.yaml", corpus, updates=30, arms={"d": {"router": "dense"}})
    folder = tmp_path / "study"
    assert "1 runs to do" in study(plan, "--output", folder, "--prepare-only")
    shutil.rmtree(corpus)
    plan.unlink()
    carried = shutil.move(folder, tmp_path / "für a=b, (c) 'd' $e:f")
    assert "all 1 runs are finished" in study(carried, cwd="/")


def test_two_studies_do_not_share_a_folder(finished, prepared):
    process = subprocess.Popen(["flock", finished / ".lock", "sleep", "30"], start_new_session=True)
    try:
        time.sleep(0.3)
        errors = study(finished, status=2)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert "another process is training in" in errors and "--output" in errors


WRONG_PLANS = [
    ({"arms": None}, "arms is missing"),
    ({"updates": 70}, "updates must be a multiple of evaluate_every"),
    ({"updates": True}, "updates must be a whole number"),
    ({"seeds": 1}, "seeds must be a list"),
    ({"seeds": [1, 1]}, "a seed stands in seeds twice"),
    ({"jobs": 0}, "jobs must be a whole number of at least 1"),
    ({"epochs": 3}, "there is no key epochs; see docs/study.md"),
    ({"arms": ["dense"]}, "arms must be names"),
    ({"arms": {"a/b": {"router": "dense"}}}, "arm a/b: a name has letters"),
    ({"arms": {"a=b": {"router": "dense"}}}, "arm a=b: a name has letters"),
    ({"arms": {"a": {"router": ["switch"]}}}, "arm a needs router"),
    ({"arms": {1: {"router": "dense"}, "1": {"router": "dense"}}}, "1 stands there twice"),
    ({"config": "../x"}, "config must be the name of one of configs/"),
    ({"overrides": ["optimization.max_epoch=1"]}, "max_epoch is not set here: use updates"),
    ({"arms": {"a": {"experts": 4}}}, "arm a needs router"),
    ({"arms": {"a": {"router": "switch"}}}, "arm a: experts must be a whole number"),
    ({"arms": {"a": {"router": "dense", "experts": 2}}}, "is left out for dense"),
    ({"arms": {"a": {"router": "swich", "experts": 2}}}, "did you mean 'switch'"),
    ({"overrides": ["dropout"]}, "overrides must be a list of KEY=VALUE"),
    ({"overrides": ["common.seed=3"]}, "common.seed is not set here: use seeds"),
]


@pytest.mark.parametrize(("change", "message"), WRONG_PLANS)
def test_wrong_plans_are_told(tmp_path, change, message):
    path = write_plan(tmp_path / "plan.yaml", "data", **change)
    with pytest.raises(UserError, match=r"plan\.yaml") as error:
        read_plan(path)
    assert message in str(error.value)


def test_a_plan_that_is_no_yaml_is_told(tmp_path):
    for text in ("arms: [", "just words", "", "data: 5", "arms: {a: 1, a: 2}"):
        (tmp_path / "plan.yaml").write_text(text)
        with pytest.raises(UserError, match="plan"):
            read_plan(tmp_path / "plan.yaml")


def test_runs_go_seed_by_seed(tmp_path):
    plan = read_plan(write_plan(tmp_path / "plan.yaml", "data", seeds=[3, 5]))
    assert [run.name for run in plan.runs()] == [
        "switch-2-seed3",
        "dense-seed3",
        "switch-2-seed5",
        "dense-seed5",
    ]
    assert plan.runs()[0].overrides == [
        *TINY, "model.router=switch", "model.num_experts=2", "common.seed=3"
    ]  # fmt: skip


def test_the_plans_that_come_with_it_can_be_read():
    paths = list((CONFIGS / "studies").glob("*.yaml"))
    assert paths
    for path in paths:
        assert read_plan(path).arms


def told(capsys, *arguments):
    assert cli.main(["study", *map(str, arguments)]) == 2
    return capsys.readouterr().err


def test_wrong_use_is_told(prepared, tmp_path, capsys):
    plan = write_plan(tmp_path / "plan.yaml", tmp_path / "nothing")
    assert "say where to with --output" in told(capsys, plan)
    assert f"there is no prepared corpus with a test set in {tmp_path / 'nothing'}" in told(
        capsys, plan, "--output", tmp_path / "s"
    )
    (tmp_path / "file").touch()
    assert "is not a folder" in told(capsys, plan, "--output", tmp_path / "file")
    assert "holds no plan.yaml" in told(capsys, tmp_path / "s")
    assert "--minutes 0.0 does nothing" in told(capsys, plan, "--minutes", 0)
    typo = write_plan(tmp_path / "typo.yaml", prepared, overrides=["model.droput=0.2"])
    errors = told(capsys, typo, "--output", tmp_path / "t")
    assert "arm switch-2" in errors and "droput" in errors
    lost = write_plan(tmp_path / "lost.yaml", prepared, config="nothing")
    assert "check config in" in told(capsys, lost, "--output", tmp_path / "u")


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


# fairseq's own commands


def test_the_task_without_points_is_fairseqs(corpus, tmp_path):
    """fairseq-train with flags: points where asked for, and none without."""
    common = [
        "-m", "fairseq_cli.train", corpus / "bin", "--cpu", *small_run.USER_DIR,
        "--task", "translation_with_routing", "--arch", "switch_transformer_demo",
        "--encoder-layers", 1, "--decoder-layers", 1, "--encoder-embed-dim", 16,
        "--decoder-embed-dim", 16, "--encoder-ffn-embed-dim", 32, "--decoder-ffn-embed-dim", 32,
        "--encoder-attention-heads", 2, "--decoder-attention-heads", 2,
        "--share-all-embeddings", "--optimizer", "adam", "--lr", 0.01, "--max-tokens", 1000,
        "--max-update", 3, "--required-batch-size-multiple", 1, "--no-progress-bar",
        "--num-workers", 0,
    ]  # fmt: skip
    small_run.python(*common, "--save-dir", tmp_path / "plain")
    assert not list((tmp_path / "plain").glob("points*"))
    file = tmp_path / "own" / "p.jsonl"
    own = [*common, "--save-dir", tmp_path / "own", "--points-file", file]
    small_run.python(*own)
    (point,) = points.read_points(file)
    assert point["updates"] == 3 and "bleu" not in point
    weights = [
        torch.load(tmp_path / name / "checkpoint_last.pt")["model"] for name in ("plain", "own")
    ]
    assert all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())
    # Trained anew, its point is that of the new training.
    for path in (tmp_path / "own").glob("*.pt"):
        path.unlink()
    small_run.python(*own, "--seed", 2)
    (anew,) = points.read_points(file)
    assert anew["nll_loss"] != point["nll_loss"]
    # From a checkpoint whose clock is not known, neither is the time.
    file.with_suffix(".clock.json").unlink()
    small_run.python(*own, "--seed", 2, "--max-update", 4)
    _, last = points.read_points(file)
    unknown = ("seconds", "cpu_seconds", "words", "words_per_second")
    assert [last[key] for key in unknown] == [None] * 4
