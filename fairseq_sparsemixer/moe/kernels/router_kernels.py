"""Triton kernels of :mod:`fairseq_sparsemixer.moe.kernels.router`."""

# mypy: allow-untyped-defs
# Types of a kernel's arguments are made up by Triton for each call.

import triton
import triton.language as tl


@triton.jit
def _softmax(z):
    """Of each row; cells outside of the matrix hold -inf and get 0."""
    exponential = tl.exp(z - tl.max(z, 1)[:, None])
    return exponential / tl.sum(exponential, 1)[:, None]


@triton.jit(do_not_specialize=["num_tokens"])
def route_kernel(
    z_ptr,  # (T, N)
    noise_ptr,  # (T, N) drawn from the exponential distribution; None to take the largest
    uniform_ptr,  # (T,) drawn from U(0, 1); None where m is 1
    index_ptr,  # (T,)
    gate_ptr,  # (T,)
    probs_ptr,  # (T, N)
    masked_probs_ptr,  # (T, N), None for routers that mask nothing
    slope_ptr,  # (T, 2) what dg and dlog q count for in the gate's gradient; None where g = q
    num_tokens,
    num_experts,
    jitter,  # 2 eps of the mask
    temperature,
    chance,  # of m = 1
    point,  # the other m
    own,  # what dg counts for where m = 1
    choice,  # what g dlog q counts for where m = 1
    other_own,  # and at the other point
    other_choice,
    best_own,  # and where m = 1 because of FULL_ON_BEST
    best_choice,
    GATE: tl.constexpr,
    FULL_ON_BEST: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Mask, distributions, draw and gate of BLOCK_T tokens; BLOCK_N is no less than N."""
    token = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    column = tl.arange(0, BLOCK_N)
    is_token = token < num_tokens
    is_cell = is_token[:, None] & (column < num_experts)[None, :]
    cell = token[:, None] * num_experts + column[None, :]
    z = tl.load(z_ptr + cell, mask=is_cell, other=float("-inf"))
    best = tl.argmax(z, 1)
    probs = _softmax(z)
    tl.store(probs_ptr + cell, probs, mask=is_cell)
    kept = z
    if masked_probs_ptr is not None:
        top = tl.max(z, 1)[:, None]
        reach = top - jitter * tl.maximum(tl.abs(z), top)
        kept = tl.where(z < reach, float("-inf"), z) / temperature
        probs = _softmax(kept)
        tl.store(masked_probs_ptr + cell, probs, mask=is_cell)
    index = best
    if noise_ptr is not None:
        noise = tl.load(noise_ptr + cell, mask=is_cell, other=1.0)
        index = tl.argmax(kept - tl.log(tl.maximum(noise, 1.1754944e-38)), 1)
    # Not a number is no reason to leave the matrix.
    index = tl.minimum(index, num_experts - 1)
    if GATE == "full":
        probs = _softmax(z / temperature)
    if GATE == "one":
        gate = tl.full((BLOCK_T,), 1.0, tl.float32)
    else:
        gate = tl.sum(tl.where(column[None, :] == index[:, None], probs, 0.0), 1)
    full = is_token
    if uniform_ptr is not None:
        full = tl.load(uniform_ptr + token, mask=is_token, other=0.0) < chance
        if FULL_ON_BEST:
            full = full | (index == best)
    if slope_ptr is not None:
        own_T = tl.where(full, own, other_own)
        choice_T = tl.where(full, choice, other_choice)
        if FULL_ON_BEST:
            own_T = tl.where(index == best, best_own, own_T)
            choice_T = tl.where(index == best, best_choice, choice_T)
        tl.store(slope_ptr + 2 * token, own_T, mask=is_token)
        tl.store(slope_ptr + 2 * token + 1, choice_T * gate, mask=is_token)
    gate = tl.where(full, gate, gate * point)
    tl.store(index_ptr + token, index, mask=is_token)
    tl.store(gate_ptr + token, gate, mask=is_token)


@triton.jit(do_not_specialize=["num_tokens"])
def route_backward_kernel(
    index_ptr,  # (T,)
    probs_ptr,  # (T, N)
    masked_probs_ptr,  # (T, N) or None
    slope_ptr,  # (T, 2) or None, as above
    d_gate_ptr,  # (T,) or None
    d_probs_ptr,  # (T, N) or None
    d_masked_probs_ptr,  # (T, N) or None
    d_z_ptr,  # (T, N)
    num_tokens,
    num_experts,
    temperature,
    gradient_scale,
    GATE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The gradient of the logits of BLOCK_T tokens."""
    token = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    column = tl.arange(0, BLOCK_N)
    is_token = token < num_tokens
    is_cell = is_token[:, None] & (column < num_experts)[None, :]
    cell = token[:, None] * num_experts + column[None, :]
    index = tl.load(index_ptr + token, mask=is_token, other=0)
    is_chosen = column[None, :] == index[:, None]
    d_chosen = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
    d_gate = tl.zeros((BLOCK_T,), tl.float32)
    if d_gate_ptr is not None:
        d_gate = tl.load(d_gate_ptr + token, mask=is_token, other=0.0)
        if slope_ptr is None:
            d_chosen = tl.where(is_chosen, (d_gate * gradient_scale)[:, None], 0.0)
    probs = tl.load(probs_ptr + cell, mask=is_cell, other=0.0)
    d_probs = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
    if d_probs_ptr is not None:
        d_probs = tl.load(d_probs_ptr + cell, mask=is_cell, other=0.0)
    if masked_probs_ptr is None:
        d_probs += d_chosen
    d_z = probs * (d_probs - tl.sum(probs * d_probs, 1)[:, None])
    if slope_ptr is not None:
        if GATE == "full":
            own = d_gate * tl.load(slope_ptr + 2 * token, mask=is_token, other=0.0)
            tempered = _softmax(tl.log(probs) / temperature)
            own *= tl.sum(tl.where(is_chosen, tempered, 0.0), 1)
            d_z += own[:, None] * (tl.where(is_chosen, 1.0, 0.0) - tempered) / temperature
        d_log = d_gate * tl.load(slope_ptr + 2 * token + 1, mask=is_token, other=0.0)
        drawn_from = probs
        if masked_probs_ptr is not None:  # loaded again below: held, it takes 27 registers more
            drawn_from = tl.load(masked_probs_ptr + cell, mask=is_cell, other=0.0)
        d_z += d_log[:, None] * (tl.where(is_chosen, 1.0, 0.0) - drawn_from) / temperature
    if masked_probs_ptr is not None:
        masked = tl.load(masked_probs_ptr + cell, mask=is_cell, other=0.0)
        d_masked = d_chosen
        if d_masked_probs_ptr is not None:
            d_masked += tl.load(d_masked_probs_ptr + cell, mask=is_cell, other=0.0)
        d_z += masked * (d_masked - tl.sum(masked * d_masked, 1)[:, None]) / temperature
    tl.store(d_z_ptr + cell, d_z, mask=is_cell)
