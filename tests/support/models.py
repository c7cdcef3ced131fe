"""Small models of the extension, and batches for them."""

import torch
from fairseq.data import Dictionary
from fairseq.models import ARCH_MODEL_REGISTRY, build_model
from omegaconf import OmegaConf

from fairseq_sparsemixer.models.config import SIDES

SMALL = {
    "encoder_embed_dim": 16,
    "encoder_ffn_embed_dim": 24,
    "decoder_embed_dim": 16,
    "decoder_ffn_embed_dim": 24,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_layers": 3,
    "decoder_layers": 3,
}


class Task:
    """What a model reads of a task."""

    def __init__(self):
        self.source_dictionary = self.target_dictionary = Dictionary()
        for symbol in "abcdefgh":
            self.source_dictionary.add_symbol(symbol)

    def max_positions(self):
        return 64


def build(arch="switch_transformer", seed=0, **settings):
    torch.manual_seed(seed)
    sides = getattr(ARCH_MODEL_REGISTRY[arch], "sides", SIDES)  # fairseq's own translates
    small = {name: size for name, size in SMALL.items() if name.startswith(tuple(sides))}
    return build_model(OmegaConf.create({"_name": arch, **small, **settings}), Task())


def copy_into_dense(model, dense):
    """Give fairseq's own model the parameters of ours, of which each layer has one expert."""
    state = dense.state_dict()
    renamed = {"w1": "fc1.weight", "b1": "fc1.bias", "w2": "fc2.weight", "b2": "fc2.bias"}
    for name, value in model.state_dict().items():
        prefix, _, last = name.rpartition(".moe.experts.")
        if prefix:
            state[f"{prefix}.{renamed[last]}"] = value[0]
        elif ".moe." not in name:
            state[name] = value
    dense.load_state_dict(state)


def draw_alike(*models):
    """Give every dropout mask its own seed: router noise would shift those of later layers."""
    for model in models:
        for module in model.modules():
            module.register_forward_pre_hook(lambda *_: torch.manual_seed(7) and None)


def batch(lengths=((3, 4), (5, 2)), seed=0):
    """A left-padded source and right-padded target batch."""
    generator = torch.Generator().manual_seed(seed)
    pad, eos = 1, 2
    sources = torch.full((len(lengths), max(s for s, _ in lengths) + 1), pad)
    targets = torch.full((len(lengths), max(t for _, t in lengths) + 1), pad)
    for row, (source, target) in enumerate(lengths):
        sources[row, -source - 1 :] = torch.cat(
            [torch.randint(4, 12, (source,), generator=generator), torch.tensor([eos])]
        )
        targets[row, : target + 1] = torch.cat(
            [torch.tensor([eos]), torch.randint(4, 12, (target,), generator=generator)]
        )
    return {
        "src_tokens": sources,
        "src_lengths": sources.ne(pad).sum(1),
        "prev_output_tokens": targets,
    }


class TargetTask(Task):
    """What a criterion reads, too."""

    @property
    def target(self):
        return self.target_dictionary


def sample(lengths=((3, 4), (5, 2)), seed=0):
    """What a criterion is given: a :func:`batch` with its target, ended by the end of sentence."""
    net_input = batch(lengths, seed)
    tokens = net_input["prev_output_tokens"]
    target = torch.cat([tokens[:, 1:], torch.ones(len(tokens), 1, dtype=torch.long)], 1)
    for row, (_, length) in enumerate(lengths):
        target[row, length] = 2
    return {"net_input": net_input, "target": target, "ntokens": int(target.ne(1).sum())}
