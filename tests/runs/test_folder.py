"""What is read from the folder of a run, and which of its evaluations."""

import pytest
from support.run_folders import evaluation, translations

from fairseq_sparsemixer.files import write_json
from fairseq_sparsemixer.runs.folder import ROUTING, STUDY_STATE, find_runs, read_run


def test_an_end_before_max_update_is_an_end(place):
    """By early stopping, or by epochs."""
    place.run("a", max_update=4000)
    place.run("b", router="hash", max_update=0)
    _, rows, _ = place.table()
    assert rows["switch-4"]["updates"] == rows["hash-4"]["updates"] == 300


def test_a_folder_counts_once_however_it_is_named(place):
    folder = place.run("model=big,schedule=short/switch-4-seed1")
    report, _, _ = place.table(place.runs, folder, folder / "..")
    assert [run["folder"] for run in report["runs"]] == [str(folder)]


def test_runs_below_a_run_and_behind_links_count_too(place, tmp_path):
    folder = place.run("a")
    place.run("elsewhere/b", router="hash").rename(tmp_path / "b")
    (folder / "linked").symlink_to(tmp_path / "b")
    (tmp_path / "b" / "back").symlink_to(place.runs)
    nested = place.run("a/nested", router="random")
    assert find_runs([place.runs]) == [folder, folder / "linked", nested]


def test_who_scores_a_run_is_told(place):
    folder = place.run("a", scored=False)
    assert read_run(folder).note == f"not scored; fairseq-sparsemixer evaluate {folder} does it"
    (folder / STUDY_STATE).write_text("{}")
    note = f"not scored; fairseq-sparsemixer study {folder.parent} does it"
    assert read_run(folder).note == note


def test_what_the_report_keeps_is_no_evaluation(place):
    folder = place.run("a")
    (folder / ROUTING).write_text("{")
    assert place.table()[1]["switch-4"]["bleu"] > 0


def test_scores_chooses_among_evaluations(place, capsys):
    folder = place.run("a", keep=0.9)
    evaluation(folder, translations(0.5, 0), place.reference, name="test")
    message = place.error(capsys)
    assert "holds evaluation/test.checkpoint_last.json and test.json; choose one with" in message
    _, rows, _ = place.table("--scores", "test")
    low = rows["switch-4"]["bleu"]
    for name in ("test.checkpoint_last", "evaluation/test.checkpoint_last.json"):
        assert place.table("--scores", name)[1]["switch-4"]["bleu"] > low + 10
    assert "no run has an evaluation named tset" in place.error(capsys, "--scores", "tset")
    # Other files of JSON are no evaluations.
    write_json(folder / "demo.json", {"finished": True})
    assert place.table("--scores", "test.json")[1]["switch-4"]["bleu"] == low


def test_a_run_without_the_chosen_evaluation_is_listed(place):
    place.run("a")
    folder = place.run("b", router="hash", scored=False)
    evaluation(folder, translations(0.5, 0), place.reference, name="test")
    _, rows, text = place.table("--scores", "test.checkpoint_last")
    assert list(rows) == ["switch-4"]
    assert "hash-4, seed 1" in text
    assert "not scored as test.checkpoint_last" in text


@pytest.mark.parametrize("text", ["{", "a: [", "- 1", "common: {seed: 1}"])
def test_a_config_that_is_none(text, place, capsys):
    folder = place.run("a")
    (folder / ".hydra" / "config.yaml").write_text(text)
    assert "leave its folder out of RUN" in place.error(capsys)


def test_a_damaged_evaluation_is_named(place, capsys):
    folder = place.run("a")
    (folder / "evaluation" / "x.json").write_text('{"scores": ')
    message = place.error(capsys)
    assert "x.json" in message
    assert "remove it" in message
