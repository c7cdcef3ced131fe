"""What is changed in fairseq and in the process, and what is not."""

import contextlib
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fairseq import file_utils
from fairseq.data import Dictionary, data_utils
from fairseq.tasks import FairseqTask
from fairseq.trainer import Trainer
from support.models import build

from fairseq_sparsemixer.errors import UserError
from fairseq_sparsemixer.moe.feed_forward import moe_layers


def run_alone(program, **environment):
    """A program in a process of its own; what it ended with."""
    return subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


# A layer in plain PyTorch

UNCHANGED = """
import sys, torch
before = sys.excepthook, list(torch.serialization.get_safe_globals())
from fairseq_sparsemixer.moe import MoEFeedForward
MoEFeedForward(4, 8, 2)(torch.randn(3, 4))[0].sum().backward()
assert (sys.excepthook, list(torch.serialization.get_safe_globals())) == before
assert "fairseq" not in sys.modules and "fairseq_sparsemixer.compat" not in sys.modules
"""
TORCHRUN = {"TORCHELASTIC_RUN_ID": "1", "WORLD_SIZE": "2", "RANK": "0"}


def test_the_layer_changes_nothing_in_a_process_of_torchrun():
    result = run_alone(UNCHANGED, CUDA_VISIBLE_DEVICES="", **TORCHRUN)
    assert result.returncode == 0, result.stderr


def test_the_layer_works_beside_a_broken_fairseq(tmp_path):
    (tmp_path / "fairseq.py").write_text("import nothing_of_this_name")
    program = f"import sys\nsys.path.insert(0, {str(tmp_path)!r})\n{UNCHANGED}"
    for _ in range(2):  # nor does the second attempt to import it fare better
        program += "try: import fairseq\nexcept ModuleNotFoundError: pass\nelse: assert False\n"
    result = run_alone(program + "MoEFeedForward(4, 8, 2)(torch.randn(3, 4))")
    assert result.returncode == 0, result.stderr


# Data and dictionaries


def test_data_of_more_tokens_than_the_dictionary_has(toy_corpus, tmp_path):
    """As where it was cut at the end of a line."""
    data = str(toy_corpus / "joined" / "valid.en-de.de")
    whole = toy_corpus / "joined" / "dict.de.txt"
    cut = tmp_path / "dict.de.txt"
    cut.write_text("".join(whole.read_text().splitlines(keepends=True)[:-3]))
    assert data_utils.load_indexed_dataset(data, Dictionary.load(str(whole)))
    entries = len(Dictionary.load(str(cut)))
    with pytest.raises(UserError, match=rf"{data} .* dictionary only {entries} entries"):
        data_utils.load_indexed_dataset(data, Dictionary.load(str(cut)))


# The error that is printed


def printed(capsys, program, module="__main__"):
    """What the hook prints for the error of a program that runs as a module."""
    try:
        exec(compile(program, "program", "exec"), {"__name__": module, "UserError": UserError})
    except Exception:
        with contextlib.suppress(SystemExit):
            sys.excepthook(*sys.exc_info())
    return capsys.readouterr().err


@pytest.mark.parametrize(
    "program",
    [
        "raise UserError('no\\nsuch\\r\\nfile')",
        "try: 1 / 0\nexcept ZeroDivisionError as error: raise UserError('no such file') from error",
        "try: 1 / 0\nexcept ZeroDivisionError: raise UserError('no such file')",
    ],
)
def test_a_user_error_is_printed_alone(capsys, program):
    assert printed(capsys, program) == "error: no such file\n"


@pytest.mark.parametrize(
    ("handler", "message"),
    [
        ("raise RuntimeError('the disk is gone') from None", "RuntimeError: the disk is gone"),
        ("raise RuntimeError('the disk is gone')", "RuntimeError: the disk is gone"),
        ("raise RuntimeError('the disk is gone') from error", "RuntimeError: the disk is gone"),
        ("raise Exception('the disk is gone')", "Exception: the disk is gone"),
        ("undefined", "NameError: name 'undefined' is not defined"),
    ],
)
def test_an_error_in_a_handler_is_printed_whole(capsys, handler, message):
    """In place of the UserError that was caught, which is not why the program ended."""
    output = printed(
        capsys, f"try: raise UserError('caught')\nexcept UserError as error: {handler}"
    )
    lines = output.splitlines()
    assert lines[0].startswith("Traceback") and message in lines
    assert not [line for line in lines if line.startswith("error: ")]


def test_what_fairseq_says_of_a_checkpoint_gives_way_to_the_reason(capsys):
    program = (
        "try: raise UserError('it has no router')\nexcept Exception: raise Exception('Cannot')"
    )
    assert printed(capsys, program, "fairseq.trainer") == "error: it has no router\n"
    hidden = printed(capsys, f"{program} from None", "fairseq.trainer")
    assert "Exception: Cannot" in hidden and "it has no router" not in hidden


# Batches and samples of any kind


@pytest.mark.parametrize(
    "kind", [iter, tuple, list, np.array, lambda numbers: (n for n in numbers)]
)
def test_batches_of_any_iterable(kind, caplog):
    """As fairseq's own function, which reads it once."""
    numbers = list(range(10))
    batches = data_utils.batch_by_size(
        kind(numbers), lambda i: 1, max_sentences=4, required_batch_size_multiple=4
    )
    assert [batch.tolist() for batch in batches] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert "fairseq leaves out 2 of 10 sentences" in caplog.text


class Optimizer:
    def backward(self, loss):
        loss.backward()


@pytest.mark.parametrize("ignore_grad", [False, True])
@pytest.mark.parametrize("sample", [None, (1, 2), [], torch.zeros(2), {"id": 3}])
def test_samples_of_any_kind(sample, ignore_grad):
    model, seen = build(), []
    weight = torch.ones((), requires_grad=True)

    def criterion(model, sample):
        seen.append((sample, [layer.observing for layer in moe_layers(model)]))
        return weight * 2, 1, {}

    FairseqTask.train_step(FairseqTask(None), sample, model, criterion, Optimizer(), 0, ignore_grad)
    ((got, observing),) = seen
    if isinstance(sample, dict):
        assert got == ({**sample, "is_dummy": True} if ignore_grad else sample)
        assert "is_dummy" not in sample
    else:
        assert got is sample
    assert observing == [not ignore_grad] * 4
    assert weight.grad == (0 if ignore_grad else 2)


# Random numbers of several workers


def drawn(model, rank, updates, seed=1):
    """The first random numbers of an update of a worker."""
    worker = SimpleNamespace(
        cfg=SimpleNamespace(common=SimpleNamespace(seed=seed)),
        get_num_updates=lambda: updates,
        data_parallel_rank=rank,
        model=model,
        cuda=False,
    )
    Trainer._set_seed(worker)
    return tuple(torch.rand(4).tolist())


@pytest.mark.parametrize(
    "model", [build(), build(encoder_moe_layers="none", decoder_moe_layers="none")]
)
def test_each_worker_and_update_has_noise_of_its_own(model):
    """The dense baseline too; and always the same, as a run that goes on needs it."""
    wrapped = torch.nn.Sequential(model)
    draws = {(rank, n): drawn(wrapped, rank, n) for rank in range(3) for n in (0, 1, 1000)}
    assert len(set(draws.values())) == 9
    for (rank, updates), numbers in draws.items():
        assert drawn(wrapped, rank, updates) == numbers
    torch.manual_seed(1 + 1000)
    assert tuple(torch.rand(4).tolist()) == draws[0, 1000], "one worker draws as fairseq's"


def test_workers_of_other_models_draw_as_fairseq_has_it():
    model = torch.nn.Linear(2, 2)
    assert drawn(model, 1, 7) == drawn(model, 0, 7)


def test_the_name_of_a_fasta_file_runs_no_code(tmp_path, monkeypatch):
    """The languages of a data folder are read from its names, one of which is a program here."""
    monkeypatch.chdir(tmp_path)
    name = "test.en-$(touch ran).$(touch ran)"
    Path(f"{name}.fasta").write_text(">a\nAC\n>b\nA\n")
    with pytest.raises(UserError, match="plain letters"):
        data_utils.load_indexed_dataset(name, Dictionary())
    assert not Path("ran").exists()


@pytest.mark.parametrize("kind", ["up", "absolute", "link", "good"])
def test_an_archive_of_a_model_stays_in_its_folder(kind, tmp_path):
    """Nothing outside is written, and nothing of the user's moved."""
    own, packed = tmp_path / "own", tmp_path / "packed"
    own.mkdir()
    packed.mkdir()
    (own / "file").write_text("own")
    (packed / "dict.en.txt").write_text("packed")
    name = {"up": "../../own/file", "absolute": str(own / "file")}.get(kind, "model/dict.en.txt")
    with tarfile.open(tmp_path / "model.tar.gz", "w:gz") as archive:
        if kind == "link":
            link = tarfile.TarInfo("model")
            link.type, link.linkname = tarfile.SYMTYPE, str(own)
            archive.addfile(link)
        info = archive.gettarinfo(packed / "dict.en.txt")
        info.name = name
        archive.addfile(info, (packed / "dict.en.txt").open("rb"))
    if kind == "good":
        folder = file_utils.load_archive_file(str(tmp_path / "model.tar.gz"))
        assert Path(folder).exists()
    else:
        with pytest.raises(UserError, match="would write outside of its folder"):
            file_utils.load_archive_file(str(tmp_path / "model.tar.gz"))
    assert {path.name: path.read_text() for path in own.iterdir()} == {"file": "own"}


# Dictionaries


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"a 3\nb", "Incorrect dictionary format"),
        (b"a 3\nb 2\na 1\n", "Duplicate word .*'a'"),
        (b"a 3\n\xff\xfe 2\n", "Incorrect encoding"),
        (None, "Is a directory"),
    ],
)
def test_damaged_dictionaries_are_named(content, reason, tmp_path):
    path = tmp_path / "dict.en.txt"
    path.mkdir() if content is None else path.write_bytes(content)
    with pytest.raises(UserError, match=rf"the dictionary {path} \(.*{reason}.*\): copy it again"):
        Dictionary.load(str(path))
    with pytest.raises(UserError, match=r"dict\.de\.txt \(No such file"):
        Dictionary.load(str(tmp_path / "dict.de.txt"))
