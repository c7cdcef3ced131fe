"""Averages of checkpoints against the naive mean, and which checkpoints are chosen."""

import pytest
import torch
from support.commands import command

from fairseq_sparsemixer import cli
from fairseq_sparsemixer.errors import UserError
from fairseq_sparsemixer.evaluation import average
from fairseq_sparsemixer.runs import checkpoints

pytestmark = pytest.mark.usefixtures("one_thread")


def write_state(path, model, updates=0, maximize=False):
    """The smallest file that averaging takes for a checkpoint."""
    state = {
        "cfg": {"checkpoint": {"maximize_best_checkpoint_metric": maximize}},
        "model": model,
        "optimizer_history": [{"num_updates": updates}],
        "last_optimizer_state": {"state": torch.zeros(1000)},
        "extra_state": {"val_loss": updates, "ema": {"weight": torch.zeros(2)}},
    }
    torch.save(state, path)
    return path


def test_average_equals_the_naive_mean_and_stays_tied(run_dir, tmp_path):
    names = ["checkpoint_7_50.pt", "checkpoint_19_150.pt", "checkpoint_13_100.pt"]
    output = tmp_path / "averaged.pt"
    command("average", "--inputs", *(run_dir / name for name in names), "--output", output)
    averaged = torch.load(output)
    models = [torch.load(run_dir / name)["model"] for name in names]
    assert averaged["model"].keys() == models[0].keys()
    for key, value in averaged["model"].items():
        mean = sum(model[key].double() for model in models) / len(models)
        assert torch.equal(value, mean.to(models[0][key].dtype)), key
    tied = [averaged["model"][f"{side}.embed_tokens.weight"] for side in ("encoder", "decoder")]
    assert tied[0].data_ptr() == tied[1].data_ptr()
    assert "last_optimizer_state" not in averaged
    assert averaged["averaged_from"] == names
    assert averaged["optimizer_history"][-1]["num_updates"] == 150


def test_average_keeps_dtypes_and_takes_the_rest_from_the_newest(tmp_path):
    shared = torch.tensor([1.0, 2.0])
    paths = [
        write_state(
            tmp_path / "new.pt",
            {
                "half": torch.tensor([61440.0], dtype=torch.float16),
                "steps": torch.tensor([7]),
                "tied": shared,
                "also_tied": shared,
            },
            updates=9,
        ),
        write_state(
            tmp_path / "old.pt",
            {
                "half": torch.tensor([49152.0], dtype=torch.float16),
                "steps": torch.tensor([5]),
                "tied": torch.tensor([3.0, 4.0]),
                "also_tied": torch.tensor([5.0, 6.0]),
            },
            updates=3,
        ),
    ]
    average.average_checkpoints(paths, tmp_path / "out.pt")
    state = torch.load(tmp_path / "out.pt")
    model = state["model"]
    # The sum would overflow float16.
    assert model["half"].dtype == torch.float16 and model["half"].item() == 55296.0
    assert model["steps"].tolist() == [7]
    # Tied in one file only: two means, each its own.
    assert model["tied"].tolist() == [2.0, 3.0] and model["also_tied"].tolist() == [3.0, 4.0]
    assert state["extra_state"] == {"val_loss": 9}


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"a": torch.zeros(3)}, "parameter a has the shape [2] in .*one.pt and [3] in .*two.pt"),
        ({"b": torch.zeros(2)}, "one.pt has the parameter a and .*two.pt has not"),
    ],
)
def test_average_refuses_files_that_do_not_match(tmp_path, other, message):
    paths = [
        write_state(tmp_path / "one.pt", {"a": torch.zeros(2)}),
        write_state(tmp_path / "two.pt", other),
    ]
    with pytest.raises(UserError, match=message.replace("[", r"\[")):
        average.average_checkpoints(paths, tmp_path / "out.pt")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.pt", "two.pt"]


def test_last_is_chronological(run_dir):
    names = [path.name for path in checkpoints.last_checkpoints(run_dir, 4)]
    assert names == [
        "checkpoint9.pt",
        "checkpoint_13_100.pt",
        "checkpoint18.pt",
        "checkpoint_19_150.pt",
    ]


@pytest.mark.parametrize(("maximize", "best"), [(False, ["4.500", "10.250"]), (True, ["30.000"])])
def test_best_knows_which_way_is_better(tmp_path, maximize, best):
    for value in ("10.250", "4.500", "30.000"):
        # The digit after the decimals is fairseq's, and not part of the value.
        path = tmp_path / f"checkpoint.best_bleu_{value}7.pt"
        write_state(path, {"a": torch.zeros(1)}, maximize=maximize)
    chosen = checkpoints.best_checkpoints(tmp_path, len(best))
    assert [path.name for path in chosen] == [f"checkpoint.best_bleu_{value}7.pt" for value in best]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--last", 9], "found 5 .* lower --last"),
        (["--best", 3], "found 2 .* lower --best"),
        (["--last", 0], "--last 0"),
        ([], "add --last N or --best N"),
    ],
)
def test_average_says_which_flag_to_change(run_dir, tmp_path, flags, message):
    with pytest.raises(UserError, match=message):
        command("average", "--inputs", run_dir, *flags, "--output", tmp_path / "out.pt")


def test_who_kept_no_best_checkpoints_is_told_how(tmp_path):
    with pytest.raises(UserError, match=r"found no .* with checkpoint\.keep_best_checkpoints=5"):
        checkpoints.best_checkpoints(tmp_path, 5)


def test_average_of_files_takes_no_choice_and_reads_no_junk(tmp_path):
    junk = tmp_path / "junk.pt"
    junk.write_bytes(b"not a checkpoint")
    with pytest.raises(UserError, match="--last and --best choose from a run folder"):
        command("average", "--inputs", junk, "--last", 2, "--output", tmp_path / "out.pt")
    with pytest.raises(UserError, match=r"cannot read the checkpoint .*junk.pt"):
        command("average", "--inputs", junk, "--output", tmp_path / "out.pt")
    with pytest.raises(UserError, match=r"no checkpoint .*gone.pt"):
        command("average", "--inputs", tmp_path / "gone.pt", "--output", tmp_path / "out.pt")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_of_a_training_that_diverged_are_refused(run_dir, tmp_path, value, capsys):
    good = run_dir / "checkpoint_last.pt"
    state = torch.load(good)
    state["model"]["decoder.layers.0.moe.experts.w1"].view(-1)[7] = value
    bad = tmp_path / "bad.pt"
    torch.save(state, bad)
    named = f"{bad} is of a training that diverged"
    output = str(tmp_path / "averaged.pt")
    assert cli.main(["average", "--inputs", str(good), str(bad), "--output", output]) == 2
    assert f"{named} (decoder.layers.0.moe.experts.w1 is not finite); leave" in (
        capsys.readouterr().err
    )
    assert cli.main(["translate", str(bad), "--input", str(__file__), "--beam", "1"]) == 2
    assert f"{named} (decoder.layers.0.moe.experts.w1 is not finite); choose an earlier" in (
        capsys.readouterr().err
    )
