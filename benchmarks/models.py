"""Translation models of any size, built from fairseq's own flags, without data."""

import argparse
from typing import Any, Dict, List

import torch
from fairseq import options
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.models import FairseqModel, build_model
from omegaconf import DictConfig

from fairseq_sparsemixer.models.building import dictionary_of
from fairseq_sparsemixer.moe import ROUTERS, MoEFeedForward
from fairseq_sparsemixer.moe.feed_forward import moe_layers
from fairseq_sparsemixer.runs.arms import DENSE, of_any_text

ALL = "all"


class RandomWords:
    """What a model and a criterion read of a task: one dictionary for both languages."""

    def __init__(self, size: int) -> None:
        self.source_dictionary = self.target_dictionary = dictionary_of(size)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The sizes of the models, by default those of Transformer base, and their routers."""
    for flag, default, about in (
        ("--embed-dim", 512, "width of the model"),
        ("--ffn-dim", 2048, "inner width of a feed-forward network and of an expert"),
        ("--heads", 8, "attention heads"),
        ("--layers", 6, "of the encoder, and of the decoder"),
        ("--vocabulary", 32000, "entries of the dictionary"),
        ("--num-experts", 8, "in every other layer"),
    ):
        parser.add_argument(flag, type=int, default=default, help=f"{about} (default: %(default)s)")
    parser.add_argument(
        "--router",
        nargs="+",
        choices=[*of_any_text(), ALL],
        default=["switch", "sparsemixer"],
        metavar="NAME",
        help=f"beside the dense model, {ALL!r} for every one (default: switch sparsemixer)",
    )
    parser.add_argument(
        "--router-options", default="{}", metavar="JSON", help="of these routers (default: none)"
    )


def arms(args: argparse.Namespace) -> List[str]:
    """The dense model and the routers."""
    return [DENSE, *(of_any_text() if ALL in args.router else args.router)]


def configuration(args: argparse.Namespace, router: str, data: str, **more: Any) -> DictConfig:
    """fairseq's configuration of a training run, as ``fairseq-train`` makes it of its flags.

    Args:
        args: the flags of :func:`add_arguments` and ``--device``.
        router: one of :func:`arms`.
        data: the folder of the binarised corpus; it need not be there before data are loaded.
        more: further flags of ``fairseq-train``, with _ for -; True for a bare one, None for none.
    """
    settings: Dict[str, Any] = {
        "task": "translation",
        "dropout": 0.1,
        "share_all_embeddings": True,
        "label_smoothing": 0.1,
        "cpu": True if args.device == "cpu" else None,
        "distributed_world_size": 1,
        **more,
    }
    for side in ("encoder", "decoder"):
        settings[f"{side}_embed_dim"] = args.embed_dim
        settings[f"{side}_ffn_embed_dim"] = args.ffn_dim
        settings[f"{side}_attention_heads"] = args.heads
        settings[f"{side}_layers"] = args.layers
    if router == DENSE:
        settings.update(arch="transformer", criterion="label_smoothed_cross_entropy")
    else:
        kind = ROUTERS[router]
        settings.update(
            arch="switch_transformer_wmt_en_de",
            criterion="label_smoothed_cross_entropy_with_routing",
            router=router,
            num_experts=args.num_experts,
            router_options=args.router_options,
            top_k=kind.min_top_k,
            decoder_moe_layers=None if kind.causal else "none",
        )
    words: List[str] = [data]
    for name, value in settings.items():
        if value is not None:
            flag = f"--{name.replace('_', '-')}"
            words += [flag] if value is True else [flag, str(value)]
    parser = options.get_training_parser()
    cfg = convert_namespace_to_omegaconf(options.parse_args_and_arch(parser, words))
    cfg.common.tpu = False  # which fairseq's flag --bf16 stands for, too
    return cfg


def build(cfg: DictConfig, task: Any) -> FairseqModel:
    """A model whose experts are about equally used, as those of trained models are.

    Untrained layers add much the same vector to all tokens, so that few experts would get nearly
    all of them. The bias of each router is set so that its experts have the same mean logit.

    Args:
        cfg: the node ``model`` of a :func:`configuration`.
        task: for its dictionaries.
    """
    torch.manual_seed(0)
    model = build_model(cfg, task)

    def centre(layer: MoEFeedForward, arguments: Any) -> None:
        router = layer.router
        if router.weight is not None and router.bias is not None:
            x_TD = arguments[0].flatten(0, -2)
            router.bias.copy_(-(x_TD @ router.weight.t()).mean(dim=0))

    hooks = [layer.register_forward_pre_hook(centre) for layer in moe_layers(model)]
    words = task.source_dictionary
    tokens = torch.randint(words.nspecial, len(words), (32, 25))
    model.eval()
    with torch.no_grad():
        model(tokens, torch.full((len(tokens),), tokens.shape[1]), tokens.roll(1, dims=1))
    for hook in hooks:
        hook.remove()
    return model
