"""Matrix products on a CPU that are faster than those behind torch.nn.functional.linear.

oneDNN's product is what torch's compiler uses on CPUs; torch has it from 2.0 on, outside of its
documented interface, so that everything here works without it too.
"""

import functools
import weakref
from typing import Any, Callable, Optional, Tuple, Union

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_post_hook

from fairseq_sparsemixer.moe.experts import Experts


def _operator(name: str, library: str = "mkldnn") -> Optional[Any]:
    operators = getattr(torch.ops, library)
    if torch.backends.mkldnn.is_available() and hasattr(operators, name):
        return getattr(operators, name).default
    return None


_LINEAR = _operator("_linear_pointwise")
_PACK = _operator("_reorder_linear_weight")
_INT8_LINEAR = _operator("qlinear_pointwise", "onednn")
_INT8_PACK = _operator("qlinear_prepack", "onednn")

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


class Int8Weight:
    """A weight (O, I) in 8 bits, with a scale for each output.

    The rows of what it is multiplied with are rounded to 8 bits, too, each with its own scale: what
    comes out for a token does not depend on the others.

    Args:
        w: (O, I) float32 on a CPU.
    """

    def __init__(self, w: Tensor) -> None:
        assert _INT8_PACK is not None
        self.scale_O = (w.abs().amax(dim=1) / 127).clamp_min_(TINY)
        rounded = (w / self.scale_O.unsqueeze(-1)).round_().to(torch.int8)
        self.packed = _INT8_PACK(rounded, [PACKED_FOR_ROWS, w.shape[1]])
        self.zero_O = torch.zeros(len(w), dtype=torch.int32)

    def linear(self, x: Tensor, b: Optional[Tensor], relu: bool) -> Tensor:
        """See :func:`linear`."""
        largest = int8_steps()
        step_S1 = x.abs().amax(dim=-1, keepdim=True).clamp_min_(TINY).div_(largest)
        # Without a sign: oneDNN has no fast product of signed numbers before AMX.
        steps = x.div(step_S1).add_(largest + 1.5).to(torch.uint8)  # which cuts off the half
        y = _int8_product(steps, largest + 1, self.packed, self.scale_O, self.zero_O)
        y = y.mul_(step_S1) if b is None else torch.addcmul(b, y, step_S1)
        return y.relu_() if relu else y


TINY = 1e-30
"""In place of the scale of a row of zeros."""


def _int8_product(
    steps: Tensor, zero: int, packed: Tensor, scale_O: Tensor, zero_O: Tensor
) -> Tensor:
    """(S, O) float32 of uint8 steps (S, I) from ``zero``."""
    assert _INT8_LINEAR is not None
    # No bias, and output that is not rounded.
    rest: Any = (None, 1.0, 0, torch.float32, "none", [], "")
    return _INT8_LINEAR(steps, 1.0, zero, packed, scale_O, zero_O, *rest)


@functools.cache
def int8_steps() -> int:
    """So many steps on each side of zero are multiplied right: 127, or 63 on older CPUs.

    These add two products in 16 bits, which end at 32,767.
    """
    assert _INT8_PACK is not None
    width = 64
    packed = _INT8_PACK(torch.full((width, width), 127, dtype=torch.int8), [1, width])
    steps = torch.full((1, width), 255, dtype=torch.uint8)
    zero_O = torch.zeros(width, dtype=torch.int32)
    found = _int8_product(steps, 128, packed, torch.ones(width), zero_O)
    return 127 if found[0, 0].item() == 127 * 127 * width else 63


Weight = Union[Tensor, Int8Weight]


def packed(w: Tensor, dtype: torch.dtype) -> Weight:
    """A weight as :func:`linear` multiplies it fastest.

    Args:
        w: (O, I) float32 on a CPU, and not :func:`is_small`.
        dtype: float32, bfloat16 or int8.
    """
    if dtype == torch.int8:
        return Int8Weight(w)
    assert _PACK is not None
    return _PACK(w.to(dtype), PACKED_FOR_ROWS)


def linear(x: Tensor, w: Weight, b: Optional[Tensor] = None, relu: bool = False) -> Tensor:
    """(S, O): x w^T + b, then ReLU if asked for; without a gradient.

    Args:
        x: (S, I).
        w: (O, I), maybe packed, in the dtype of x or int8.
        b: (O,).
        relu: whether to apply ReLU.
    """
    if isinstance(w, Int8Weight):
        return w.linear(x, b, relu)
    large = not is_small(w) and len(x) * w.numel() >= LEAST_PRODUCTS and x.dtype == w.dtype
    if w.is_mkldnn or (large and torch.backends.mkldnn.enabled):
        assert _LINEAR is not None
        return _LINEAR(x, w, b, "relu" if relu else "none", [], "")
    y = F.linear(x, w, b)
    return y.relu_() if relu else y


def is_small(w: Tensor) -> bool:
    """Whether oneDNN, if there is one, gains nothing: a weight is small, or no float32 on a CPU."""
    on_cpu = w.device.type == "cpu" and w.dtype == torch.float32 and _LINEAR is not None
    return not on_cpu or w.numel() < LEAST_WEIGHTS


def has_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16."""
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def has_int8() -> bool:
    """Whether this PyTorch multiplies 8-bit numbers on CPUs."""
    return _INT8_LINEAR is not None and _INT8_PACK is not None


def obstacle(experts: Experts) -> Optional[str]:
    """Why packing the weights would gain nothing, None where it would.

    Parameters made in inference mode are not packed: torch does not tell when these change.
    """
    w = experts.w1
    if w.device.type != "cpu":
        return "they are not on a CPU"
    if w.dtype != torch.float32:
        return "their weights are not float32"
    if _LINEAR is None or _PACK is None:
        return "this PyTorch has no oneDNN"
    if is_small(w[0]):
        return f"with {w[0].numel()} weights a matrix they are too small to gain"
    if w.is_inference():
        return "they were made in inference mode"
    return None


class PackedParameters:
    """What was made of parameters for products: it knows when they are no longer the same.

    Copies and pickles as None: torch cannot write such tensors, and they are made from the
    parameters in no time.

    Args:
        module: whose parameters they are.
    """

    def __init__(self, module: nn.Module) -> None:
        self._made_from = [(p.detach(), p._version) for p in module.parameters()]
        self._stale = False
        weakref.finalize(self, register_optimizer_step_post_hook(_marking(self)).remove)

    def fits(self, module: nn.Module) -> bool:
        """Whether the parameters are still those that were packed.

        After a step of any optimiser they are not taken to be: fused ones, and those that write to
        ``parameter.data``, change a parameter without torch's counting it. Nothing else that
        writes there is seen.
        """
        parameters = list(module.parameters())
        return (
            not self._stale
            and len(parameters) == len(self._made_from)
            and all(
                now.data_ptr() == then.data_ptr() and now._version == version
                for now, (then, version) in zip(parameters, self._made_from)
            )
        )

    def __reduce__(self) -> Tuple[Any, ...]:
        return type(None), ()


class PackedWeights(PackedParameters):
    """The weights of a layer's experts in oneDNN's own layout.

    A product with few rows, as in decoding, otherwise spends most of its time on bringing the
    weights into that layout.

    Args:
        experts: with float32 weights on a CPU.
        dtype: float32; bfloat16 to read half as much, with results rounded to 8 bits; or int8.
    """

    def __init__(self, experts: Experts, dtype: torch.dtype) -> None:
        super().__init__(experts)
        self.dtype = dtype
        self.input_dtype = torch.float32 if dtype == torch.int8 else dtype
        self.w1, self.w2 = (
            [packed(one, dtype) for one in w.detach()] for w in (experts.w1, experts.w2)
        )
        self.b1, self.b2 = (b.detach().to(self.input_dtype) for b in (experts.b1, experts.b2))


def _marking(packed: PackedParameters) -> Callable[..., None]:
    """A function that marks ``packed``, while it lives, as stale."""
    reference = weakref.ref(packed)

    def mark(*_: Any) -> None:
        alive = reference()
        if alive is not None:
            alive._stale = True

    return mark
