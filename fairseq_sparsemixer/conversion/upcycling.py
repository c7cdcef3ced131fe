"""Make a model with experts of a dense one: each a copy of its feed-forward network.

Sparse Upcycling (Komatsuzaki et al. 2022, arXiv 2212.05055). A layer puts out G FFN(x) where its
experts are alike, G the sum of a token's gates; so the second product of each expert is divided by
G, and the model begins as the dense one. That takes a G that is the same for all tokens, which a
router has that begins undecided (:meth:`.Router.begin_undecided`).
"""

import argparse
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Tuple

import torch
from fairseq.models.transformer import transformer_legacy
from torch import Tensor

from fairseq_sparsemixer.conversion.checkpoints import read_transformer, write_model
from fairseq_sparsemixer.errors import UserError
from fairseq_sparsemixer.models.config import SwitchTransformerConfig, flat_settings
from fairseq_sparsemixer.models.layers import SwitchLayer, switch_layers
from fairseq_sparsemixer.models.switch_transformer import SwitchTransformerModel
from fairseq_sparsemixer.moe import MoEFeedForward, Router

MODEL = "switch_transformer"
PROBES = 64
"""Tokens that the sum of the gates is looked up with."""
EQUAL = 0.01
"""How much of itself that sum may differ by among them: a wrong number of experts is more."""


class Upcycled(NamedTuple):
    """What was done.

    Attributes:
        parameters: of the dense model, and of the new one.
        gates: G of each layer, by its name.
        flags: of fairseq-train, that build the new model.
    """

    parameters: Tuple[int, int]
    gates: Dict[str, float]
    flags: List[str]


def upcycle(
    dense: Path, output: Path, experts: Dict[str, Any], reinitialise: float, seed: int
) -> Upcycled:
    """Write a Switch Transformer that begins as a dense model.

    Args:
        dense: a checkpoint of one of fairseq's transformers.
        output: the new one, for ``--finetune-from-model``.
        experts: settings of :class:`SwitchTransformerConfig`, those of the layers included.
        reinitialise: see :func:`fill_experts`.
        seed: of the routers and of what is drawn anew.

    Raises:
        UserError: the checkpoint cannot be used, or a setting is wrong.
    """
    state, vocabularies, old = read_transformer(dense)
    if switch_layers(old):
        raise UserError(f"{dense} has experts already; give a dense model")
    settings = {**flat_settings(old.cfg), **experts}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        new = SwitchTransformerModel.build_model(argparse.Namespace(**settings), vocabularies)
        layers = switch_layers(new)
        if not layers:
            raise UserError("no layer would have experts; see --encoder-moe-layers and --moe-every")
        parameters = old.state_dict()
        gates = {
            name: _fill_layer(layer, parameters, reinitialise) for name, layer in layers.items()
        }
    new.load_state_dict(parameters, strict=False)
    count = [sum(each.numel() for each in model.parameters()) for model in (old, new)]
    write_model(state, new, {"_name": MODEL, **settings}, output)
    return Upcycled((count[0], count[1]), gates, _flags(settings))


def _fill_layer(layer: SwitchLayer, parameters: Dict[str, Tensor], reinitialise: float) -> float:
    """Make a layer's experts of the dense layer's parameters, which are taken out; its G."""
    side, number = layer.layer_name.split(".")
    dense = [
        parameters.pop(f"{side}.layers.{number}.{name}")
        for name in ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")
    ]
    try:
        layer.moe.router.begin_undecided()
        gate = sum_of_gates(layer.moe.router)
    except ValueError as error:
        raise UserError(f"--router {layer.moe.router.name}: {error}") from None
    fill_experts(layer.moe, dense, gate, reinitialise)
    return gate


@torch.no_grad()
def sum_of_gates(router: Router) -> float:
    """G: what the gates of each token add up to, of a router that is undecided.

    Raises:
        ValueError: it is not the same for all tokens.
    """
    training = router.training
    x_TD = torch.randn(PROBES, router.embed_dim)
    routing = router.eval()(x_TD, token_ids=torch.arange(PROBES))
    router.train(training)
    sums_T = routing.gate.sum(dim=-1)
    least, most, mean = (float(each) for each in (sums_T.min(), sums_T.max(), sums_T.mean()))
    if not most - least <= EQUAL * mean:
        raise ValueError(
            f"the gates of a token add up to {least:.3g} up to {most:.3g} where experts are alike, "
            "so that no model with it begins as the dense one; give --router-options that make "
            "them add up to 1, such as '{\"renormalise\": true}', or another router"
        )
    return mean


@torch.no_grad()
def fill_experts(
    moe: MoEFeedForward, dense: List[Tensor], gate: float, reinitialise: float = 0.0
) -> None:
    """Make each expert a copy of a feed-forward network.

    Args:
        moe: the layer.
        dense: w1 (F, D), b1 (F,), w2 (D, F) and b2 (D,) of the network.
        gate: G, which w2 and b2 are divided by.
        reinitialise: share of the inner units that each expert draws anew, other ones in each, from
            a normal distribution of mean and deviation of those drawn (Drop-Upcycling, Nakamura et
            al. 2025, arXiv 2502.19261, where 0.5 was best).
    """
    experts = moe.experts
    w1, b1, w2, b2 = dense
    for i in range(experts.num_experts):
        units = torch.randperm(len(b1))[: round(reinitialise * len(b1))]
        for stacked, single, axis in (
            (experts.w1, w1, 0),
            (experts.b1, b1, 0),
            (experts.w2, w2, 1),
        ):
            own = single.float().clone()
            drawn = own.index_select(axis, units)
            if drawn.numel() > 1:
                own.index_copy_(axis, units, torch.randn_like(drawn) * drawn.std() + drawn.mean())
            stacked[i] = own
        experts.b2[i] = b2
    experts.w2.div_(gate)
    experts.b2.div_(gate)


def _flags(settings: Dict[str, Any]) -> List[str]:
    """What fairseq-train has to be told to build the model."""
    usual = argparse.Namespace()
    transformer_legacy.base_architecture(usual)
    words = ["--arch", MODEL]
    for name, field in SwitchTransformerConfig.__dataclass_fields__.items():
        value = settings.get(name)
        if value is None or value == getattr(usual, name, field.default):
            continue
        flag = f"--{name.replace('_', '-')}"
        words += [flag] if value is True else [flag, str(value)]
    return words
