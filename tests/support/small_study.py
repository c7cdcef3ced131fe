"""Studies of a small corpus: their plan, and starting them."""

import os
import subprocess
import sys

import yaml

from fairseq_sparsemixer.runs import points

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


def lines_of(folder):
    return points.read_points(folder / points.FILE)
