"""Routers whose choice is not learnt: controls for those that learn it."""

from typing import Any, Optional

import torch
from torch import Tensor

from fairseq_sparsemixer.moe.routing import (
    Context,
    EvaluationRule,
    Router,
    Routing,
    register_router,
)

UNREACHABLE = -1e4
"""Logit of an expert with probability 0; finite, so that 0 times it is 0."""


def _with_gate_one(index_T1: Tensor, logits_TN: Tensor) -> Routing:
    """Every token to its expert with gate 1; ``logits_TN`` are for the statistics alone."""
    probs_TN = logits_TN.softmax(dim=-1)
    return Routing(
        expert_index=index_T1,
        gate=torch.ones_like(logits_TN[:, :1]),
        logits=logits_TN,
        probs=probs_TN,
        sampling_probs=probs_TN,
    )


@register_router("hash")
class HashRouter(Router):
    """Hash layers (Roller et al. 2021, arXiv 2106.04426): the expert is a hash of the token's id.

    y = E_hash(id)(x), gate 1. The hash is a fixed multiplicative one, so it needs no table and no
    vocabulary size; experts get an equal share of the ids, not of the tokens (the source's random
    hash, not its balanced one).

    Args:
        jitter_eps: not used.
        seed: another seed is another hash.
        gate: ``"one"``, as the source, and nothing is learnt; or ``"full"``, p_D of learnt logits,
            with the gradient of p_D.
        **options: see :class:`~fairseq_sparsemixer.moe.Router`.

    Raises:
        ValueError: in ``forward`` and ``route`` without ``token_ids``.
    """

    needs_token_ids = True
    needs_balance = False
    takes_balance_bias = False

    def __init__(self, *, seed: int = 0, gate: str = "one", **options: Any) -> None:
        super().__init__(**options)
        if gate not in ("one", "full"):
            raise ValueError(f"gate must be one or full, not {gate!r}")
        if not isinstance(seed, int):
            raise ValueError(f"seed must be a whole number, not {seed!r}")
        self.seed = seed
        self.gate = gate
        if gate == "one":
            self.weight = self.bias = None

    def evaluation_rule(self) -> Optional[EvaluationRule]:
        """See :meth:`Router.evaluation_rule`."""
        return EvaluationRule("one" if self.gate == "one" else "all", hash_seed=self.seed)

    def logits(self, x_TD: Tensor) -> Tensor:
        """(T, N): zeros with gate 1, for which there is nothing to learn."""
        if self.weight is not None:
            return super().logits(x_TD)
        return x_TD.new_zeros(len(x_TD), self.num_experts, dtype=torch.float32)

    def select(self, logits_TN: Tensor, context: Context) -> Routing:
        """See :meth:`Router.select`."""
        if context.token_ids is None:
            raise ValueError(f"router {self.name!r} needs token_ids")
        index_T1 = self.expert_of(context.token_ids).unsqueeze(-1)
        if self.gate == "one":
            certain_TN = torch.full_like(logits_TN, UNREACHABLE).scatter(-1, index_T1, 0.0)
            return _with_gate_one(index_T1, certain_TN)
        probs_TN = logits_TN.softmax(dim=-1)
        return Routing(index_T1, probs_TN.gather(-1, index_T1), logits_TN, probs_TN, probs_TN)

    def expert_of(self, token_ids: Tensor) -> Tensor:
        """(T,) int64: the expert of each token."""
        return self.hash(token_ids) % self.num_experts

    def hash(self, token_ids: Tensor) -> Tensor:
        """A number of 31 bits for each id, the same on every machine."""
        value = (token_ids.long() + (1 + self.seed * 0x9E3779B1 & 0xFFFFFFFF)) & 0xFFFFFFFF
        for _ in range(2):
            value = ((value ^ (value >> 16)) * 0x45D9F3B) & 0xFFFFFFFF
        return (value ^ (value >> 16)) & 0x7FFFFFFF


@register_router("language")
class LanguageRouter(HashRouter):
    """Experts of each language: those of language l are l N / L to (l + 1) N / L, rounded down.

    Where a language has several, a token's is a hash of its id, as in ``hash``; where there are
    fewer experts than languages, neighbours share one. With one expert for each language it is the
    language-specific layer of Fan et al. 2021 (arXiv 2010.11125), and Kudugunta et al. 2021
    (arXiv 2110.03742) found routing by target language as good as by token.

    ``token_ids`` are language + L * entry of the vocabulary.

    Args:
        num_languages: L; a model finds it in its task.
        **options: see :class:`HashRouter`.

    Raises:
        ValueError: in ``forward`` and ``route`` without ``token_ids``.
    """

    needs_languages = True

    def __init__(self, *, num_languages: int = 1, **options: Any) -> None:
        super().__init__(**options)
        if num_languages < 1:
            raise ValueError(f"num_languages must be at least 1, not {num_languages}")
        self.num_languages = num_languages

    def evaluation_rule(self) -> Optional[EvaluationRule]:
        """See :meth:`Router.evaluation_rule`."""
        return None

    def expert_of(self, token_ids: Tensor) -> Tensor:
        """(T,) int64: the expert of each token."""
        language = token_ids % self.num_languages
        first = language * self.num_experts // self.num_languages
        end = (language + 1) * self.num_experts // self.num_languages
        of_language = (end - first).clamp(min=1)
        return first + self.hash(token_ids // self.num_languages) % of_language


@register_router("random")
class RandomRouter(Router):
    """Random experts: what experts are worth without any routing.

    Training: each token goes to an expert drawn uniformly. Evaluation: to the arg-max of a fixed
    random projection of x, so that the same token always gets the same expert. Gate 1.

    Args:
        jitter_eps: not used.
        **options: see :class:`~fairseq_sparsemixer.moe.Router`.
    """

    projection: Tensor
    """(N, D), drawn once and never trained."""

    needs_balance = False
    takes_balance_bias = False

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.weight = self.bias = None
        self.register_buffer("projection", torch.randn(self.num_experts, self.embed_dim))

    def evaluation_rule(self) -> EvaluationRule:
        """See :meth:`Router.evaluation_rule`."""
        return EvaluationRule("one")

    def logits(self, x_TD: Tensor) -> Tensor:
        """(T, N): the fixed projection."""
        return self.project(x_TD, self.projection)

    def select(self, logits_TN: Tensor, context: Context) -> Routing:
        """See :meth:`Router.select`."""
        if self.training:
            index_T1 = torch.randint_like(logits_TN[:, :1], self.num_experts).long()
        else:
            index_T1 = logits_TN.argmax(dim=-1, keepdim=True)
        return _with_gate_one(index_T1, torch.zeros_like(logits_TN))
