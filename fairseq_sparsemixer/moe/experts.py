"""The experts of one layer as stacked weights.

Shape suffixes: see :mod:`fairseq_sparsemixer.moe`.
"""

import math
from typing import Any, Callable, Dict, List, Optional, Union

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fairseq_sparsemixer.moe.parallel import ExpertParallel

Activation = Callable[[Tensor], Tensor]


def _identity(x: Tensor) -> Tensor:
    return x


ACTIVATIONS: Dict[str, Activation] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "swish": F.silu,
    "tanh": torch.tanh,
    "linear": _identity,
}


class Experts(nn.Module):
    """N two-layer perceptrons, E_i(x) = w2_i a(w1_i x + b1_i) + b2_i.

    One parameter holds all experts, so an expert without tokens gets a gradient of zeros rather
    than none, which is what data-parallel training needs. After :meth:`spread` it holds those of
    this worker alone, and so does the ``state_dict``; ``load_state_dict`` takes all N, too.

    Args:
        embed_dim: D.
        ffn_dim: F.
        num_experts: N; as an attribute, those that lie here.
        activation_fn: a name in ``ACTIVATIONS`` or a function from Tensor to Tensor, not in place
            and the same in each call. A Module, which may be anything else, is served by the
            backend ``loop`` alone.
        activation_dropout: probability of dropping an inner unit, after the activation.
        recompute: whether backends that can do so compute the inner layer again in the backward
            pass instead of keeping it.

    Raises:
        ValueError: for a size below 1, an unknown activation, or a probability outside [0, 1].
    """

    def __init__(
        self,
        embed_dim: int,
        ffn_dim: int,
        num_experts: int,
        activation_fn: Union[str, Activation] = "relu",
        activation_dropout: float = 0.0,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        sizes = {"embed_dim": embed_dim, "ffn_dim": ffn_dim, "num_experts": num_experts}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name} must be at least 1, not {size}")
        if isinstance(activation_fn, str) and activation_fn not in ACTIVATIONS:
            raise ValueError(
                f"unknown activation_fn {activation_fn!r}; choose from {', '.join(ACTIVATIONS)}"
            )
        if not 0 <= activation_dropout <= 1:
            raise ValueError(f"activation_dropout must be 0 to 1, not {activation_dropout}")
        self.num_experts = num_experts
        self.activation_fn = (
            ACTIVATIONS[activation_fn] if isinstance(activation_fn, str) else activation_fn
        )
        self.activation_dropout = activation_dropout
        self.recompute = recompute
        self.packed: Any = None
        """What :meth:`MoEFeedForward.prepare_for_inference` makes of the weights for a backend."""
        self.parallel: Optional[ExpertParallel] = None
        """Where the others are, if they do not all lie here."""
        self.w1 = nn.Parameter(torch.empty(num_experts, ffn_dim, embed_dim))
        self.b1 = nn.Parameter(torch.empty(num_experts, ffn_dim))
        self.w2 = nn.Parameter(torch.empty(num_experts, embed_dim, ffn_dim))
        self.b2 = nn.Parameter(torch.empty(num_experts, embed_dim))
        self.reset_parameters()

    @property
    def is_relu(self) -> bool:
        """Whether the activation is ReLU, which can be part of a product."""
        return self.activation_fn in (F.relu, torch.relu)

    @property
    def kept_share(self) -> float:
        """The share of the inner units that dropout leaves."""
        return 1 - self.activation_dropout * self.training

    def train(self, mode: bool = True) -> "Experts":
        """See :meth:`torch.nn.Module.train`; training makes what was packed out of date."""
        if mode:
            self.packed = None
        return super().train(mode)

    def reset_parameters(self) -> None:
        """Initialise each expert as two :class:`torch.nn.Linear`, as fairseq's dense layer is."""
        for weight, bias in ((self.w1, self.b1), (self.w2, self.b2)):
            bound = 1 / math.sqrt(weight.shape[-1])
            nn.init.uniform_(weight, -bound, bound)
            nn.init.uniform_(bias, -bound, bound)

    def spread(self, parallel: ExpertParallel) -> None:
        """Keep this worker's experts of those that all workers have drawn alike.

        Raises:
            ValueError: the number of experts is no multiple of the size of a group.
        """
        if self.num_experts % parallel.size:
            raise ValueError(
                f"{self.num_experts} experts cannot be spread over {parallel.size} workers"
            )
        for name, whole in list(self.named_parameters()):
            own = nn.Parameter(parallel.own(whole.detach()).clone(), whole.requires_grad)
            own.expert = True  # type: ignore[attr-defined]  # see is_spread
            setattr(self, name, own)
        self.num_experts //= parallel.size
        self.parallel = parallel

    def _load_from_state_dict(
        self, state_dict: Dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        parallel = self.parallel
        if parallel is not None:
            everyone = self.num_experts * parallel.size
            state_dict = {
                name: parallel.own(value)
                if name.startswith(prefix) and len(value) == everyone
                else value
                for name, value in state_dict.items()
            }
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def forward(self, x_SD: Tensor, slots_per_expert: List[int]) -> Tensor:
        """(S, D): the experts' outputs for rows sorted by expert.

        Args:
            x_SD: the first ``slots_per_expert[0]`` rows belong to expert 0, and so on.
            slots_per_expert: N numbers with sum S.
        """
        weights = list(zip(self.w1.unbind(), self.b1.unbind(), self.w2.unbind(), self.b2.unbind()))
        # With no row at all one expert still runs, on nothing, to stay part of the graph.
        used = [i for i, slots in enumerate(slots_per_expert) if slots] or [0]
        rows = x_SD.split(slots_per_expert)
        return torch.cat([self._expert(rows[i], *weights[i]) for i in used])

    def _expert(self, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        hidden = self.activation_fn(F.linear(x, w1, b1))
        hidden = F.dropout(hidden, self.activation_dropout, self.training)
        return F.linear(hidden, w2, b2)

    def extra_repr(self) -> str:
        """The settings shown by ``print(model)``."""
        num_experts, ffn_dim, embed_dim = self.w1.shape
        return f"{embed_dim}, {ffn_dim}, num_experts={num_experts}"
