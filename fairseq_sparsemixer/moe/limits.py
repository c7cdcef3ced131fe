"""What a layer cannot be asked for, said in one line rather than by an error from the depths."""

import functools
import logging
import sys

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointFunction

from fairseq_sparsemixer.moe.experts import Experts

logger = logging.getLogger(__name__)

_is_exporting = getattr(torch.compiler, "is_exporting", lambda: False)  # since torch 2.7


def check_call(x: Tensor, experts: Experts, backend: str) -> None:
    """Refuse a call that cannot be served, and warn of one that loses a gradient.

    Args:
        x: that the layer is given.
        experts: of the layer.
        backend: as configured.

    Raises:
        ValueError: says what the layer can do instead.
    """
    if torch.compiler.is_compiling():
        # The kernels' shapes do not depend on values.
        if _is_exporting() and not (x.is_cuda and backend in ("auto", "triton")):
            raise ValueError(
                "torch.export cannot take a layer whose experts get as many tokens as the input "
                "says: use torch.compile"
            )
        return
    if torch.jit.is_tracing():
        raise ValueError(
            "torch.jit.trace would keep the experts that this one input goes to: use torch.compile"
        )
    if x.is_meta or experts.w1.is_meta:
        raise ValueError(
            "a layer on the meta device can be built and counted, not run: its tokens go where "
            "values say; give weights and input a device (to_empty, then load_state_dict)"
        )
    for value in (x, experts.w1):
        _check_transform(value, backend)
    if not torch.is_grad_enabled() and experts.training and _in_reentrant_checkpoint():
        _warn_of_reentrant_checkpoint()


def _check_transform(value: Tensor, backend: str) -> None:
    """Refuse what torch.func cannot do; a value may be wrapped several times."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(value):
        if functorch.is_batchedtensor(value):
            raise ValueError(
                "vmap cannot batch a layer that sends each token elsewhere: give it all tokens at "
                "once, (..., width) of any leading dimensions"
            )
        if functorch.is_gradtrackingtensor(value) and backend != "loop":
            raise ValueError(
                f"backend {backend!r} cannot be put under torch.func: choose 'loop', or take "
                "torch.autograd.grad"
            )
        value = functorch.get_unwrapped(value)


def _in_reentrant_checkpoint() -> bool:
    """Whether torch's own checkpoint called this; fairseq's hands all losses out as tensors."""
    code = CheckpointFunction.forward.__code__
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code is code:
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


@functools.cache
def _warn_of_reentrant_checkpoint() -> None:
    """Once, not for each layer."""
    logger.warning(
        "torch.utils.checkpoint with use_reentrant=True takes the gradient from the routing that a "
        "layer returns, and so from its balance loss: pass use_reentrant=False, or compute the "
        "loss inside and return it"
    )
