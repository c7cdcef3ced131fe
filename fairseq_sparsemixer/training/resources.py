"""What a run will need: parameters (exact), memory and time (estimates by stated formulas).

The model is built on torch's meta device, without storage. Nothing here was fitted to a GPU.
"""

import re
from typing import Any, Dict, NamedTuple, Optional, Tuple

import torch
from torch.overrides import TorchFunctionMode

from fairseq_sparsemixer.errors import UserError
from fairseq_sparsemixer.models.layers import switch_layers
from fairseq_sparsemixer.moe.feed_forward import moe_layers
from fairseq_sparsemixer.runs.archives import reason

VOCABULARY = 32_768
"""Entries of the dictionary that is assumed where there are no data yet."""
SENTENCE_LENGTH = 30
"""Tokens of a sentence in WMT14, roughly: what attention matrices are estimated with."""
UTILISATION = 0.2
"""Assumed share of a GPU's peak that training reaches. Layers as narrow as these, and experts that
are computed one after the other, keep a GPU waiting; not measured."""
PEAK_TFLOPS: Dict[str, int] = {
    "T4": 65,
    "RTX 3090": 71,
    "L4": 121,
    "A10": 125,
    "V100": 125,
    "RTX 4090": 165,
    "A100": 312,
    "L40S": 362,
    "H100": 989,
    "H200": 989,
}
"""TFLOP/s of the data sheets: dense fp16 or bf16 on tensor cores with sums in fp32, of the forms
that :data:`_CUDA_NAMES` match."""
_CUDA_NAMES = {"V100": r"V100-SXM", "A100": r"A100\b", "H100": r"H100 80GB HBM3", "H200": r"H200$"}
"""Patterns of the names that CUDA gives to those forms, where they do not just end in the key."""


class Parameters(NamedTuple):
    """Numbers of parameters.

    Attributes:
        total: of the whole model, each shared one once.
        active: that one token uses, with top_k of a layer's experts.
        computed: that training computes for one token: ``active``, but with every expert where the
            router is a yardstick that needs them all.
    """

    total: int
    active: int
    computed: int


class _StayOnMeta(TorchFunctionMode):
    """Leaves tensors without storage where they are: fairseq's BERT draws weights on the CPU."""

    def __torch_function__(
        self, func: Any, types: Any, args: Tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.Tensor.cpu and args[0].is_meta:
            return args[0]
        return func(*args, **(kwargs or {}))


def build_on_meta(settings: Any, task: Any) -> Any:
    """The model without storage; gaps of ``settings`` (hydra's node ``model``) are filled.

    Args:
        settings: changed in place.
        task: the fairseq task, for its dictionaries.

    Raises:
        UserError: for a setting that is unknown, out of range or not supported.
    """
    try:
        with torch.device("meta"), _StayOnMeta():
            return task.build_model(settings)
    except UserError:
        raise
    except Exception as error:  # fairseq checks few settings: they fail wherever they are used
        raise UserError(
            f"fairseq cannot build a model of these settings ({reason(error)})"
        ) from error


def count_parameters(model: Any) -> Parameters:
    """Count the parameters of a model; exact."""
    total = sum(parameter.numel() for parameter in model.parameters())
    active = computed = total
    for layer in moe_layers(model):
        router = layer.router
        one = sum(parameter.numel() for parameter in layer.experts.parameters())
        one //= layer.experts.num_experts
        idle = (layer.experts.num_experts - router.top_k) * one
        active -= idle
        computed -= 0 if router.computes_all_experts else idle
    return Parameters(total, active, computed)


def expert_parameters(model: Any, group: int = 1) -> int:
    """Number of parameters of the experts that a worker holds, of a group that shares them."""
    experts = (p for layer in moe_layers(model) for p in layer.experts.parameters())
    return sum(p.numel() for p in experts) // group


def state_bytes(total: int, half: bool, workers: int = 1, spread: int = 0) -> Dict[str, int]:
    """Bytes on each GPU that do not depend on the batch, by part.

    Without half precision fairseq keeps weights, gradients and Adam's two moments in fp32: 16
    bytes a parameter. With it (its ``FP16Optimizer``, for fp16 and bf16 alike) the model and its
    gradients have two bytes, and the copies that Adam works on four: 20. ``legacy_ddp`` adds a
    buffer of the model's type, of 2^28 elements at most, for what is not spread over workers. The
    step itself takes up to 4 bytes more, when there are no activations.

    Args:
        total: number of parameters that a worker holds.
        half: fp16 or bf16.
        workers: that train together.
        spread: of these, parameters of experts that are spread over workers.
    """
    width = 2 if half else 4
    parts = {"weights": width * total, "gradients": width * total}
    if half:
        parts["fp32 copy of the weights"] = 4 * total
        parts["fp32 copy of the gradients"] = 4 * total
    parts["Adam's moments"] = 8 * total
    if workers > 1:
        parts["buffer of legacy_ddp"] = width * min(2**28, total - spread)
    return parts


def activation_bytes(model: Any, tokens: int, half: bool) -> Dict[str, int]:
    """Bytes of activations that wait for the backward pass, by part.

    For one token, in half precision, with width d, inner width f and a attention heads, after
    Korthikanti et al. (2022, arXiv 2205.05198): 11 d + 5 a L for an attention over sentences of
    length L, 2 d for a layer norm, 3 d + 5 f for a feed-forward network with activation dropout.
    An encoder layer has one attention and two layer norms, a decoder layer one more of each.
    Sorting tokens by expert and scaling their outputs takes 8 d more. Twice that in fp32. At the
    output, for V entries of the dictionary: logits (2 V, or 4 V in fp32), log-probabilities (4 V)
    and the two gradients of these (8 V).

    Args:
        model: for its sizes.
        tokens: of a batch (``max_tokens``), on each side.
        half: fp16 or bf16.
    """
    cfg = model.cfg
    width = 1 if half else 2
    layers = 0.0
    for side, attentions in ((cfg.encoder, 1), (cfg.decoder, 2)):
        d, f, heads = side.embed_dim, side.ffn_embed_dim, side.attention_heads
        attention = attentions * (11 * d + 5 * heads * SENTENCE_LENGTH)
        layers += side.layers * (attention + (attentions + 1) * 2 * d + 3 * d + 5 * f)
    for layer in switch_layers(model).values():
        moe = layer.moe
        d, f = moe.embed_dim, moe.experts.w1.shape[1]
        slots = moe.experts.num_experts if moe.router.computes_all_experts else moe.router.top_k
        layers += slots * 8 * d + (slots - 1) * (3 * d + 5 * f)
    vocabulary = model.decoder.output_projection.out_features
    return {
        "activations of the layers": int(tokens * width * layers),
        "logits and their gradients": tokens * vocabulary * (14 if half else 16),
    }


def update_flops(computed: int, tokens_per_update: int) -> float:
    """FLOPs of an update: 6 x parameters x tokens.

    Two FLOPs for each parameter and token forward, four backward; a shared embedding counts once,
    as the output projection. Attention matrices (about 1 % at the length of WMT's sentences) are
    left out, padding counts as text.

    Args:
        computed: see :class:`Parameters`.
        tokens_per_update: of the longer side, padding included.
    """
    return 6.0 * computed * tokens_per_update


def peak_tflops(gpu: str) -> Optional[int]:
    """The entry of :data:`PEAK_TFLOPS` for the name that CUDA gives a GPU; None if unknown."""
    for name, peak in PEAK_TFLOPS.items():
        if re.search(_CUDA_NAMES.get(name, rf"\b{name}$"), gpu):
            return peak
    return None


def training_hours(flops: float, updates: int, workers: int, tflops: float) -> float:
    """Hours of training on ``workers`` GPUs of that peak, at :data:`UTILISATION` of it."""
    return flops * updates / (workers * tflops * 1e12 * UTILISATION) / 3600
