"""Functions as operators of PyTorch, which ``torch.compile`` calls without looking into them."""

import functools
from typing import Any, Callable, List, TypeVar

import torch

Function = TypeVar("Function", bound=Callable[..., Any])

_libraries: List[torch.library.Library] = []
"""An operator lives as long as its library."""


def operator(like: Callable[..., Any]) -> Callable[[Function], Function]:
    """Decorator that registers a function, which must change no argument and return fresh tensors.

    As ``torch.library.custom_op``, for any device, with a quarter of its time for a call.

    Args:
        like: takes the same arguments and returns tensors of the same sizes as the results.
    """

    def register(function: Function) -> Function:
        if not hasattr(torch.library, "infer_schema"):  # before PyTorch 2.5
            return function
        if not _libraries:
            _libraries.append(torch.library.Library("fairseq_sparsemixer", "DEF"))
        library, name = _libraries[0], function.__name__
        schema = torch.library.infer_schema(function, mutates_args=())
        library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        library.impl(name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{library.ns}::{name}", like, lib=library)
        return getattr(torch.ops.fairseq_sparsemixer, name).default

    return register


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator of a backward function that autograd must not differentiate again.

    PyTorch's own one is passed by where a second gradient is asked for some inputs only, and then
    leaves the experts' part out without a word.
    """

    @functools.wraps(backward)
    def checked(ctx: Any, *gradients: Any) -> Any:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                "a gradient of the experts cannot be differentiated again: use backend 'loop', on "
                "a CPU"
            )
        with torch.no_grad():
            return backward(ctx, *gradients)

    return checked
