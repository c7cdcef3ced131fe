"""Studies of pre-training, of classes of sentences, and of language models."""

import json
import re
import shutil

import pytest
from support.small_study import DOMAINS, lines_of, study, write_plan

from fairseq_sparsemixer import cli
from fairseq_sparsemixer.errors import UserError
from fairseq_sparsemixer.files import read_lines, write_json, write_lines
from fairseq_sparsemixer.runs.folder import STUDY_STATE as STATE
from fairseq_sparsemixer.study.layout import lay_out, made_with, task_overrides
from fairseq_sparsemixer.training.settings import compose

TINY = ["+model.encoder_layers=1", "+model.encoder_embed_dim=16", "+model.encoder_ffn_embed_dim=32"]
ARMS = {"switch-2": {"router": "switch", "experts": 2}, "dense": {"router": "dense"}}
PLAN = {
    "updates": 4,
    "evaluate_every": 2,
    "language": "de",
    "arms": ARMS,
    "overrides": [*TINY, "lr_scheduler.warmup_updates=1"],
}


@pytest.fixture(scope="session")
def with_domains(prepared, tmp_path_factory):
    """The corpus with domains of its training text, too."""
    folder = shutil.copytree(prepared, tmp_path_factory.mktemp("corpus") / "corpus")
    lines = read_lines(folder / "raw" / "train.de")
    write_lines(folder / "raw" / "train.domain", (DOMAINS[n % 2] for n in range(len(lines))))
    return folder


def test_a_plan_says_language_and_the_config_the_task(with_domains, tmp_path):
    """Models without a decoder are told nothing of its experts; classes are counted."""
    plan = write_plan(tmp_path / "plan.yaml", with_domains, **{**PLAN, "config": "finetuning"})
    laid_out, parameters = lay_out(plan, tmp_path / "study")
    assert parameters["dense"].total == parameters["dense"].active
    assert parameters["switch-2"].total > parameters["switch-2"].active
    settings = [*task_overrides(tmp_path / "study", laid_out), "checkpoint.save_dir=."]
    cfg = compose(tmp_path / "study" / "configs", settings, "finetuning")
    assert (cfg.task.data, cfg.task.num_classes) == ("data/de", 2)
    assert not any("decoder" in each for each in laid_out.arms["dense"])
    assert (tmp_path / "study" / "data" / "de" / "input0" / "train.idx").is_file()


def test_a_rate_that_ends_with_the_updates_keeps_a_plan_from_growing(with_domains, tmp_path):
    """And a run that began with random weights does not go on as a fine-tuned one."""
    path, folder = tmp_path / "plan.yaml", tmp_path / "study"
    begun, _ = lay_out(write_plan(path, with_domains, **PLAN, config="pretraining"), folder)
    run = begun.runs()[0]
    (folder / run.name).mkdir()
    write_json(folder / run.name / STATE, made_with(begun, run))
    for change, message in (
        ({"updates": 8}, r"other updates \(4, not 8\)"),
        ({"finetune_from": "x"}, r"other finetune_from \(nothing, not a study\)"),
    ):
        changed = write_plan(path, with_domains, **{**PLAN, "config": "pretraining", **change})
        with pytest.raises(UserError, match=message):
            lay_out(changed, folder)
    own = {**PLAN, "overrides": [*TINY, "lr_scheduler.total_num_update=50"]}
    plan, _ = lay_out(write_plan(path, with_domains, **own, config="pretraining"), tmp_path / "o")
    assert "updates" not in made_with(plan, plan.runs()[0])
    # Begun by a version that did not ask.
    state = {key: value for key, value in made_with(begun, run).items() if key != "updates"}
    write_json(folder / run.name / STATE, state)
    lay_out(write_plan(path, with_domains, **{**PLAN, "updates": 8}, config="pretraining"), folder)


def test_what_a_plan_of_one_text_lacks_is_told(prepared, tmp_path):
    def told(**changes):
        plan = write_plan(tmp_path / "plan.yaml", prepared, **{**PLAN, **changes})
        with pytest.raises(UserError) as raised:
            lay_out(plan, tmp_path / re.sub(r"\W", "", str(changes)))
        return str(raised.value)

    assert "the task of pretraining.yaml takes one text: say language" in told(
        config="pretraining", language=None
    )
    assert "the task of study.yaml takes pairs of sentences: leave language" in told(overrides=[])
    assert "holds no language fr: choose from de, en" in told(config="pretraining", language="fr")
    assert "have no domains, which finetuning.yaml tells apart: change data" in told(
        config="finetuning"
    )
    assert "elsewhere/switch-2-seed1 is not finished: finish the study elsewhere first" in told(
        config="pretraining", finetune_from="elsewhere"
    )
    assert "there is no" in told(config="pretraning")


@pytest.mark.slow
def test_each_run_is_fine_tuned_from_that_of_its_arm_and_seed(with_domains, tmp_path):
    """Then one table has both tasks, and a page each one; language models besides."""
    plan = {**PLAN, "seeds": [1, 2]}
    before, after, words = (tmp_path / name for name in ("before", "after", "words"))
    path = tmp_path / "plan.yaml"
    study(write_plan(path, with_domains, **plan, config="pretraining"), "--output", before)
    plan.update(config="finetuning", finetune_from=str(before), score="best")
    study(write_plan(path, with_domains, **plan), "--output", after)
    shutil.rmtree(before.rename(tmp_path / "gone") / "data")  # nothing is needed of it any more
    assert "4 runs, 4 of them finished before" in study(after)
    of_words = {**PLAN, "config": "language_model", "overrides": ["lr_scheduler.warmup_updates=1"]}
    study(write_plan(path, with_domains, **of_words), "--output", words)
    for folder, key in ((after, "accuracy"), (words, "bits_per_byte")):
        point = lines_of(folder / "switch-2-seed1")[-1]
        scores = json.loads((folder / "switch-2-seed1" / "evaluation" / "test.json").read_text())
        assert key in point and key in scores["scores"]
        assert point["layers"]
    runs = [str(tmp_path / name) for name in ("gone", "after", "words")]
    assert cli.main(["table", *runs, "--baseline", "dense", "--output", f"{tmp_path}/t"]) == 0
    tables = json.loads((tmp_path / "t.json").read_text())["tasks"]
    assert list(tables) == ["masked_lm", "sentence_prediction", "language_modeling"]
    assert [row["seeds"] for row in tables["sentence_prediction"]["rows"]] == ["1 2", "1 2"]
    for run in runs:
        assert cli.main(["report", run, "--output", f"{run}.html"]) == 0
    assert "accuracy (%)" in (tmp_path / "after.html").read_text()
