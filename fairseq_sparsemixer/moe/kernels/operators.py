"""Functions that launch kernels, as operators of PyTorch where ``torch.compile`` needs them.

The time of small layers is that which the host takes to launch them, so what it does is kept short.
"""

import functools
from typing import Any, Callable, List, Optional, TypeVar, cast

import torch
from torch import Tensor
from torch.compiler import is_compiling

Function = TypeVar("Function", bound=Callable[..., Any])

_libraries: List[torch.library.Library] = []
"""An operator lives as long as its library."""


def operator(like: Callable[..., Any]) -> Callable[[Function], Function]:
    """Decorator that registers a function, which must change no argument and return fresh tensors.

    The device of its first argument is the current one while it runs.

    The operator, which is for any device, is called by ``torch.compile`` and for tensors that stand
    for others (FakeTensor); else the function itself, which saves some two microseconds.

    Args:
        like: takes the same arguments, the first of them a tensor, and returns tensors of the same
            sizes as the results.
    """

    def register(function: Function) -> Function:
        if not _libraries:
            _libraries.append(torch.library.Library("fairseq_sparsemixer", "DEF"))
        library, name = _libraries[0], function.__name__

        def on_its_device(first: Tensor, *args: Any, **named: Any) -> Any:
            with torch.cuda.device_of(first):
                return function(first, *args, **named)

        schema = torch.library.infer_schema(function, mutates_args=())
        library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        library.impl(name, on_its_device, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{library.ns}::{name}", like, lib=library)
        registered = getattr(torch.ops.fairseq_sparsemixer, name).default

        @functools.wraps(function)
        def call(*args: Any) -> Any:
            first = args[0]
            if type(first) is not Tensor or is_compiling():
                return registered(*args)
            # Triton launches on the current device.
            if first.is_cuda and first.get_device() != torch.cuda.current_device():
                return on_its_device(*args)
            return function(*args)

        return cast(Function, call)

    return register


def cdiv(number: int, divisor: int) -> int:
    """The quotient rounded up; Triton's own takes 25 times as long."""
    return -(-number // divisor)


def contiguous(tensor: Optional[Tensor]) -> Optional[Tensor]:
    """As kernels take it; None for None."""
    return None if tensor is None else tensor.contiguous()


def next_power_of_2(number: int) -> int:
    """The smallest power of two that is no less than a number of at least 1."""
    return 1 << (number - 1).bit_length()


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator of a backward function that autograd must not differentiate again.

    PyTorch's own one is passed by where a second gradient is asked for some inputs only, and then
    leaves the experts' part out without a word.
    """

    @functools.wraps(backward)
    def checked(ctx: Any, *gradients: Any) -> Any:
        if not torch.is_grad_enabled():
            return backward(ctx, *gradients)
        if not torch.compiler.is_compiling():
            raise RuntimeError(
                "a gradient of the experts cannot be differentiated again: use backend 'loop', on "
                "a CPU"
            )
        with torch.no_grad():
            return backward(ctx, *gradients)

    return checked
