"""Sweeps with hydra alone, and jobs of Slurm."""

import os
import shutil
import signal
import subprocess
import time

import pytest
from omegaconf import OmegaConf
from support import commands
from support.wmt14 import CONFIGS, SCRIPTS, TINY_MODEL

from fairseq_sparsemixer.training import settings


@pytest.fixture(scope="module")
def tiny_configs(corpus, tmp_path_factory):
    """The configs, and a schedule that makes everything tiny."""
    configs = shutil.copytree(CONFIGS, tmp_path_factory.mktemp("sweep") / "configs")
    tiny = {
        "task": {"data": str(corpus / "bin")},
        "common": {"cpu": True, "fp16": False, "user_dir": str(settings.PACKAGE)},
        "model": TINY_MODEL,
        "optimization": {"max_update": 2, "update_freq": [1]},
        "dataset": {"max_tokens": 200, "num_workers": 0},
    }
    text = OmegaConf.to_yaml(OmegaConf.create(tiny))
    # As a group of its own, after all others.
    (configs / "size").mkdir()
    (configs / "size" / "tiny.yaml").write_text(f"# @package _global_\n{text}")
    primary = configs / "wmt14.yaml"
    defaults = "  - gpus: one\n"
    assert defaults in primary.read_text()
    primary.write_text(primary.read_text().replace(defaults, f"{defaults}  - size: tiny\n"))
    return configs


def sweep(configs, folder, *arguments):
    commands.run(
        "fairseq_cli.hydra_train",
        *("--config-dir", configs, "--config-name", "wmt14", "--multirun", *arguments),
        cwd=folder,
    )
    runs, with_best = (
        {
            str(path.parent.relative_to(folder / "runs" / "wmt14"))
            for path in (folder / "runs").rglob(name)
        }
        for name in ("checkpoint_last.pt", "checkpoint_best.pt")
    )
    # fairseq alone lets the runs of a sweep compete for the best checkpoint.
    assert runs == with_best
    return runs


def test_a_sweep_trains_the_runs_of_the_table(tiny_configs, tmp_path):
    arguments = ["experts=two,four", "model.router=switch,sparsemixer"]
    assert sweep(tiny_configs, tmp_path, *arguments) == {
        "switch-2-seed1",
        "sparsemixer-2-seed1",
        "switch-4-seed1",
        "sparsemixer-4-seed1",
    }


def test_a_sweep_over_processes_of_its_own(tiny_configs, tmp_path):
    """submitit's way of starting jobs, which Slurm's is, too."""
    arguments = ["hydra/launcher=submitit_local", "experts=dense", "schedule=short"]
    assert sweep(tiny_configs, tmp_path, *arguments) == {"schedule=short/dense-seed1"}


# Scripts


def test_scripts_are_bash():
    scripts = [*SCRIPTS.glob("*.sh"), *SCRIPTS.glob("*.sbatch"), SCRIPTS.parent / ".ci" / "run"]
    assert len(scripts) > 5
    for script in scripts:
        subprocess.run(["bash", "-n", script], check=True)


def test_job_starts_every_node_and_is_handed_in_again(tmp_path):
    """Under a stand-in for Slurm: srun waits, and the signal before the limit requeues the job."""
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "environment.sh").touch()
    stubs = {
        "scontrol": 'echo "$@" >>calls; echo first; echo second',
        "srun": 'echo "srun $MASTER_ADDR $MASTER_PORT $@" >>calls; sleep 60 & wait; exit 1',
    }
    for name, text in stubs.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    environment = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "SLURM_JOB_NODELIST": "list",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_ID": "40003",
        "SLURM_CPUS_PER_TASK": "16",
    }
    job = subprocess.Popen(
        ["bash", SCRIPTS / "train_wmt14.sbatch", "--experts", "8"],
        env=environment,
        stdout=subprocess.PIPE,
        start_new_session=True,
        text=True,
    )
    calls = tmp_path / "calls"

    def wait_for(text):
        deadline = time.monotonic() + 30
        while not calls.is_file() or text not in calls.read_text():
            assert time.monotonic() < deadline
            time.sleep(0.02)

    try:
        wait_for(
            "srun first 20003 --kill-on-bad-exit=1 --cpus-per-task=16 scripts/train_wmt14.sh "
            "--nodes 2 --experts 8\n"
        )
        job.send_signal(signal.SIGUSR1)
        wait_for("requeue 40003\n")
    finally:
        os.killpg(job.pid, signal.SIGKILL)
        job.communicate()
