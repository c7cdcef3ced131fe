"""One flat configuration, so that ``fairseq-train`` flags and hydra see the same fields.

fairseq's own nested TransformerConfig does not extend: its flags are fixed in the parent class,
and a legacy model's extra fields are dropped under hydra. The fields of fairseq's transformer are
therefore flattened here from TransformerConfig itself (``encoder.embed_dim`` becomes
``encoder_embed_dim``), and expanded to it again when the model is built.
"""

import argparse
import dataclasses
import json
import math
import re
from enum import Enum
from typing import Any, Callable, Dict, FrozenSet, Iterator, List, Optional, Sequence, Tuple, Type

import torch
from fairseq.dataclass import ChoiceEnum, FairseqDataclass
from fairseq.dataclass.utils import interpret_dc_type
from fairseq.models.roberta import RobertaModel
from fairseq.models.roberta import model as roberta
from fairseq.models.transformer import TransformerConfig, transformer_legacy
from fairseq.models.transformer_lm import TransformerLanguageModelConfig
from hydra.errors import CompactHydraException

from fairseq_sparsemixer.errors import UserError
from fairseq_sparsemixer.moe import ROUTERS, build_router
from fairseq_sparsemixer.moe.dispatch import check_backend


class ConfigError(UserError, CompactHydraException):
    """A wrong model setting; hydra, too, prints its message without a traceback."""


SIDES = ("encoder", "decoder")


def _decided_by(architecture: Callable[[argparse.Namespace], Any]) -> FrozenSet[str]:
    """The settings that fairseq's named architectures decide."""
    args = argparse.Namespace()
    architecture(args)
    return frozenset(vars(args))


def _transformer_fields() -> Iterator[Tuple[str, Any, Any]]:
    """fairseq's transformer settings under their flag names.

    What a named architecture decides is None here, so that it is filled in the same way under
    both launchers; the rest has fairseq's default.
    """
    from_architecture = _decided_by(transformer_legacy.base_architecture)
    for field in dataclasses.fields(TransformerConfig):
        kind: Any = field.type
        is_group = isinstance(kind, type) and issubclass(kind, FairseqDataclass)
        for member in dataclasses.fields(kind) if is_group else [field]:
            if member.name.startswith("_"):
                continue
            name = f"{field.name}_{member.name}" if is_group else member.name
            # fairseq declares a list here but reads a comma-separated string.
            inner = str if member.name == "layers_to_keep" else interpret_dc_type(member.type)
            metadata = dict(member.metadata)
            if is_group and "help" in metadata:
                metadata["help"] = f"{field.name}: {metadata['help']}"
            default: Any = None if name in from_architecture else member.default
            yield name, Optional[inner], dataclasses.field(default=default, metadata=metadata)


def flat_settings(cfg: TransformerConfig) -> Dict[str, Any]:
    """The settings of one of fairseq's transformers under their flag names, to build it anew.

    Without what its parameters hold already: embeddings of a file, and layers that it has left out.
    """
    flat = {}
    for field in dataclasses.fields(TransformerConfig):
        value = getattr(cfg, field.name)
        members = vars(value) if isinstance(value, FairseqDataclass) else None
        for name, each in [("", value)] if members is None else members.items():
            flat[f"{field.name}_{name}" if name else field.name] = each
    plain = {name: str(value) if isinstance(value, Enum) else value for name, value in flat.items()}
    known = _FlatTransformerConfig.__dataclass_fields__
    return {
        name: value
        for name, value in plain.items()
        if name in known
        and not name.startswith("_")
        and not name.endswith(("_embed_path", "_layers_to_keep"))
    }


_FlatTransformerConfig: Type = dataclasses.make_dataclass(
    "_FlatTransformerConfig", list(_transformer_fields()), bases=(FairseqDataclass,)
)


def _roberta_fields() -> Iterator[Tuple[str, Any, Any]]:
    """fairseq's settings of RoBERTa, which are flags alone, as :func:`_transformer_fields`."""
    from_architecture = _decided_by(roberta.base_architecture)
    flags = argparse.ArgumentParser(add_help=False)
    RobertaModel.add_args(flags)
    for flag in flags._actions:
        kind: Any = bool if flag.nargs == 0 else flag.type or str
        kind = ChoiceEnum(list(flag.choices)) if flag.choices else kind
        default = None if flag.dest in from_architecture else flag.default
        field = dataclasses.field(default=default, metadata={"help": flag.help})
        yield flag.dest, Optional[kind], field
    # Its layers have these, too.
    for field in dataclasses.fields(TransformerConfig):
        if field.name in ("checkpoint_activations", "offload_activations"):
            metadata = dict(field.metadata)
            own: Any = dataclasses.field(default=field.default, metadata=metadata)
            yield field.name, field.type, own


_FlatRobertaConfig: Type = dataclasses.make_dataclass(
    "_FlatRobertaConfig", list(_roberta_fields()), bases=(FairseqDataclass,)
)


@dataclasses.dataclass
class ExpertConfig(FairseqDataclass):
    """Settings of the experts, whatever the model."""

    num_experts: int = dataclasses.field(
        default=4, metadata={"help": "experts in each mixture-of-experts layer"}
    )
    moe_every: int = dataclasses.field(
        default=2, metadata={"help": "every how many layers one holds experts"}
    )
    moe_offset: int = dataclasses.field(
        default=0, metadata={"help": "the first layer that holds experts, counted from 0"}
    )
    router: str = dataclasses.field(
        default="sparsemixer", metadata={"help": f"one of {', '.join(ROUTERS)}"}
    )
    top_k: int = dataclasses.field(default=1, metadata={"help": "experts of each token"})
    jitter_eps: float = dataclasses.field(
        default=0.1,
        metadata={"help": "router jitter; SparseMixer samples what jitter could have chosen"},
    )
    no_router_bias: bool = dataclasses.field(
        default=False, metadata={"help": "router logits without a bias"}
    )
    router_init_scale: float = dataclasses.field(
        default=1.0, metadata={"help": "factor on the initial router weights"}
    )
    router_options: str = dataclasses.field(
        default="{}",
        metadata={"help": "further options of the router as JSON, see docs/routers.md"},
    )
    expert_activation_dropout: Optional[float] = dataclasses.field(
        default=None,
        metadata={"help": "activation dropout inside experts (default: --activation-dropout)"},
    )
    expert_output_masking: float = dataclasses.field(
        default=0.0,
        metadata={
            "help": "probability of leaving out an expert's whole output for a token in training"
        },
    )
    balance_bias_rate: float = dataclasses.field(
        default=0.0,
        metadata={
            "help": "step of the auxiliary-loss-free balance bias after each update, such as "
            "0.001 (default: none)"
        },
    )
    moe_backend: str = dataclasses.field(
        default="auto",
        metadata={"help": "how tokens reach their experts: auto, sorted, triton or loop"},
    )
    moe_recompute: bool = dataclasses.field(
        default=False,
        metadata={
            "help": "compute the experts' inner layers again in the backward pass instead of "
            "keeping them: less memory, about a sixth more products in these layers (not with "
            "--moe-backend loop)"
        },
    )
    expert_parallel_size: int = dataclasses.field(
        default=1,
        metadata={
            "help": "how many workers share one set of experts, each of them holding as many; "
            "in training alone (default: each worker holds all)"
        },
    )
    moe_inference_dtype: str = dataclasses.field(
        default="float32",
        metadata={
            "help": "experts' weights when translating on a CPU: float32, or bfloat16, which is "
            "faster and rounds"
        },
    )
    deterministic: bool = dataclasses.field(
        default=False,
        metadata={
            "help": "train with operators alone that give the same bits each time, on a GPU too "
            "(a CPU's do without it)"
        },
    )


def _moe_layers_field(side: str) -> Any:
    return dataclasses.field(
        default=None,
        metadata={
            "help": f"{side} layers that hold experts, as '0,2,4' or 'none' "
            "(default: by --moe-every and --moe-offset)"
        },
    )


@dataclasses.dataclass
class SwitchTransformerConfig(_FlatTransformerConfig, ExpertConfig):
    """Settings of :class:`~fairseq_sparsemixer.models.SwitchTransformerModel`.

    All of fairseq's transformer settings (``encoder_embed_dim``, ``dropout``, ...), where None
    means what the architecture says, and those of the experts.
    """

    encoder_moe_layers: Optional[str] = _moe_layers_field("encoder")
    decoder_moe_layers: Optional[str] = _moe_layers_field("decoder")


@dataclasses.dataclass
class SwitchRobertaConfig(_FlatRobertaConfig, ExpertConfig):
    """Settings of :class:`~fairseq_sparsemixer.models.SwitchRobertaModel`: RoBERTa's and those of
    the experts."""

    encoder_moe_layers: Optional[str] = _moe_layers_field("encoder")


@dataclasses.dataclass
class SwitchElectraConfig(SwitchRobertaConfig):
    """Settings of :class:`~fairseq_sparsemixer.models.SwitchElectraModel`: those of its
    discriminator, and the size of its generator."""

    generator_embed_dim: Optional[int] = dataclasses.field(
        default=None,
        metadata={"help": "width of the generator (default: by the architecture, else a quarter)"},
    )
    generator_layers: Optional[int] = dataclasses.field(
        default=None, metadata={"help": "layers of the generator (default: --encoder-layers)"}
    )


@dataclasses.dataclass
class SwitchTransformerLanguageModelConfig(TransformerLanguageModelConfig, ExpertConfig):
    """Settings of :class:`~fairseq_sparsemixer.models.SwitchTransformerLanguageModel`: those of
    fairseq's transformer_lm and of the experts."""

    decoder_moe_layers: Optional[str] = _moe_layers_field("decoder")


EXPERT_FIELDS = {
    field.name: field
    for field in dataclasses.fields(SwitchTransformerConfig)
    if field.name in ExpertConfig.__annotations__ or field.name.endswith("_moe_layers")
}
"""The settings that are ours, of all models together."""


INFERENCE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
"""What ``--moe-inference-dtype`` may be."""


@dataclasses.dataclass(frozen=True)
class ExpertSettings:
    """What a mixture-of-experts layer needs beyond fairseq's TransformerConfig.

    Layers are counted from 0 before LayerDrop pruning; ``*_kept`` lists those that pruning
    (``--encoder-layers-to-keep``) leaves.
    """

    num_experts: int
    router: str
    top_k: int
    jitter_eps: float
    router_options: Dict[str, Any]
    activation_dropout: Optional[float]
    output_masking: float
    backend: str
    recompute: bool
    parallel_size: int
    inference_dtype: torch.dtype
    encoder_layers: FrozenSet[int]
    decoder_layers: FrozenSet[int]
    encoder_kept: Tuple[int, ...]
    decoder_kept: Tuple[int, ...]


def expert_settings(args: argparse.Namespace, sides: Sequence[str] = SIDES) -> ExpertSettings:
    """Check the settings of the experts.

    Args:
        args: a namespace with every field of the model's configuration, gaps filled.
        sides: those that the model has; of the other, no layer holds experts.

    Raises:
        ConfigError: naming the flag and the allowed values.
    """
    _check_numbers(args)
    _check_sizes(args, sides)
    # fairseq would add its noise to every other layer, and leave the experts and the router alone.
    for flag in ("quant_noise_pq", "quant_noise_scalar"):
        if getattr(args, flag) > 0:
            raise ConfigError(f"{_flag(flag)} must be 0: experts do not support quantization noise")
    if args.moe_backend == "grouped":  # of checkpoints that were trained when there was one
        args.moe_backend = "auto"
    try:
        check_backend(args.moe_backend)
    except ValueError as error:
        raise ConfigError(f"--moe-backend: {error}") from None
    if args.moe_inference_dtype not in INFERENCE_DTYPES:
        raise ConfigError(
            f"--moe-inference-dtype must be {' or '.join(INFERENCE_DTYPES)}, "
            f"not {args.moe_inference_dtype!r}"
        )
    layers = {side: _moe_layers(args, side) for side in sides}
    by_offset = [side for side in sides if getattr(args, f"{side}_moe_layers") is None]
    if args.moe_offset and by_offset and not any(layers.values()):
        raise ConfigError(
            f"--moe-offset {args.moe_offset} leaves no layer with experts: give a smaller one, or "
            "none with --encoder-moe-layers and --decoder-moe-layers for a dense model"
        )
    kept = {side: _kept_layers(args, side) for side in sides}
    settings = ExpertSettings(
        num_experts=args.num_experts,
        router=args.router,
        top_k=args.top_k,
        jitter_eps=args.jitter_eps,
        router_options=_router_options(args),
        activation_dropout=args.expert_activation_dropout,
        output_masking=args.expert_output_masking,
        backend=args.moe_backend,
        recompute=args.moe_recompute,
        parallel_size=args.expert_parallel_size,
        inference_dtype=INFERENCE_DTYPES[args.moe_inference_dtype],
        encoder_layers=layers.get("encoder", frozenset()),
        decoder_layers=layers.get("decoder", frozenset()),
        encoder_kept=kept.get("encoder", ()),
        decoder_kept=kept.get("decoder", ()),
    )
    _try_router(settings)
    if settings.decoder_layers and not ROUTERS[settings.router].causal:
        raise ConfigError(
            f"--router {settings.router} looks at all words of a sentence, also those that a "
            "decoder has yet to write: choose another, or pass --decoder-moe-layers none"
        )
    return settings


def check_workers(parallel_size: int, workers: int) -> None:
    """Refuse groups of workers that the workers of a training cannot be cut into.

    Raises:
        ConfigError: says what can be changed.
    """
    if workers % parallel_size:
        raise ConfigError(
            f"--expert-parallel-size ({parallel_size}) must divide the number of workers "
            f"({workers}): start a multiple of it, or give another size (1 to let each worker "
            "hold all experts)"
        )


LARGEST_FACTOR = 10_000
"""Logits and steps that are larger by it make softmaxes of ones and zeros, and the cross-entropy,
beside which losses are weighted, is about 10."""


def _check_count(args: argparse.Namespace, flag: str) -> None:
    value = getattr(args, flag)
    if not 1 <= value < 1 << 31:
        raise ConfigError(f"{_flag(flag)} must be at least 1 and below 2**31, not {value}")


def _check_numbers(args: argparse.Namespace) -> None:
    for flag in ("num_experts", "top_k", "moe_every", "expert_parallel_size"):
        _check_count(args, flag)
    if args.moe_offset < 0:
        raise ConfigError(f"--moe-offset must be at least 0, not {args.moe_offset}")
    if args.num_experts % args.expert_parallel_size:
        raise ConfigError(
            f"--expert-parallel-size ({args.expert_parallel_size}) must divide --num-experts "
            f"({args.num_experts}): each worker of a group holds as many experts"
        )
    if args.top_k > args.num_experts:
        raise ConfigError(
            f"--top-k must be 1 to --num-experts ({args.num_experts}), not {args.top_k}"
        )
    for flag, below in (
        ("jitter_eps", math.inf),  # a large one masks nothing
        ("router_init_scale", LARGEST_FACTOR),
        ("balance_bias_rate", LARGEST_FACTOR),
    ):
        value = getattr(args, flag)
        if not 0 <= value < below:
            most = "" if below == math.inf else f" and below {below}"
            raise ConfigError(f"{_flag(flag)} must be a number of at least 0{most}, not {value}")
    for flag in ("expert_activation_dropout", "activation_dropout"):
        value = getattr(args, flag)
        if value is not None and not 0 <= value <= 1:
            raise ConfigError(f"{_flag(flag)} must be 0 to 1, not {value}")
    if not 0 <= args.expert_output_masking < 1:
        raise ConfigError(
            "--expert-output-masking must be at least 0 and below 1, "
            f"not {args.expert_output_masking}"
        )


def _check_sizes(args: argparse.Namespace, sides: Sequence[str]) -> None:
    for side in sides:
        for flag in (f"{side}_embed_dim", f"{side}_ffn_embed_dim", f"{side}_attention_heads"):
            _check_count(args, flag)
        width, heads = getattr(args, f"{side}_embed_dim"), getattr(args, f"{side}_attention_heads")
        if width % heads:
            raise ConfigError(
                f"--{side}-embed-dim ({width}) must be a multiple of "
                f"--{side}-attention-heads ({heads})"
            )


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


_OPTION_FLAGS = {
    "bias": "--no-router-bias",
    "init_scale": "--router-init-scale",
    "balance_bias_rate": "--balance-bias-rate",
    "top_k": "--top-k",
    "jitter_eps": "--jitter-eps",
    "num_languages": "--langs, by which the task knows them",
}
"""Options of a router, and the flags that give them."""


def _router_options(args: argparse.Namespace) -> Dict[str, Any]:
    try:
        options = json.loads(args.router_options)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"--router-options is not JSON: {error}") from None
    if not isinstance(options, dict):
        raise ConfigError(f"--router-options must be a JSON object, not {args.router_options}")
    for key, value in options.items():
        if isinstance(value, (int, float)) and not abs(value) < 1 << 31:
            raise ConfigError(
                f"--router-options: {key} must be a number below 2**31 in size, not {value}"
            )
    for key, flag in _OPTION_FLAGS.items():
        if key in options:
            raise ConfigError(f"--router-options must not hold {key}: pass {flag}")
    return {
        **options,
        "bias": not args.no_router_bias,
        "init_scale": args.router_init_scale,
        "balance_bias_rate": args.balance_bias_rate,
    }


def _try_router(settings: ExpertSettings) -> None:
    """Let the router itself check its settings, on an instance without storage or random draws."""
    try:
        with torch.device("meta"):
            build_router(
                settings.router,
                embed_dim=1,
                num_experts=settings.num_experts,
                top_k=settings.top_k,
                jitter_eps=settings.jitter_eps,
                **settings.router_options,
            )
    except ValueError as error:
        message = re.sub(
            rf"\b({'|'.join(_OPTION_FLAGS)})\b", lambda name: _OPTION_FLAGS[name[0]], str(error)
        )
        raise ConfigError(f"--router {settings.router}: {message}") from None
    except TypeError as error:
        raise ConfigError(f"--router-options for --router {settings.router}: {error}") from None


def _layer_numbers(args: argparse.Namespace, flag: str, allowed: str, size: int) -> List[int]:
    text = str(getattr(args, flag))
    try:
        numbers = [int(number) for number in text.split(",")]
    except ValueError:
        raise ConfigError(f"{_flag(flag)} must be {allowed}, not {text!r}") from None
    for number in numbers:
        if not 0 <= number < size:
            raise ConfigError(
                f"{_flag(flag)}: there is no layer {number}; the layers are 0 to {size - 1}"
            )
    return numbers


def _moe_layers(args: argparse.Namespace, side: str) -> FrozenSet[int]:
    """The layers of one side that hold experts."""
    size = getattr(args, f"{side}_layers")
    text = getattr(args, f"{side}_moe_layers")
    if text is None:
        return frozenset(range(args.moe_offset, size, args.moe_every))
    if text == "none":
        return frozenset()
    allowed = "'none' or layer numbers such as '0,2,4'"
    return frozenset(_layer_numbers(args, f"{side}_moe_layers", allowed, size))


def _kept_layers(args: argparse.Namespace, side: str) -> Tuple[int, ...]:
    """The layers of one side that remain after LayerDrop pruning, in order."""
    size = getattr(args, f"{side}_layers")
    if not getattr(args, f"{side}_layers_to_keep"):
        return tuple(range(size))
    allowed = "layer numbers such as '0,2,4'"
    return tuple(sorted(_layer_numbers(args, f"{side}_layers_to_keep", allowed, size)))
