"""A small ELECTRA with experts, a batch for it, and its criterion."""

from types import SimpleNamespace

import torch

from fairseq_sparsemixer.criterions import ElectraWithRouting, ElectraWithRoutingConfig
from support.models import TargetTask, build

PAD, MASK = 1, 11
TOKENS = torch.tensor([[0, MASK, 7, 4, MASK, 2], [0, 8, MASK, 2, PAD, PAD]])
TARGET = torch.tensor([[PAD, 5, PAD, PAD, 9, PAD], [PAD, PAD, 6, PAD, PAD, PAD]])
MASKED = TARGET.ne(PAD)
OFF = {"balance_weight": 0.0, "z_loss_weight": 0.0}
QUIET = {"router": "switch", "jitter_eps": 0.0, "dropout": 0.0, "attention_dropout": 0.0}


def electra(**settings):
    return build("switch_electra_base", **{"generator_embed_dim": 8, **settings})


def criterion(seed=1, **settings):
    task = TargetTask()
    task.cfg = SimpleNamespace(seed=seed)
    return ElectraWithRouting.build_criterion(ElectraWithRoutingConfig(tpu=False, **settings), task)


def sample(numbers=(3, 9)):
    """``numbers`` are those of the sentences in their data set."""
    return {
        "id": torch.tensor(numbers),
        "net_input": {"src_tokens": TOKENS, "src_lengths": TOKENS.ne(PAD).sum(1)},
        "target": TARGET,
        "ntokens": int(TOKENS.ne(PAD).sum()),
        "nsentences": len(TOKENS),
    }
