"""Checkpoints of dense models: trained by fairseq alone, and written by hand."""

import argparse

import torch
from fairseq.models import build_model
from fairseq.models.transformer import TransformerModel, transformer_legacy
from omegaconf import OmegaConf

from support.models import SMALL, Task
from support.small_run import MAX_POSITIONS, python

SIZE = [
    "--encoder-layers", 2, "--decoder-layers", 2, "--encoder-embed-dim", 32,
    "--encoder-ffn-embed-dim", 64, "--encoder-attention-heads", 2, "--decoder-attention-heads", 2,
    "--max-source-positions", MAX_POSITIONS, "--max-target-positions", 40,
    "--share-all-embeddings",
]  # fmt: skip
TRAINING = [
    "--task", "translation", "--dropout", 0, "--optimizer", "adam", "--lr", 0.01, "--max-tokens",
    1000, "--required-batch-size-multiple", 1, "--no-progress-bar", "--num-workers", 0, "--cpu",
    "--log-format", "json", "--log-interval", 1, "--disable-validation",
]  # fmt: skip


def train(corpus, folder):
    """60 updates of fairseq's own transformer, without this extension."""
    python(
        "-m", "fairseq_cli.train", corpus / "bin", "--arch", "transformer", *SIZE, *TRAINING,
        "--max-update", 60, "--save-dir", folder, "--no-epoch-checkpoints",
    )  # fmt: skip


def write(path, dtype=torch.float32, old=False, **settings):
    """A checkpoint of a random transformer of fairseq; the model, in float32.

    ``old`` for flags in one Namespace, as before fairseq 0.10.
    """
    torch.manual_seed(0)
    flat = argparse.Namespace(**{**SMALL, **settings})
    transformer_legacy.base_architecture(flat)
    model = TransformerModel.build_model(flat, Task()).to(dtype)
    parts = {"arch": "transformer", "task": "translation", "criterion": "cross_entropy",
             "optimizer": "adam", "lr_scheduler": "fixed"}  # fmt: skip
    task = {"_name": "translation", "data": "bin", "source_lang": "en", "target_lang": "de"}
    state = {
        "args": argparse.Namespace(**{**task, **vars(flat), **parts}) if old else None,
        "cfg": None if old else {"model": {"_name": "transformer", **vars(flat)}, "task": task},
        "model": model.state_dict(),
        "optimizer_history": [{"num_updates": 7, "best_loss": 1.0}],
        "extra_state": {},
        "last_optimizer_state": {"state": torch.zeros(1000)},
    }
    torch.save(state, path)
    return model.float().eval()


def read(path):
    """The model of a checkpoint."""
    state = torch.load(path, weights_only=True)
    model = build_model(OmegaConf.create(state["cfg"]["model"]), Task())
    model.load_state_dict(state["model"])
    return model.eval()
