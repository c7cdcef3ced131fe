"""Tokens to the workers that hold their experts, and back.

Dropless, like all of dispatch: a worker computes as many rows as its experts are sent. What a
backend does stays as it is, on the rows that arrive and the experts that lie here. Gates are
applied, and outputs observed, where the tokens come from: what an expert's running mean learns
from is each worker's own batch, as without it.
"""

from typing import Callable, Optional

import torch
from torch import Tensor

from fairseq_sparsemixer.moe.adaptation import count_slots
from fairseq_sparsemixer.moe.parallel import ExpertParallel
from fairseq_sparsemixer.moe.routing import Routing
from fairseq_sparsemixer.moe.slots import Observer, tokens_of

Compute = Callable[[Tensor, Routing], Tensor]
"""(R, D) rows and the experts of this worker that they go to, to (R, D) outputs."""


def exchanged(
    x_TD: Tensor,
    routing: Routing,
    parallel: ExpertParallel,
    compute: Compute,
    observe: Optional[Observer],
    scale_D: Optional[Tensor],
) -> Tensor:
    """(T, D); see :func:`fairseq_sparsemixer.moe.dispatch.dispatch`.

    Every worker of the group has to call it, with a batch of whatever size, none included.

    Args:
        x_TD: this worker's tokens, in the dtype that they travel in.
        routing: of these tokens, over all N experts.
        parallel: where the experts are.
        compute: what this worker's experts put out.
        observe: see there.
        scale_D: see there.
    """
    expert_S = routing.expert_index.reshape(-1)
    # Padding and empty slots have index -1: they sort to the front and are cut off there.
    counts = count_slots(expert_S, routing.logits.shape[1])
    sent, received, counts_WN = parallel.exchange_counts(counts[1:].contiguous())
    # The experts of a worker follow each other, so what is sorted by expert is so by worker.
    slot_S = expert_S.argsort(stable=True)[len(expert_S) - sum(sent) :]
    token_S = tokens_of(slot_S, routing.expert_index.shape[1])
    x_SD = x_TD.index_select(0, token_S)
    x_RD = parallel.exchange(x_SD, sent, received)
    out_RD = compute(x_RD, local_routing(counts_WN, len(x_RD))) if len(x_RD) else x_RD
    out_SD = parallel.exchange(out_RD, received, sent)
    if observe is not None:
        observe(x_SD.detach(), expert_S.index_select(0, slot_S), out_SD.detach())
    gate_S1 = routing.gate.reshape(-1, 1).index_select(0, slot_S)
    dtype = torch.promote_types(x_TD.dtype, torch.float32)
    y_TD = torch.zeros(x_TD.shape, dtype=dtype, device=x_TD.device)
    y_TD = y_TD.index_add(0, token_S, out_SD.to(dtype) * gate_S1)
    return y_TD if scale_D is None else y_TD * scale_D


def local_routing(counts_WN: Tensor, rows: int) -> Routing:
    """The routing of R rows that come sorted by worker, then by expert, each to one expert.

    Args:
        counts_WN: (workers, experts that lie here) int64.
        rows: R, their sum.
    """
    experts = torch.arange(counts_WN.shape[1], device=counts_WN.device).repeat(len(counts_WN))
    index_R = experts.repeat_interleave(counts_WN.flatten(), output_size=rows)
    index_R1 = index_R.unsqueeze(-1)
    gate_R1 = torch.ones(index_R1.shape, device=index_R1.device)
    none = gate_R1.new_empty(rows, 0)
    return Routing(index_R1, gate_R1, logits=none, probs=none, sampling_probs=none)
