"""Triton's interpreter, with which kernels run on the CPU; imported before anything imports Triton.

It is slow, and no proof that a kernel is fast or fits a GPU: that it computes the right numbers.
"""

import os

import numpy as np
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

try:
    import triton
    from triton.runtime import interpreter
except ImportError:
    triton = None


OLD = triton is not None and tuple(map(int, triton.__version__.split(".")[:2])) < (3, 3)


def mend() -> None:
    """Errors of the interpreter: of Triton up to 3.6, up to 3.2, and also of 3.7."""
    patch_tensor = interpreter._patch_lang_tensor
    builder = interpreter.InterpreterBuilder
    create_dot = builder.create_dot

    def patch_tensor_with_index(tensor, *scope):  # Triton before 3.6 gives no scope
        patch_tensor(tensor, *scope)
        set_attr = scope[0].set_attr if scope else setattr
        # It calls int() on arrays of one cell, which numpy 2.4 refuses.
        set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))
        if OLD:
            # Its transposed tensor forgets that it has a shape.
            set_attr(tensor, "T", property(triton.language.trans))

    def create_dot_of_numbers(self, a, b, *rest):
        # It multiplies the bits of bfloat16, which numpy does not have, as integers.
        if a.dtype == triton.language.bfloat16:
            a, b = (self.create_fp_ext(value, triton.language.float32) for value in (a, b))
        return create_dot(self, a, b, *rest)

    interpreter._patch_lang_tensor = patch_tensor_with_index
    builder.create_dot = create_dot_of_numbers
    if OLD:
        create_masked_store = builder.create_masked_store

        def create_masked_store_of_type(self, ptrs, value, *rest):
            # Its sums of int32 are int64, which it would write over the cells behind, too.
            value.data = value.data.astype(interpreter._get_np_dtype(ptrs.get_element_ty()))
            return create_masked_store(self, ptrs, value, *rest)

        builder.create_masked_store = create_masked_store_of_type


def extent(tensor):
    """The addresses of a tensor's first byte and behind its last."""
    start = tensor.data_ptr()
    cells = 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride()))
    return start, start + (cells * tensor.element_size() if tensor.numel() else 0)


def stay_within_tensors():
    """Let kernels fail that read or write beside the tensors that they are given.

    On a GPU that is memory of others; here, too, whatever lies there would be taken. Where a mask
    takes a cell out and nothing is said of it, it is not 0 but what no sum survives.
    """
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    load, store, call = builder.create_masked_load, builder.create_masked_store, executor.__call__
    given = []

    def call_with(self, *args, **kwargs):
        values = [getattr(value, "base", value) for value in (*args, *kwargs.values())]
        given[:] = [extent(value) for value in values if isinstance(value, torch.Tensor)]
        return call(self, *args, **kwargs)

    def check(pointers, mask):
        taken = np.broadcast_to(mask.data, pointers.data.shape).astype(bool)
        address = pointers.data[taken].astype(np.int64)
        end = address + pointers.get_element_ty().primitive_bitwidth // 8
        inside = np.zeros(address.shape, dtype=bool)
        for first, last in given:
            inside |= (address >= first) & (end <= last)
        assert inside.all(), "a kernel leaves the tensors that it is given"

    def as_truth(mask):
        # Of Triton 3.9: it makes masks of integers, and refuses them.
        if isinstance(mask, interpreter.TensorHandle):
            mask.data = mask.data.astype(bool)

    def load_within(self, pointers, mask, other, *rest, **named):
        check(pointers, mask)
        as_truth(mask)
        if other is None and pointers.data.size > 1:  # of a single cell it forgets a 0
            dtype = np.dtype(interpreter._get_np_dtype(pointers.get_element_ty()))
            anything = np.full(pointers.data.size * dtype.itemsize, 255, np.uint8).view(dtype)
            other = interpreter.TensorHandle(
                anything.reshape(pointers.data.shape), pointers.get_element_ty()
            )
        return load(self, pointers, mask, other, *rest, **named)

    def store_within(self, pointers, value, mask, *rest, **named):
        check(pointers, mask)
        as_truth(mask)
        return store(self, pointers, value, mask, *rest, **named)

    builder.create_masked_load, builder.create_masked_store = load_within, store_within
    executor.__call__ = call_with


if triton is not None and "TRITON_INTERPRET" in os.environ:
    mend()
    stay_within_tensors()
np.seterr(divide="ignore", invalid="ignore")  # inf and NaN are numbers here as on a GPU
