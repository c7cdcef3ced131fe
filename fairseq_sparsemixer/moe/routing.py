"""What a router is, what it returns, and the registry of routers by name.

Shape suffixes: see :mod:`fairseq_sparsemixer.moe`.
"""

import contextlib
import dataclasses
import difflib
import inspect
import math
from typing import Any, Callable, ContextManager, Dict, Mapping, NamedTuple, Optional, Type, Union

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fairseq_sparsemixer.moe.adaptation import (
    AllReduce,
    BalanceBias,
    ExpertLines,
    ExpertMeans,
)
from fairseq_sparsemixer.moe.kernels import projection as fused_projection
from fairseq_sparsemixer.moe.kernels import router as fused_router

UNDECIDED = 1e-4
"""How much logits differ after :meth:`Router.begin_undecided`, for tokens of unit variance: float16
still tells such weights apart, and gates are equal to this share."""


@dataclasses.dataclass
class Routing:
    """The experts chosen for T tokens, and how much each of them counts.

    Rows of padding are kept, so that row t always belongs to token t of the flattened batch; they
    have ``expert_index`` -1 and ``gate`` 0.
    """

    expert_index: Tensor
    """(T, K) int64: the chosen experts, -1 at padding and in slots that a token leaves empty.

    Routers that may compute any number of experts have K = N slots (``expert-choice`` and, in
    training, those that compute all)."""
    gate: Tensor
    """(T, K) float32: differentiable multiplier of the expert's output, 0 where there is none."""
    logits: Tensor
    """(T, N) float32: router logits z, jitter included, and the balance bias where the router
    samples."""
    probs: Tensor
    """(T, N) float32: p, the softmax of the logits."""
    sampling_probs: Tensor
    """(T, N) float32: the distribution that the expert is drawn from, and a masked gate read from:
    the masked softmax p~ for SparseMixer, ``probs`` for routers that mask nothing."""
    padding_mask: Optional[Tensor] = None
    """(T,) bool, True at padding; None where there is none."""
    num_chosen: Optional[int] = None
    """How many of the K slots, from the first, are choices; the others are computed for their
    gradient alone and do not count as load. None: all."""
    mean_gate: Optional[Tensor] = None
    """(T, N) float32: differentiable multiplier of each expert's running mean output
    (:attr:`Router.expert_means`), 0 at padding; None where the router uses no means."""
    load: Optional[Tensor] = None
    """(T, N) float32: smooth chance of being chosen, with gradient (arXiv 1701.06538, eq. 9);
    None where ``sampling_probs`` is that already."""
    backend: str = "auto"
    """What its sums may be formed by: see :attr:`Router.backend`."""

    @property
    def chosen(self) -> Tensor:
        """(T, num_chosen) int64: the part of ``expert_index`` that counts as load."""
        return self.expert_index[:, : self.num_chosen]


class EvaluationRule(NamedTuple):
    """What a causal router does in evaluation, for programs that do the same without it.

    Experts are those with the K largest logits (plus the balance bias), or a hash of the token.
    """

    gate: str
    """``"one"``; ``"all"``, softmax over all experts, or ``"chosen"``, over the chosen ones, both
    without the balance bias; ``"left"``, over all that are not chosen yet, or ``"masked"``, over
    those of them that jitter could have made the largest, both with it."""
    jitter_eps: Optional[float] = None
    """Of the mask; None without one."""
    temperature: float = 1.0
    """Logits are divided by it for the gate."""
    hash_seed: Optional[int] = None
    """Where experts are a hash of the token."""


class Context(NamedTuple):
    """What a router may look at besides the logits; None where the caller did not give it."""

    x: Optional[Tensor] = None
    """(T, D): the tokens."""
    padding_mask: Optional[Tensor] = None
    """(T,) bool, True at padding."""
    token_ids: Optional[Tensor] = None
    """(T,) int64: entries of the vocabulary, maybe with the languages of their sentences."""


class Router(nn.Module):
    """Maps tokens to experts; a subclass supplies the gradient estimator in :meth:`select`.

    The arithmetic is float32 whatever the model's dtype, under autocast too: half-precision
    logits flip choices (selective precision, arXiv 2101.03961).

    What is learnt without a gradient (:mod:`fairseq_sparsemixer.moe.adaptation`) changes in
    :meth:`end_update`, which a training loop calls after each update. With a balance bias b,
    routers that choose the largest logits choose by z + b and read the gate from z; those that
    sample also read it from the distribution that they sample from, which contains b.

    Args:
        embed_dim: D, the width of a token.
        num_experts: N, at least 1.
        top_k: K, experts of each token, 1 to N.
        jitter_eps: strength of the jitter; a router says in its own docstring what it does.
        bias: whether the logits have a bias b.
        init_scale: factor on the initial weights, which are those of :class:`torch.nn.Linear`.
        balance_bias_rate: step of the balance bias after an update, 0 for none (the source uses
            0.001).

    Raises:
        ValueError: for a value out of range; the message names it and what is allowed.
    """

    min_top_k = 1
    """The smallest top_k that the estimator is defined for."""
    max_top_k: Optional[int] = 1
    """The largest top_k that the estimator is defined for; None where there is no limit."""
    causal = True
    """Whether a token's experts depend on that token alone; a decoder needs that."""
    needs_token_ids = False
    """Whether :meth:`forward` must be given ``token_ids``."""
    needs_languages = False
    """Whether these tell the language of the token's sentence as well."""
    needs_balance = True
    """Whether its experts starve unless a loss or a bias balances them."""
    takes_balance_bias = True
    """Whether the choice is by logits that a bias can shift."""
    computes_all_experts = False
    """Whether training computes every expert for every token: a yardstick, not a sparse layer."""
    adds_means = False
    """Whether predicted outputs are part of what evaluation puts out."""
    temperature = 1.0
    """The choice is by softmax(z / temperature) over the experts that are not masked."""
    balance_weight: Optional[float] = None
    """The weight of the balance loss that it needs; None where the usual one does."""

    weight: Optional[nn.Parameter]
    """(N, D), None for routers that learn no logits."""
    output_scale: Optional[nn.Parameter]
    """(D,) the learned factor omega of the experts' output; None for routers without one."""
    expert_means: Optional[Union[ExpertMeans, ExpertLines]]
    """Predicts outputs of experts that are not computed; None for routers that need none."""
    balance_bias: Optional[BalanceBias]
    """None without a ``balance_bias_rate``."""

    backend = "auto"
    """What computes it: on a GPU that the experts' Triton kernels serve, those of the router for
    "auto" and "triton", and plain PyTorch for the name of another backend. Set by the layer."""

    name = ""
    """The name in :data:`ROUTERS`, set by :func:`register_router`."""

    @property
    def undecided_logit(self) -> float:
        """What logits are close to after :meth:`begin_undecided`."""
        return 0.0

    def __init__(
        self,
        *,
        embed_dim: int,
        num_experts: int,
        top_k: int = 1,
        jitter_eps: float = 0.1,
        bias: bool = True,
        init_scale: float = 1.0,
        balance_bias_rate: float = 0.0,
    ) -> None:
        super().__init__()
        if embed_dim < 1:
            raise ValueError(f"embed_dim must be at least 1, not {embed_dim}")
        if num_experts < 1:
            raise ValueError(f"num_experts must be at least 1, not {num_experts}")
        if not 1 <= top_k <= num_experts:
            raise ValueError(f"top_k must be 1 to num_experts ({num_experts}), not {top_k}")
        if top_k < self.min_top_k or (self.max_top_k is not None and top_k > self.max_top_k):
            allowed = (
                f"at least {self.min_top_k}" if self.max_top_k is None else str(self.max_top_k)
            )
            raise ValueError(f"top_k must be {allowed} for router {self.name!r}, not {top_k}")
        for name, value in (
            ("jitter_eps", jitter_eps),
            ("init_scale", init_scale),
            ("balance_bias_rate", balance_bias_rate),
        ):
            if not (value >= 0 and math.isfinite(value)):
                raise ValueError(f"{name} must be a number of at least 0, not {value}")
        if balance_bias_rate > 0 and not self.takes_balance_bias:
            raise ValueError(f"router {self.name!r} has no use for a balance_bias_rate: leave it 0")
        self.embed_dim = embed_dim
        self.num_experts = num_experts
        self.top_k = top_k
        self.jitter_eps = jitter_eps
        self.init_scale = init_scale
        self.weight = nn.Parameter(torch.empty(num_experts, embed_dim))
        self.bias = nn.Parameter(torch.empty(num_experts)) if bias else None
        self.register_parameter("output_scale", None)
        self.balance_bias = (
            BalanceBias(num_experts, balance_bias_rate) if balance_bias_rate > 0 else None
        )
        self.expert_means = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as :class:`torch.nn.Linear` does, times ``init_scale``."""
        bound = self.init_scale / math.sqrt(self.embed_dim)
        for parameter in (self.weight, self.bias):
            if parameter is not None:
                nn.init.uniform_(parameter, -bound, bound)

    @torch.no_grad()
    def begin_undecided(self) -> None:
        """Start anew with logits that are next to equal, as fits experts that are alike.

        What they differ by sends tokens to all experts, and is too small for a gate to show.

        Raises:
            ValueError: the router needs a bias for it and has none.
        """
        if self.weight is None:
            return
        bound = UNDECIDED / math.sqrt(self.embed_dim)
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            self.bias.fill_(self.undecided_logit)
        elif self.undecided_logit != 0:
            raise ValueError(
                f"router {self.name!r} must have a bias: the mask compares logits with their size, "
                "so that of logits near 0 it leaves one"
            )

    def forward(
        self,
        x: Tensor,
        padding_mask: Optional[Tensor] = None,
        token_ids: Optional[Tensor] = None,
    ) -> Routing:
        """Route tokens.

        Args:
            x: (..., D), any floating dtype.
            padding_mask: (...) bool, True at padding, which goes to no expert.
            token_ids: (...) int64, entries of the vocabulary, or as the router says in its own
                docstring; read by ``hash`` and ``language`` alone.

        Raises:
            ValueError: the router needs token_ids and there are none.
        """
        with without_autocast(x.device.type):
            x_TD = rows(x)
            return self.route(
                self.logits(x_TD),
                None if padding_mask is None else padding_mask.reshape(-1),
                x=x_TD,
                token_ids=None if token_ids is None else token_ids.reshape(-1),
            )

    def logits(self, x_TD: Tensor) -> Tensor:
        """(T, N) float32: z = x W^T + b."""
        assert self.weight is not None
        return self.project(x_TD, self.weight, self.bias)

    def project(self, x_TD: Tensor, weight_ND: Tensor, bias_N: Optional[Tensor] = None) -> Tensor:
        """(T, N) float32: x W^T + b in float32, whatever the dtypes are."""
        if fused_router.serves(x_TD, self.backend):
            return fused_projection.project(x_TD, weight_ND, bias_N)
        bias_N = None if bias_N is None else bias_N.float()
        return F.linear(x_TD.float(), weight_ND.float(), bias_N)

    def route(
        self,
        logits: Tensor,
        padding_mask: Optional[Tensor] = None,
        *,
        x: Optional[Tensor] = None,
        token_ids: Optional[Tensor] = None,
    ) -> Routing:
        """The estimator alone.

        Args:
            logits: (T, N), never changed in place.
            padding_mask: (T,) bool, True at padding.
            x: (T, D), for routers that read more than the logits (``noisy-topk``).
            token_ids: (T,) int64, for routers that read them (``hash``, ``language``).
        """
        routing = self.select(logits.float(), Context(x, padding_mask, token_ids))
        routing.backend = self.backend
        if padding_mask is None:
            return routing
        mask_T1 = padding_mask.unsqueeze(-1)
        # Set, not replaced: torch.compile of torch 2.6 does not know dataclasses.replace.
        routing.expert_index = routing.expert_index.masked_fill(mask_T1, -1)
        routing.gate = routing.gate.masked_fill(mask_T1, 0.0)
        if routing.mean_gate is not None:
            routing.mean_gate = routing.mean_gate.masked_fill(mask_T1, 0.0)
        routing.padding_mask = padding_mask
        return routing

    def select(self, logits_TN: Tensor, context: Context) -> Routing:
        """Choose experts for every row of float32 logits; :meth:`route` takes padding out."""
        raise NotImplementedError

    def evaluation_rule(self) -> Optional[EvaluationRule]:
        """What :meth:`select` does in evaluation; None if that is more than rules can say."""
        return None

    def biased(self, logits_TN: Tensor) -> Tensor:
        """(T, N): the logits that experts are chosen by, z + b."""
        return logits_TN if self.balance_bias is None else logits_TN + self.balance_bias.bias

    def end_update(self, all_reduce: Optional[AllReduce] = None) -> None:
        """Adapt balance bias and mean outputs to the batches since the last call.

        Args:
            all_reduce: sums a tensor over the workers, in place, so that all of them agree.
        """
        for part in (self.balance_bias, self.expert_means):
            if part is not None:
                part.end_update(all_reduce)

    def drop_update(self) -> None:
        """Forget the batches since the last :meth:`end_update`, whose gradients are not used."""
        for part in (self.balance_bias, self.expert_means):
            if part is not None:
                part.drop_update()

    def extra_repr(self) -> str:
        """The settings shown by ``print(model)``."""
        return (
            f"{self.embed_dim}, num_experts={self.num_experts}, top_k={self.top_k}, "
            f"jitter_eps={self.jitter_eps}, bias={self.bias is not None}"
        )


def rows(x: Tensor) -> Tensor:
    """(T, D) for (..., D)."""
    # A view takes the host some microseconds, forward and backward.
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def without_autocast(device_type: str) -> ContextManager[Any]:
    """Context in which products keep the dtype of what they are given."""
    # Entering torch's context takes longer than routing one token.
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


def one_hot(index_TK: Tensor, like_TN: Tensor) -> Tensor:
    """(T, N) in the dtype of ``like_TN``: 1 at the K indices of each row, else 0."""
    return torch.zeros_like(like_TN).scatter(-1, index_TK, 1.0)


ROUTERS: Dict[str, Type[Router]] = {}
"""The registered routers by name."""


def register_router(name: str) -> Callable[[Type[Router]], Type[Router]]:
    """Class decorator that makes a router available under ``name``."""

    def register(cls: Type[Router]) -> Type[Router]:
        if name in ROUTERS:
            raise ValueError(f"a router named {name!r} is registered already")
        cls.name = name
        ROUTERS[name] = cls
        return cls

    return register


def find_router(name: str) -> Type[Router]:
    """The router registered as ``name``.

    Raises:
        ValueError: there is none; the message gives the nearest.
    """
    if name not in ROUTERS:
        near = difflib.get_close_matches(name, ROUTERS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"unknown router {name!r}; {hint}choose from {', '.join(ROUTERS)}")
    return ROUTERS[name]


def build_router(
    name: str,
    *,
    embed_dim: int,
    num_experts: int,
    top_k: int = 1,
    jitter_eps: float = 0.1,
    **options: Any,
) -> Router:
    """Build the router registered as ``name``.

    Args:
        name: one of :data:`ROUTERS`.
        embed_dim: D.
        num_experts: N.
        top_k: K.
        jitter_eps: see the router's docstring.
        options: ``bias``, ``init_scale``, and what the router's own constructor takes.

    Raises:
        ValueError: for an unknown name (the message gives the nearest) or a value out of range.
        TypeError: for an option that the router does not have.
    """
    router = find_router(name)
    _check_kinds(router, options)
    return router(
        embed_dim=embed_dim,
        num_experts=num_experts,
        top_k=top_k,
        jitter_eps=jitter_eps,
        **options,
    )


def _check_kinds(router: Type[Router], options: Mapping[str, Any]) -> None:
    """Refuse what is no yes or no where the default is one: "false" would be a yes."""
    constructors = [vars(kind)["__init__"] for kind in router.__mro__ if "__init__" in vars(kind)]
    for name, value in options.items():
        found = (inspect.signature(each).parameters.get(name) for each in constructors)
        option = next(filter(None, found), None)
        if option and isinstance(option.default, bool) and value not in (True, False):
            raise ValueError(f"{name} must be true or false, not {value!r}")
