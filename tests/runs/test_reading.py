"""Reading a checkpoint runs no code, is bounded in memory, and takes no damage for weights."""

import contextlib
import json
import os
import random
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from fairseq import checkpoint_utils
from fairseq.models import MODEL_REGISTRY
from fairseq.models.transformer import TransformerModel
from support import commands, hostile, hostile_commands

from fairseq_sparsemixer import cli
from fairseq_sparsemixer.errors import UserError
from fairseq_sparsemixer.evaluation.translator import Translator
from fairseq_sparsemixer.runs import (
    allocations,
    archives,
    checkpoints,
    mending,
    reading,
    tensors,
    vetting,
)

NAME = "checkpoint_best.pt"


@pytest.mark.parametrize("kind", [*hostile.KINDS, *hostile.PICKLES])
def test_hostile_checkpoints(kind, run_dir, corpus, tmp_path, monkeypatch):
    """No code runs, and what is refused is refused in one line with a cure."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path("hostile_user_dir.py").write_text(f"open({hostile.CANARY!r}, 'w').close()\n")
    message = hostile.write(kind, run_dir / NAME, NAME)
    if message is None:
        assert Translator(NAME, data=corpus).translate(["the red house"])[0].text
    else:
        with pytest.raises(UserError, match=message) as caught:
            Translator(NAME, data=corpus)
        assert str(caught.value).startswith(f"cannot read the checkpoint {NAME}: it ")
        assert len(str(caught.value).splitlines()) == 1
        assert "weights_only" not in str(caught.value)
    assert not Path(hostile.CANARY).exists()


def test_no_field_of_a_configuration_is_evaluated(run_dir, corpus, tmp_path, monkeypatch):
    """Text that runs when it is evaluated, in each field in turn: refused, or never evaluated."""
    monkeypatch.chdir(tmp_path)
    with open(run_dir / NAME, "rb") as file:
        state = archives.contents(file)
    fields = [(part, key) for part, values in state["cfg"].items() for key in values or {}]
    assert len(fields) > 300
    refused, built = set(), 0
    for part, key in fields:
        before, state["cfg"][part][key] = state["cfg"][part][key], hostile.EVAL
        try:
            vetting.check(state)
        except archives.Untrusted:
            refused.add((part, key))
        else:
            if part in ("model", "task"):
                built += 1
                hostile.write_field(run_dir / NAME, NAME, part, key, hostile.EVAL)
                with contextlib.suppress(UserError):  # such a router or folder there is not
                    Translator(NAME, data=corpus)
        state["cfg"][part][key] = before
        assert not Path(hostile.CANARY).exists(), f"{part}.{key}"
    assert {("model", "encoder_layers"), ("model", "encoder_xformers_att_config")} <= refused
    assert 10 < built < 60  # names of files, languages and the like are text


@pytest.mark.parametrize("old_style", [False, True])
def test_what_fairseq_itself_wrote_before_is_read(old_style, run_dir, corpus, tmp_path):
    """The flags of all parts in one Namespace, as before fairseq 0.10."""
    state = commands.load(run_dir / NAME)
    if old_style:
        hostile._old_style(adaptive_softmax_cutoff="(4, 8)")(state)
        state["args"].adaptive_softmax_cutoff = None
        state["args"].left_pad_source = "True"
    torch.save(state, tmp_path / NAME)
    translator = Translator(str(tmp_path / NAME), data=corpus)
    (expected,) = Translator(str(run_dir / NAME), data=corpus).translate(["the red house"])
    assert translator.translate(["the red house"]) == [expected]


def test_who_trusts_a_file_may_say_so(run_dir, tmp_path, monkeypatch):
    path = tmp_path / NAME
    hostile.write("task that starts programs", run_dir / NAME, path)
    monkeypatch.setenv(reading.TRUST, "1")
    assert checkpoints.load_state(path)["cfg"].task._name == "audio_pretraining"
    # Code in the pickle is never run, in whichever way the file was written.
    for kind in ("pickle that runs code", "pickle of old torch", "bare pickle"):
        hostile.write(kind, run_dir / NAME, path)
        with pytest.raises(UserError, match="holds code"):
            checkpoints.load_state(path)
    hostile.write("half of it", run_dir / NAME, path)
    with pytest.raises(UserError):
        checkpoints.load_state(path)


@pytest.mark.parametrize("trusted", [False, True])
def test_a_flag_says_so_too(trusted, run_dir, corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(reading.TRUST, "")
    path = tmp_path / NAME
    hostile.write_field(run_dir / NAME, path, "distributed_training", "distributed_port", "x")
    text = corpus / "raw" / "test.en"
    flags = ["--data", str(corpus), "--input", str(text), "--beam", "1"]
    status = cli.main(["translate", str(path), *flags, *trusted * ["--trust-checkpoints"]])
    printed = capsys.readouterr()
    if trusted:
        assert status == 0
        assert len(printed.out.splitlines()) == len(text.read_text().splitlines())
    else:
        assert status == 2
        assert "; if you trust it, give --trust-checkpoints (fair" in printed.err


@pytest.mark.parametrize(
    "command",
    [
        "train",
        "average",
        "upcycle",
        "prune",
        "evaluate",
        "report",
        "translate",
        "study",
        "gradients",
    ],
)
def test_every_command_that_reads_checkpoints_takes_the_flag(command):
    parser = cli.build_parser()
    (commands_of,) = parser._subparsers._group_actions
    assert "--trust-checkpoints" in commands_of.choices[command]._option_string_actions


def test_the_variable_of_torch_that_trusts_every_pickle_changes_nothing(run_dir, tmp_path):
    hostile.write("pickle that runs code", run_dir / NAME, tmp_path / NAME)
    code = (
        "import fairseq_sparsemixer, os\n"
        "from fairseq import checkpoint_utils\n"
        f"checkpoint_utils.load_checkpoint_to_cpu({str(tmp_path / NAME)!r})"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1", reading.TRUST: "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith("error: cannot read the checkpoint")
    assert not (tmp_path / hostile.CANARY).exists()


def test_what_builds_nothing_takes_any_architecture(run_dir, tmp_path):
    """``average`` knows no --user-dir, and its output is checked by what builds from it."""
    hostile.write("unknown architecture", run_dir / NAME, tmp_path / NAME)
    state = checkpoints.load_state(tmp_path / NAME, to_average=True)
    assert same(state["model"], commands.load(run_dir / NAME)["model"])
    with pytest.raises(UserError, match="is not registered"):
        checkpoints.load_state(tmp_path / NAME)


def test_settings_of_transformers_are_typed_whoever_wrote_them():
    """A class of fairseq's transformer, or one of the user's own that is made of it."""

    class Own(TransformerModel):
        pass

    settings = {"_name": "own", "encoder_layers": "1 or None"}
    weight = archives.TensorInFile(archives._Storage(archives.STORAGES["FloatStorage"], "", 1), 0,
                                   (1,), (1,))  # fmt: skip
    for name, kind in (("own", Own), ("transformer_align", None)):
        cfg = {"model": {**settings, "_name": name}, "task": {"_name": "translation"}}
        with pytest.MonkeyPatch.context() as patch, pytest.raises(archives.Untrusted) as caught:
            if kind is not None:
                patch.setitem(MODEL_REGISTRY, name, kind)
            vetting.check({"cfg": cfg, "model": {"weight": weight}})
        assert "model.encoder_layers" in str(caught.value)
        cfg["model"]["encoder_layers"] = 2
        with pytest.MonkeyPatch.context() as patch:
            if kind is not None:
                patch.setitem(MODEL_REGISTRY, name, kind)
            vetting.check({"cfg": cfg, "model": {"weight": weight}})


@pytest.mark.parametrize("old_style", [False, True])
def test_best_is_by_the_settings_of_any_version(old_style, run_dir, tmp_path):
    state = commands.load(run_dir / NAME)
    if old_style:
        hostile._old_style(maximize_best_checkpoint_metric=True)(state)
    else:
        state["cfg"].pop("checkpoint")
    for value in ("1.000", "2.000"):
        torch.save(state, tmp_path / f"checkpoint.best_loss_{value}.pt")
    (best,) = checkpoints.best_checkpoints(tmp_path, 1)
    assert best.name == f"checkpoint.best_loss_{'2' if old_style else '1'}.000.pt"


def test_what_is_read_is_what_torch_reads(tmp_path):
    """Of every kind of number; views, parameters and shared storages as they were."""
    base = torch.arange(24.0)
    state = {
        "numbers": [
            torch.tensor([0, 1, 2]).to(getattr(torch, kind.dtype))
            for kind in archives.STORAGES.values()
        ],
        "views": {"part": base[3:15].view(3, 4).t(), "whole": base, "wide": base[:1].expand(1)},
        "parameter": torch.nn.Parameter(torch.ones(2, requires_grad=True)),
        "empty": (torch.empty(0, 3), torch.tensor(1.5)),
        "module": torch.nn.Linear(2, 2).state_dict(),
    }
    torch.save(state, tmp_path / NAME)
    with open(tmp_path / NAME, "rb") as file:
        read = tensors.fill(file, archives.contents(file))
    assert same(read, torch.load(tmp_path / NAME, weights_only=True))
    assert [each.dtype for each in read["numbers"]] == [each.dtype for each in state["numbers"]]
    read["views"]["whole"][3] = 99
    assert read["views"]["part"][0, 0] == 99
    assert read["module"]._metadata == state["module"]._metadata


# Sizes


def test_a_model_of_its_own_size_is_within_its_allowance(run_dir):
    """With a wide margin, so that no honest model is refused."""
    model = commands.load(run_dir / NAME)["model"]
    with open(run_dir / NAME, "rb") as file:
        held = archives.contents(file)["model"]
    records = {tensor.record: tensor.bytes_held for tensor in held.values()}
    unique = {tensor.data_ptr(): tensor.nbytes for tensor in model.values()}
    assert sum(records.values()) == sum(unique.values())
    allowed = allocations.allowance(held.values())
    assert allowed.bytes == 8 * sum(unique.values()) + (256 << 20)


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.empty(1 << 20, 1 << 20),
        lambda: torch.zeros((1 << 40,)),
        lambda: torch.arange(1 << 40),
        lambda: torch.nn.Linear(1 << 20, 1 << 20),
        lambda: torch.zeros(1 << 14, 1) * torch.zeros(1, 1 << 14),
        lambda: [torch.zeros(1) for _ in range(2000)],
    ],
)
def test_allocations_are_bounded_before_they_are_made(make):
    bounded = allocations.Bounded(allocations.Allowance(1 << 20, 1000))
    with pytest.raises(archives.Untrusted, match="larger than the parameters"), bounded:
        make()


def test_views_and_changes_in_place_take_nothing():
    with allocations.Bounded(allocations.Allowance(8 * 1000, 10_000)):
        tensor = torch.empty(1000)
        for _ in range(100):
            torch.nn.init.uniform_(tensor.view(10, 100))


# Damage


def flip(data, bit):
    damaged = bytearray(data)
    damaged[bit // 8] ^= 1 << bit % 8
    return bytes(damaged)


def bits_of_every_part(path, count, seed):
    """Bits drawn from each part alike: pickle, tensors, other records, headers, directory."""
    with zipfile.ZipFile(path) as archive:
        infos, directory = archive.infolist(), archive.start_dir
    parts = {"header": [], "pickle": [], "tensors": [], "others": []}
    for info in infos:
        # 30 bytes, the name, and a field of padding whose length is in the header.
        header = path.read_bytes()[info.header_offset : info.header_offset + 30]
        start = info.header_offset + 30 + int.from_bytes(header[26:28], "little")
        start += int.from_bytes(header[28:30], "little")
        name = info.filename.partition("/")[2]
        part = {"data.pkl": "pickle"}.get(name, "tensors" if name[:5] == "data/" else "others")
        parts["header"].append((info.header_offset, start))
        parts[part].append((start, start + info.file_size))
    parts["directory"] = [(directory, path.stat().st_size)]
    rng = random.Random(seed)
    chosen = []
    for ranges in parts.values():
        places = [place for begin, end in ranges for place in range(begin, end)]
        chosen += [8 * rng.choice(places) + rng.randrange(8) for _ in range(count // len(parts))]
    return chosen


def same(one, other):
    """Whether two states are equal, tensors bit by bit."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return torch.equal(one, other) if torch.is_tensor(one) else one == other


@pytest.mark.parametrize(
    "count",
    [50, pytest.param(300, marks=pytest.mark.slow), pytest.param(3000, marks=pytest.mark.slow)],
)
def test_a_flipped_bit_is_refused_or_changes_nothing(count, run_dir, tmp_path):
    good = run_dir / NAME
    data, expected = good.read_bytes(), commands.load(good)
    path = tmp_path / NAME
    taken = 0
    for bit in bits_of_every_part(good, count, seed=count):
        path.write_bytes(flip(data, bit))
        intact = mending.is_intact(path)
        try:
            state = checkpoints.load_state(path, to_average=True)
        except UserError as error:
            assert "cannot read the checkpoint" in str(error)
            assert "copy it again" in str(error) or "is not a checkpoint" in str(error), error
            continue
        assert intact and same(state, expected), bit
        taken += 1
    # Of headers some bits mean nothing: times, padding. Of what is in records, each counts.
    assert taken < count * 0.4


@pytest.mark.parametrize("content", [b"", b"text\n", b"PK\x03\x04", b"\x80\x02.", bytes(100)])
def test_is_intact_answers(content, tmp_path):
    (tmp_path / NAME).write_bytes(content)
    assert not mending.is_intact(tmp_path / NAME)
    assert not mending.is_intact(tmp_path / "nowhere.pt")
    assert not mending.is_intact(tmp_path)


# numpy


@pytest.mark.parametrize("module", ["numpy.core.multiarray", "numpy._core.multiarray"])
def test_numbers_of_numpy_are_read_as_pythons(module, run_dir, tmp_path):
    """By the names of numpy 1 and 2; nothing of numpy's own is called."""
    state = commands.load(run_dir / NAME)
    numbers = {
        "float": np.float64(0.25), "int": np.int64(-3), "bool": np.bool_(True),
        "small": np.float32(0.5), "list": np.array([1, 2, 3]), "table": np.eye(2),
        "columns": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    }  # fmt: skip
    state["extra_state"]["metrics"] = {**numbers, "in": [(numbers["float"], numbers["list"])]}
    torch.save(state, tmp_path / "own.pt")
    own = np._core.multiarray.__name__ if hasattr(np, "_core") else "numpy.core.multiarray"
    with zipfile.ZipFile(tmp_path / "own.pt") as old, zipfile.ZipFile(tmp_path / NAME, "w") as new:
        for name in old.namelist():
            data = old.read(name)
            new.writestr(name, data.replace(f"c{own}\n".encode(), f"c{module}\n".encode()))
    read = reading.read(tmp_path / NAME)["extra_state"]["metrics"]
    assert read.pop("in") == [(0.25, [1, 2, 3])]
    assert read == {key: value.tolist() for key, value in numbers.items()}
    assert {type(value) for value in read.values()} == {float, int, bool, list}


def test_objects_of_numpy_are_not_read(run_dir, tmp_path):
    state = commands.load(run_dir / NAME)
    state["extra_state"]["metrics"] = np.array([{}, 1], dtype=object)
    torch.save(state, tmp_path / NAME)
    with pytest.raises(UserError, match="numpy's type 'O8', which are no numbers"):
        checkpoints.load_state(tmp_path / NAME)


def test_plain_values_are_written(tmp_path):
    state = {"extra_state": {"best": np.float64(1.5), "counts": np.array([1, 2])}, "kept": [1]}
    checkpoint_utils.torch_persistent_save(state, str(tmp_path / NAME))
    assert commands.load(tmp_path / NAME) == {
        "extra_state": {"best": 1.5, "counts": [1, 2]},
        "kept": [1],
    }
    assert isinstance(state["extra_state"]["counts"], np.ndarray)


def test_a_tensor_is_written_without_what_others_keep_at_it(tmp_path):
    """As fairscale does under fully_sharded."""
    weight, moment = torch.ones(2), torch.zeros(2)
    weight._has_been_cloned = True
    state = {"model": {"weight": weight}, "moments": [moment]}
    checkpoint_utils.torch_persistent_save(state, str(tmp_path / NAME))
    with open(tmp_path / NAME, "rb") as file:
        read = tensors.fill(file, archives.contents(file))
    assert torch.equal(read["model"]["weight"], weight) and weight._has_been_cloned
    assert reading.plain(state["moments"]) is state["moments"]


@pytest.mark.slow
def test_what_every_option_of_logging_leaves_is_read(corpus, tmp_path):
    """Train, resume, average, translate; numpy's numbers come from BLEU."""
    settings = {
        **commands.SIZE, **commands.CRITERION, **commands.RUN, "source-lang": "en",
        "target-lang": "de", "share-all-embeddings": True, "decoder-embed-dim": 32,
        "decoder-ffn-embed-dim": 64, "optimizer": "adam", "lr": 0.01, "store-ema": True,
        "lr-scheduler": "reduce_lr_on_plateau", "report-accuracy": True, "eval-bleu": True,
        "eval-bleu-remove-bpe": "sentencepiece", "eval-bleu-print-samples": True,
        "eval-bleu-args": '{"beam": 2, "max_len_b": 10}', "best-checkpoint-metric": "bleu",
        "maximize-best-checkpoint-metric": True, "save-interval-updates": 60,
        "keep-best-checkpoints": 2, "validate-interval": 99, "save-interval": 99,
        "save-dir": tmp_path, "max-tokens": 1000, "user-dir": commands.PACKAGE,
    }  # fmt: skip
    for updates in (120, 180):
        words = [corpus / "bin", *commands.flags({**settings, "max-update": updates})]
        commands.run("fairseq_cli.train", *words)
    state = commands.load(tmp_path / "checkpoint_last.pt")  # torch reads it: it is plain
    assert state["optimizer_history"][-1]["num_updates"] == 180
    assert state["extra_state"]["best"] > 0
    for choice in ("--last", "--best"):
        output = tmp_path / f"mean{choice}.pt"
        commands.command("average", "--inputs", tmp_path, choice, 2, "--output", output)
        assert Translator(str(output), data=corpus).translate(["the red house"])[0].text


# All commands


@pytest.mark.slow
def test_every_command_on_every_hostile_checkpoint(corpus, run_dir, study, tmp_path):
    """Each in a process of its own, whose memory is measured (support.hostile_commands)."""
    (tmp_path / "trials").mkdir()
    result = subprocess.run(
        [sys.executable, "-m", "support.hostile_commands", corpus, run_dir, study,
         tmp_path / "trials"],
        cwd=Path(hostile_commands.__file__).parents[1], capture_output=True, text=True, check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    trials = [json.loads(line) for line in result.stdout.splitlines()]
    assert not [trial for trial in trials if "failed" in trial]
    usual = {trial["command"]: trial["peak"] for trial in trials if trial["kind"] is None}
    assert len(usual) >= 12
    for trial in trials:
        hostile_commands.check(trial, usual[trial["command"]])
