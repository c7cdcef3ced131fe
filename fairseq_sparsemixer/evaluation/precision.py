"""In which precision a model translates, and what is done for it beforehand."""

import logging
from pathlib import Path

import torch

from fairseq_sparsemixer.errors import UserError
from fairseq_sparsemixer.models.laid_out import lay_out, obstacle
from fairseq_sparsemixer.moe.backends.products import LEAST_WEIGHTS, has_int8, is_small

logger = logging.getLogger(__name__)

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
"""Of the precisions that are for GPUs."""


def check_precision(precision: str, device: torch.device) -> None:
    """Raise UserError for one that this machine does not have."""
    on_gpu = device.type == "cuda"
    if precision in DTYPES and not on_gpu:
        raise UserError(f"--{precision} needs a CUDA device and there is none; leave it out")
    if precision == "int8" and on_gpu:
        raise UserError(
            "--int8 is for CPUs and this machine translates on its GPU; take --fp16, or hide the "
            "GPU with CUDA_VISIBLE_DEVICES=''"
        )
    if precision == "int8" and not has_int8():
        raise UserError(
            "--int8 needs a PyTorch with oneDNN, which this one was built without; leave it out"
        )


def prepare_model(path: Path, model: torch.nn.Module, precision: str) -> None:
    """Have it translate as fast as it can."""
    if precision != "int8":
        lay_out(model)
        return
    reason = obstacle(model)
    if reason is not None:
        raise UserError(f"--int8 does not serve {path}: {reason}; leave it out")
    if all(is_small(parameter) for parameter in model.parameters()):
        logger.warning(
            "--int8 changes next to nothing in %s: matrices of less than %s weights stay as they "
            "are",
            path,
            f"{LEAST_WEIGHTS:,}",
        )
    lay_out(model, torch.int8)
