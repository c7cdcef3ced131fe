"""Products of the rows of slots that are sorted by expert, as operators of PyTorch.

Sums are formed in a fixed order: the same input gives the same bits. Without Triton this file can
be imported, and :func:`obstacle` says what is missing.
"""

import functools
from typing import Any, List, Optional, Tuple

import torch
from torch import Tensor

from fairseq_sparsemixer.moe.kernels.operators import cdiv, contiguous, next_power_of_2, operator

try:
    import triton

    from fairseq_sparsemixer.moe.kernels import expert_kernels as kernels
except ImportError:
    triton = None

try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # Triton before 3.4
    TensorDescriptor = None

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
BLOCK = 128
"""Rows and columns of a tile of the result that one program computes."""
LEAST_DESCRIBED_SLOTS = 1024
"""With fewer, the host takes longer to describe the matrices than the device saves."""


capability = functools.cache(torch.cuda.get_device_capability)
"""(major, minor) of a device; PyTorch takes over a microsecond to say it again."""


def obstacle(device: torch.device, dtype: torch.dtype) -> Optional[str]:
    """Why kernels cannot serve such an input, as the rest of a sentence; None if they can."""
    if triton is None:
        return "needs Triton (pip install 'fairseq-sparsemixer[triton]')"
    if dtype not in DTYPES:
        return "takes bfloat16, float16 or float32"
    if kernels.INTERPRETED:
        return None
    if device.type != "cuda":
        return "needs a GPU"
    if capability(device) < (8, 0):
        # Triton multiplies without tensor cores on older ones.
        return "needs a GPU of compute capability 8.0"
    return None


def tile_rows(num_slots: int, num_experts: int) -> int:
    """Rows of a tile of the slots of one expert: as many as most experts fill, at most BLOCK."""
    return min(BLOCK, max(16, next_power_of_2(cdiv(num_slots, num_experts))))


def _depth_of_block(matrix: Tensor) -> int:
    """How many terms of its sums are fetched at a time: 128 bytes of a row."""
    return 128 // matrix.element_size()


_MATMUL = torch.backends.cuda.matmul
# The newer of PyTorch's two names for this reads what either has set, the older refuses to.
_PRECISION = "fp32_precision" if hasattr(_MATMUL, "fp32_precision") else "allow_tf32"


def _precision(dtype: torch.dtype) -> str:
    """Whether float32 may be multiplied as TF32, as PyTorch's own products are told."""
    if dtype != torch.float32:
        return "ieee"
    return "tf32" if getattr(_MATMUL, _PRECISION) in ("tf32", True) else "ieee"


def describable(device: torch.device) -> bool:
    """Whether a device has the engine that fetches described tiles."""
    if TensorDescriptor is None or device.type != "cuda":
        return False
    return capability(device) >= (9, 0)


def _describe(
    first: Tensor, first_block: List[int], second: Tensor, second_block: List[int]
) -> Optional[List[Any]]:
    """The descriptors of contiguous matrices for tiles of some shapes; None where they are no use.

    float32 is left to pointers: tensor cores take its transposed tiles from registers only.
    """
    if first.dtype == torch.float32 or first.shape[0] < LEAST_DESCRIBED_SLOTS:
        return None
    if not describable(first.device):
        return None
    matrices = ((first, first_block), (second, second_block))
    # Rows must begin at multiples of 16 bytes.
    if any(matrix.shape[-1] % 8 or matrix.data_ptr() % 16 for matrix, _ in matrices):
        return None
    return [
        TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), block)
        for matrix, block in matrices
    ]


def _width(w: Tensor, transposed: bool) -> int:
    return w.shape[2] if transposed else w.shape[1]


def _sorted_product_like(
    a: Tensor,
    w: Tensor,
    transposed: bool,
    bias: Any,
    seed: Any,
    active: Any,
    tiles: Tensor,
    tile: Any,
    kept_share: Any,
    relu: Any,
    sums: bool,
) -> List[Tensor]:
    width = _width(w, transposed)
    out = a.new_empty(a.shape[0], width)
    return [out, out.new_empty(tiles.shape[0], width, dtype=torch.float32)] if sums else [out]


@operator(_sorted_product_like)
def sorted_product(
    a: Tensor,
    w: Tensor,
    transposed: bool,
    bias: Optional[Tensor],
    seed: Optional[Tensor],
    active: Optional[Tensor],
    tiles: Tensor,
    tile: int,
    kept_share: float,
    relu: bool,
    sums: bool,
) -> List[Tensor]:
    """(S, O): f(a_s w_i^T + bias_i) for each slot s and its expert i; 0 for slots without one.

    Args:
        a: (S, I), sorted by expert.
        w: (N, O, I), or (N, I, O) if ``transposed``.
        transposed: whether it is.
        bias: (N, O).
        seed: (1,) int64, of a dropout that leaves ``kept_share`` of the cells and scales them up.
        active: (S, O), the result of a ReLU with that dropout, to go back through: the gradient
            is scaled up likewise where ``active`` is positive and 0 elsewhere.
        tiles: (tiles, 3); see :func:`~fairseq_sparsemixer.moe.kernels.sorting.sort_slots`.
        tile: rows of a tile.
        kept_share: of the dropout.
        relu: whether f has a ReLU, before the dropout.
        sums: whether there is a second result, (tiles, O) float32, the sums of the tiles' rows.
    """
    results = _sorted_product_like(
        a, w, transposed, bias, seed, active, tiles, tile, kept_share, relu, sums
    )
    out, tile_sums = results if sums else (*results, None)
    nowhere = (None, None, None, None)
    tensors = (contiguous(bias), seed, contiguous(active), out, tile_sums, *nowhere)
    _run_product(a, w, transposed, tensors, tiles, tile, kept_share, relu)
    return results


def _placed_product_like(
    a: Tensor,
    w: Tensor,
    transposed: bool,
    bias: Any,
    slot: Any,
    gate: Any,
    scale: Any,
    tiles: Any,
    tile: Any,
    wide: bool,
    keep: bool,
) -> List[Tensor]:
    shape = (a.shape[0], _width(w, transposed))
    placed = a.new_empty(shape, dtype=torch.float32) if wide else a.new_empty(shape)
    return [placed, a.new_empty(shape)] if keep else [placed]


@operator(_placed_product_like)
def placed_product(
    a: Tensor,
    w: Tensor,
    transposed: bool,
    bias: Optional[Tensor],
    slot: Tensor,
    gate: Optional[Tensor],
    scale: Optional[Tensor],
    tiles: Tensor,
    tile: int,
    wide: bool,
    keep: bool,
) -> List[Tensor]:
    """(S, O): gate_s scale (a_s w_i^T + bias_i) where the slots come from.

    Args:
        a: (S, I), sorted by expert.
        w: (N, O, I), or (N, I, O) if ``transposed``.
        transposed: whether it is.
        bias: (N, O).
        slot: (S,) int64, where each row goes.
        gate: S values, as the slots come.
        scale: (O,).
        tiles: (tiles, 3); see :func:`~fairseq_sparsemixer.moe.kernels.sorting.sort_slots`.
        tile: rows of a tile.
        wide: float32 for the first result, in place of the dtype of ``a``.
        keep: whether there is a second, (S, O): a_s w_i^T + bias_i in the order of the experts.
    """
    results = _placed_product_like(
        a, w, transposed, bias, slot, gate, scale, tiles, tile, wide, keep
    )
    placed, out = results if keep else (*results, None)
    weights = (contiguous(gate), contiguous(scale))
    tensors = (contiguous(bias), None, None, out, None, placed, slot, *weights)
    _run_product(a, w, transposed, tensors, tiles, tile, 1.0, False)
    return results


def _run_product(
    a: Tensor,
    w: Tensor,
    transposed: bool,
    tensors: Tuple[Optional[Tensor], ...],
    tiles: Tensor,
    tile: int,
    kept_share: float,
    relu: bool,
) -> None:
    """Launch the kernel.

    Args:
        a: (S, I).
        w: (N, O, I), or (N, I, O) if ``transposed``.
        transposed: whether it is.
        tensors: the kernel's arguments from ``bias_ptr`` to ``scale_ptr``.
        tiles: (tiles, 3).
        tile: rows of a tile.
        kept_share: of the dropout.
        relu: whether there is a ReLU.
    """
    a, w = a.contiguous(), w.contiguous()
    num_experts, width, depth = w.shape
    block_i = _depth_of_block(a)
    tile_of_w = [1, BLOCK, block_i]
    if transposed:
        width, depth, tile_of_w = depth, width, [1, block_i, BLOCK]
    described = _describe(a, [tile, block_i], w, tile_of_w)
    kernels.product_kernel[(cdiv(width, BLOCK), tiles.shape[0])](
        *(described or (a, w)),
        *tensors,
        *(tiles, num_experts, width, depth, kept_share, 1 / (kept_share or 1)),
        RELU=relu,
        DESCRIBED=described is not None,
        TRANSPOSED=transposed,
        PRECISION=_precision(a.dtype),
        BLOCK_S=tile,
        BLOCK_O=BLOCK,
        BLOCK_I=block_i,
        num_warps=8 if tile == BLOCK else 4,
    )


def _weight_gradient_like(grad: Tensor, a: Tensor, end: Tensor) -> Tensor:
    return grad.new_empty(end.shape[0] - 1, grad.shape[1], a.shape[1])


@operator(_weight_gradient_like)
def weight_gradient(grad: Tensor, a: Tensor, end: Tensor) -> Tensor:
    """(N, O, I): grad^T a over the slots of each expert.

    Args:
        grad: (S, O), sorted by expert.
        a: (S, I), sorted by expert.
        end: (N + 1,) int32, one past the last slot of each expert and of no expert.
    """
    d_w = _weight_gradient_like(grad, a, end)
    grad, a = grad.contiguous(), a.contiguous()
    num_experts, width, depth = d_w.shape
    programs = cdiv(width, BLOCK) * cdiv(depth, BLOCK)
    block_s = _depth_of_block(a) // 2
    described = _describe(grad, [block_s, BLOCK], a, [block_s, BLOCK])
    if described is None:
        block_s *= 2
    kernels.weight_gradient_kernel[(programs, num_experts)](
        *(grad, a, *(described or (None, None)), d_w, end, width, depth),
        DESCRIBED=described is not None,
        PRECISION=_precision(a.dtype),
        BLOCK_S=block_s,
        BLOCK_O=BLOCK,
        BLOCK_I=BLOCK,
        num_warps=8,
        num_stages=5 if described else 3,
    )
    return d_w


def _sum_groups_like(value: Tensor, end: Tensor, dtype: torch.dtype) -> Tensor:
    return value.new_empty(end.shape[0] - 1, value.shape[1], dtype=dtype)


@operator(_sum_groups_like)
def sum_groups(value: Tensor, end: Tensor, dtype: torch.dtype) -> Tensor:
    """(N, X): the sum of the rows of each group.

    Args:
        value: (R, X), sorted by group.
        end: (N + 1,) int32, one past the last row of each group and of no group.
        dtype: of the result.
    """
    total = _sum_groups_like(value, end, dtype)
    num_groups, width = total.shape
    kernels.sum_groups_kernel[(cdiv(width, 32), num_groups)](
        *(value.contiguous(), end, total, width), BLOCK_R=64, BLOCK_X=32
    )
    return total


def _weigh_backward_like(
    grad: Tensor, out: Tensor, slot: Any, gate: Tensor, scale: Optional[Tensor], end: Any
) -> List[Tensor]:
    results = [torch.empty_like(out), gate.new_empty(gate.shape)]
    return results if scale is None else [*results, torch.empty_like(scale)]


@operator(_weigh_backward_like)
def weigh_backward(
    grad: Tensor, out: Tensor, slot: Tensor, gate: Tensor, scale: Optional[Tensor], end: Tensor
) -> List[Tensor]:
    """(S, D), the shape of gate, (D,): the gradients of out, gate and scale in gate * scale * out.

    Args:
        grad: (T, D), of the sum over each token's slots.
        out: (S, D), sorted by expert.
        slot: (S,) int64, where each row comes from.
        gate: (T, K).
        scale: (D,); without it there is no third result.
        end: (N + 1,) int32, one past the last slot of each expert and of no expert.
    """
    d_out, d_gate = torch.empty_like(out), gate.new_empty(gate.shape)
    (num_slots, width), block_s = out.shape, 64
    programs = cdiv(num_slots, block_s)
    parts = None if scale is None else gate.new_empty(programs, width, dtype=torch.float32)
    kernels.weigh_backward_kernel[(programs,)](
        *(grad, out, slot, contiguous(gate), contiguous(scale), end, d_out, d_gate, parts),
        *(num_slots, end.shape[0] - 1, gate.shape[1], width, grad.stride(0), grad.stride(1)),
        BLOCK_S=block_s,
        BLOCK_D=min(128, next_power_of_2(width)),
    )
    if scale is None or parts is None:
        return [d_out, d_gate]
    return [d_out, d_gate, parts.sum(0).to(scale.dtype)]
