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


def mend() -> None:
    """Two errors of the interpreter: the first of Triton 3.6, the second also of 3.7."""
    patch_tensor = interpreter._patch_lang_tensor
    create_dot = interpreter.InterpreterBuilder.create_dot

    def patch_tensor_with_index(tensor, scope):
        patch_tensor(tensor, scope)
        # It calls int() on arrays of one cell, which numpy 2.4 refuses.
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def create_dot_of_numbers(self, a, b, *rest):
        # It multiplies the bits of bfloat16, which numpy does not have, as integers.
        if a.dtype == triton.language.bfloat16:
            a, b = (self.create_fp_ext(value, triton.language.float32) for value in (a, b))
        return create_dot(self, a, b, *rest)

    interpreter._patch_lang_tensor = patch_tensor_with_index
    interpreter.InterpreterBuilder.create_dot = create_dot_of_numbers


if triton is not None and "TRITON_INTERPRET" in os.environ:
    mend()
np.seterr(divide="ignore", invalid="ignore")  # inf and NaN are numbers here as on a GPU
