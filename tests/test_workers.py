"""Several workers: started on a CPU, named in one line where they fail, ended together."""

import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from fairseq.dataclass.configs import FairseqConfig
from fairseq.distributed import utils as distributed_utils
from omegaconf import OmegaConf
from support import commands
from support.wmt14 import TINY

from fairseq_sparsemixer import workers
from fairseq_sparsemixer.errors import UserError

TORCHRUN = {workers.TORCHRUN: "1", "WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}
TORCHRUN.update(MASTER_ADDR="localhost", MASTER_PORT="1")
SECONDS = 20
"""That the others may take to end, on a busy machine; they take less than two on an idle one."""


# Starting


@pytest.fixture
def begun(monkeypatch):
    """What a command would begin: how many processes start (0: it is a worker), and the settings.

    Called with the number of GPUs, the environment, and settings of distributed training.
    """

    def begin(gpus, environment, main=None, **settings):
        found = []
        with monkeypatch.context() as patch:
            patch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
            patch.setattr(torch.cuda, "device_count", lambda: gpus)
            patch.setattr(torch.cuda, "set_device", lambda device: None)
            for name in TORCHRUN:
                patch.delenv(name, raising=False)
            for name, value in environment.items():
                patch.setenv(name, value)

            def spawn(fn, args, nprocs, join=True):
                found.extend([nprocs, args[1].distributed_training])

            def be_worker(number, main, cfg, kwargs):
                found.extend([0, cfg.distributed_training])

            patch.setattr(torch.multiprocessing, "spawn", spawn)
            patch.setattr(distributed_utils, "distributed_main", be_worker)
            cfg = OmegaConf.structured(FairseqConfig)
            cfg.distributed_training.distributed_world_size = max(1, gpus)
            cfg.distributed_training.update(settings)
            distributed_utils.call_main(cfg, lambda cfg: found.extend([None, None]))
        return found

    return begin


def test_workers_on_a_cpu_are_started_and_find_each_other(begun):
    processes, where = begun(0, {}, distributed_world_size=3)
    assert (processes, where.distributed_backend) == (3, "gloo")
    assert where.distributed_init_method.startswith("tcp://localhost:")
    assert where.distributed_rank is None  # by the number of the process
    _, where = begun(0, {}, distributed_world_size=3, distributed_port=1234)
    assert where.distributed_init_method == "tcp://localhost:1234"


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_workers_of_torchrun_on_a_cpu_find_each_other(begun, world_size):
    """Of world size 1 fairseq would start as many trainings, all into one folder."""
    processes, where = begun(0, TORCHRUN, distributed_world_size=world_size)
    assert (processes, where.distributed_backend) == (0, "gloo")
    assert (where.distributed_rank, where.distributed_world_size) == (1, 2)
    assert where.distributed_init_method == "env://"


def test_workers_of_torchrun_on_nodes_of_one_gpu_find_each_other(begun):
    """fairseq takes the one GPU that it sees for the world."""
    processes, where = begun(1, TORCHRUN)
    assert (processes, where.distributed_backend) == (0, "nccl")
    assert (where.distributed_rank, where.distributed_world_size, where.device_id) == (1, 2, 0)


def test_what_works_is_left_alone(begun):
    assert begun(0, {}) == begun(0, {**TORCHRUN, "WORLD_SIZE": "1"}) == [None, None]
    processes, where = begun(2, {})
    assert (processes, where.distributed_backend, where.distributed_world_size) == (2, "nccl", 2)
    own = {"distributed_init_method": "tcp://127.0.0.1:1", "distributed_no_spawn": True}
    processes, where = begun(0, TORCHRUN, distributed_world_size=4, distributed_rank=3, **own)
    assert (processes, where.distributed_rank, where.distributed_world_size) == (0, 3, 4)
    assert where.distributed_init_method == own["distributed_init_method"]
    assert where.distributed_backend == "gloo"  # nccl is fairseq's default


def test_fully_sharded_on_a_cpu_is_refused(begun, monkeypatch):
    for found, reason in ((None, "pip install fairscale"), (True, "needs GPUs")):
        monkeypatch.setattr(workers.importlib.util, "find_spec", lambda name, found=found: found)
        with pytest.raises(UserError, match=f"--ddp-backend fully_sharded .*{reason}"):
            begun(0, {}, ddp_backend="fully_sharded")


# Ending


def children(pid):
    """The processes below a process."""
    listed = Path(f"/proc/{pid}/task/{pid}/children")
    own = list(map(int, listed.read_text().split())) if listed.exists() else []
    return [each for child in own for each in (child, *children(child))]


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def kill_a_worker(started, folder, number, after=0.0):
    """Kill one of those at work, when a checkpoint is there; all that was printed, the status.

    Args:
        started: what started them.
        folder: of the checkpoints.
        number: of the worker, or None for what started it.
        after: seconds.
    """
    deadline = time.monotonic() + commands.TIMEOUT_SECONDS
    while not list(folder.rglob("checkpoint_*_*.pt")):
        assert started.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(after)
    below = children(started.pid)
    at_work = [pid for pid in below if is_worker(pid)]
    os.kill(started.pid if number is None else at_work[number], signal.SIGKILL)
    killed = time.monotonic()
    (result,) = commands.finish(started)
    while any(map(is_alive, below)) and time.monotonic() < killed + SECONDS:
        time.sleep(0.02)
    assert not [pid for pid in below if is_alive(pid)]
    assert time.monotonic() < killed + SECONDS
    return result


def is_worker(pid):
    """Of the processes below a launcher, not one that keeps its books."""
    command = Path(f"/proc/{pid}/cmdline").read_text()
    return "spawn_main" in command or ("torch.distributed.run" not in command and "-u" in command)


WORKERS = {
    "share_all_embeddings": True,
    "max_tokens": 200,
    "disable_validation": True,
    "save_interval_updates": 4,
    "keep_interval_updates": 2,
}


@pytest.mark.parametrize("number", [0, pytest.param(None, marks=pytest.mark.slow)])
def test_the_others_end_with_a_worker_of_fairseqs(number, toy_corpus, tmp_path):
    """And with what started them; the same command goes on, with another number of workers too."""
    data, folder = toy_corpus / "joined", tmp_path / "run"
    flags = commands.train_command(data, folder, **WORKERS, distributed_world_size=2)
    result = kill_a_worker(commands.start("fairseq_cli.train", *flags), folder, number)
    if number is not None:
        assert result.returncode == 2
        (error,) = [line for line in result.stderr.splitlines() if "error: " in line]
        assert error.startswith(f"error: worker {number} was ended by SIGKILL")
        assert "Traceback" not in result.stderr
    saved = max(int(path.stem.split("_")[2]) for path in folder.glob("checkpoint_*_*.pt"))
    result = commands.train(data, folder, **WORKERS, max_update=saved + 3)
    assert f"@ {saved} updates" in result.stdout
    history = commands.load(folder / "checkpoint_last.pt")["optimizer_history"]
    assert history[-1]["num_updates"] == saved + 3


UPDATES = 60


def launched(corpus, runs, *arguments):
    """Arguments of ``fairseq-sparsemixer train``, of a small model."""
    flags = ["--runs", runs, "--experts", "2", "--router", "switch", *arguments]
    data = f"task.data={corpus / 'bin'}"
    more = ["optimization.update_freq=[4]", f"optimization.max_update={UPDATES}"]
    return ["train", *flags, *TINY, *more, data]


@pytest.mark.slow
def test_the_others_end_with_a_worker_of_torchruns(corpus, tmp_path):
    """Whichever ends; the same command goes on, at last with one worker."""
    folder = tmp_path / "switch-2-seed1"
    for number in (0, 1):
        command = launched(corpus, tmp_path, "--workers", 2, "--cpu")
        started = commands.start("fairseq_sparsemixer.cli", *command)
        result = kill_a_worker(started, folder, number)
        assert result.returncode == 2
        assert f"error: training failed: worker {number} was ended by SIGKILL" in result.stderr
        assert "Traceback" not in result.stderr
        for path in folder.glob("checkpoint_*_*.pt"):
            path.unlink()  # checkpoint_last.pt is what goes on
    command = launched(corpus, tmp_path, "--workers", 1, "--cpu")
    result = commands.run("fairseq_sparsemixer.cli", *command)
    assert "goes on from checkpoint_last.pt" in result.stdout
    state = commands.load(folder / "checkpoint_last.pt")
    assert state["optimizer_history"][-1]["num_updates"] == UPDATES


@pytest.mark.slow
def test_workers_end_with_torchrun(corpus, tmp_path):
    folder = tmp_path / "switch-2-seed1"
    command = launched(corpus, tmp_path, "--workers", 2, "--cpu")
    started = commands.start("fairseq_sparsemixer.cli", *command)
    while not list(folder.glob("checkpoint_*_*.pt")):
        assert started.poll() is None
        time.sleep(0.02)
    (agent,) = map(
        int, Path(f"/proc/{started.pid}/task/{started.pid}/children").read_text().split()
    )
    below = children(agent)
    os.kill(agent, signal.SIGKILL)
    killed = time.monotonic()
    (result,) = commands.finish(started)
    while any(map(is_alive, below)) and time.monotonic() < killed + SECONDS:
        time.sleep(0.02)
    assert len(below) == 2 and not any(map(is_alive, below))
    assert result.returncode == 2 and "error: training failed: " in result.stderr


@pytest.mark.slow
def test_two_nodes_train_as_one(corpus, tmp_path):
    """Each by a command of its own, with two workers on its CPU; node 0 looks after the folder."""
    runs = tmp_path / "runs"
    place = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(workers._free_port())}
    command = launched(corpus, runs, "--nodes", 2, "--workers", 2, "--cpu")
    started = []
    for rank in range(2):
        with pytest.MonkeyPatch.context() as patch:
            for name, value in {**place, "NODE_RANK": str(rank)}.items():
                patch.setenv(name, value)
            started.append(commands.start("fairseq_sparsemixer.cli", *command))
    for result in commands.finish(*started):
        commands.checked(result)
    folder = runs / "switch-2-seed1"
    state = commands.load(folder / "checkpoint_last.pt")
    assert state["optimizer_history"][-1]["num_updates"] == UPDATES
    assert state["cfg"]["distributed_training"]["distributed_world_size"] == 4
    assert (folder / "train-node1.log").exists()


DEATHS = 20


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["spawn", "torchrun"])
def test_twenty_deaths_lose_nothing_that_was_saved(launcher, toy_corpus, tmp_path):
    """At random moments in the second after a checkpoint; one is saved every other update."""
    data, folder = toy_corpus / "joined", tmp_path / "run"
    settings = {**WORKERS, "save_interval_updates": 2, "keep_interval_updates": 1}
    by_torchrun = ["--standalone", "--local_addr=localhost", "--nproc_per_node=2", "-m"]
    rng, before = random.Random(launcher), 0
    for _ in range(DEATHS):
        flags = commands.train_command(data, folder, **settings, distributed_world_size=2)
        if launcher == "torchrun":
            module, arguments = "torch.distributed.run", [*by_torchrun, "fairseq_cli.train", *flags]
        else:
            module, arguments = "fairseq_cli.train", flags
        for path in folder.glob("checkpoint_*_*.pt"):
            path.unlink()
        started = commands.start(module, *arguments)
        result = kill_a_worker(started, folder, rng.randrange(2), after=rng.random())
        assert result.returncode == 1
        state = commands.load(folder / "checkpoint_last.pt")
        updates = state["optimizer_history"][-1]["num_updates"]
        assert updates >= before + 2
        before = updates
