"""Matrix products on a CPU that are faster than those behind torch.nn.functional.linear.

oneDNN's product is what torch's compiler uses on CPUs; torch has it from 2.0 on, outside of its
documented interface, so that everything here works without it too.
"""

import weakref
from typing import Any, Callable, List, Optional, Tuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_post_hook

from fairseq_sparsemixer.moe.experts import Experts


def _operator(name: str) -> Optional[Any]:
    if torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, name):
        return getattr(torch.ops.mkldnn, name).default
    return None


_LINEAR = _operator("_linear_pointwise")
_PACK = _operator("_reorder_linear_weight")

PACKED_FOR_ROWS = 64
"""The layouts for 8 to 512 rows are alike; that for a single row is slower with more."""


LEAST_WEIGHTS = 2**17
LEAST_PRODUCTS = 2**20
"""A product of oneDNN takes some 30 us to begin with, so that one with smaller weights, or with
fewer multiplications, is better off in torch.nn.functional.linear."""


def rows_to_compute(rows: int) -> int:
    """How many rows to compute where ``rows`` are wanted.

    oneDNN compiles a program for each number of rows that it meets, which takes a millisecond, and
    keeps a thousand of them. The number of an expert's tokens is another one in every batch, so
    that without steps most products would be compiled anew.
    """
    if rows <= 8:
        return 1 << (rows - 1).bit_length()
    step = 4 if rows <= 256 else 16 if rows <= 512 else 64
    return -(-rows // step) * step


def linear(x: Tensor, w: Tensor, b: Optional[Tensor] = None, relu: bool = False) -> Tensor:
    """(S, O): x w^T + b, then ReLU if asked for; without a gradient.

    Args:
        x: (S, I).
        w: (O, I), maybe packed, in the dtype of x.
        b: (O,).
        relu: whether to apply ReLU.
    """
    large = _is_large(w) and len(x) * w.numel() >= LEAST_PRODUCTS and x.dtype == w.dtype
    if w.is_mkldnn or (large and _LINEAR is not None and torch.backends.mkldnn.enabled):
        assert _LINEAR is not None
        return _LINEAR(x, w, b, "relu" if relu else "none", [], "")
    y = F.linear(x, w, b)
    return y.relu_() if relu else y


def _is_large(w: Tensor) -> bool:
    return w.device.type == "cpu" and w.dtype == torch.float32 and w.numel() >= LEAST_WEIGHTS


def has_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16."""
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def obstacle(experts: Experts) -> Optional[str]:
    """Why packing the weights would gain nothing, None where it would.

    Parameters made in inference mode are not packed: torch does not tell when these change.
    """
    w = experts.w1
    if w.device.type != "cpu":
        return "they are not on a CPU"
    if w.dtype != torch.float32:
        return "their weights are not float32"
    if not _is_large(w[0]):
        return f"with {w[0].numel()} weights a matrix they are too small to gain"
    if w.is_inference():
        return "they were made in inference mode"
    if _LINEAR is None or _PACK is None:
        return "this PyTorch has no oneDNN"
    return None


class PackedWeights:
    """The weights of a layer's experts in oneDNN's own layout.

    A product with few rows, as in decoding, otherwise spends most of its time on bringing the
    weights into that layout. Copies and pickles as None: torch cannot write such tensors, and they
    are made from the parameters in no time.

    Args:
        experts: with float32 weights on a CPU.
        dtype: float32, or bfloat16 to read half as much, with results rounded to 8 bits.
    """

    def __init__(self, experts: Experts, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.w1, self.w2 = (self._packed(w) for w in (experts.w1, experts.w2))
        self.b1, self.b2 = (b.detach().to(dtype) for b in (experts.b1, experts.b2))
        self._made_from = [(p.detach(), p._version) for p in experts.parameters()]
        self._stale = False
        weakref.finalize(self, register_optimizer_step_post_hook(_marking(self)).remove)

    def _packed(self, w: Tensor) -> List[Tensor]:
        assert _PACK is not None
        return [_PACK(one, PACKED_FOR_ROWS) for one in w.detach().to(self.dtype)]

    def fits(self, experts: Experts) -> bool:
        """Whether the parameters are still those that were packed.

        After a step of any optimiser they are not taken to be: fused ones, and those that write to
        ``parameter.data``, change a parameter without torch's counting it. Nothing else that
        writes there is seen.
        """
        return not self._stale and all(
            now.data_ptr() == then.data_ptr() and now._version == version
            for now, (then, version) in zip(experts.parameters(), self._made_from)
        )

    def __reduce__(self) -> Tuple[Any, ...]:
        return type(None), ()


def _marking(packed: PackedWeights) -> Callable[..., None]:
    """A function that marks ``packed``, while it lives, as stale."""
    reference = weakref.ref(packed)

    def mark(*_: Any) -> None:
        alive = reference()
        if alive is not None:
            alive._stale = True

    return mark
