"""Whether the configuration in a checkpoint may decide what is built.

fairseq builds the architecture, the task and the criterion that a checkpoint names, and some of
them ``eval`` strings of its configuration or start programs with them. Those taken here were read:
our own, the few of fairseq in :data:`READ`, and what the user's own ``--user-dir`` registers. Each
field has to be of the type that its dataclass declares, and where fairseq evaluates a string it
may hold numbers alone. Sizes are bounded by what the file holds when the model is built
(:mod:`.allocations`).
"""

import argparse
import contextlib
import dataclasses
import os
import re
import stat
from enum import Enum
from typing import Any, Container, Dict, List, Mapping, Union, get_args, get_origin

from fairseq.criterions import CRITERION_REGISTRY
from fairseq.dataclass.configs import FairseqConfig
from fairseq.models import ARCH_MODEL_REGISTRY, MODEL_REGISTRY
from fairseq.models.roberta import RobertaModel
from fairseq.models.transformer import TransformerConfig, TransformerModelBase
from fairseq.registry import REGISTRIES
from fairseq.tasks import TASK_REGISTRY

from fairseq_sparsemixer.runs.archives import Refusal, TensorInFile, Untrusted, shown

READ = frozenset(
    f"fairseq.{name}"
    for name in (
        "models.transformer.transformer_legacy.TransformerModel",
        "models.transformer_align.TransformerAlignModel",
        "models.roberta.model.RobertaModel",
        "models.transformer_lm.TransformerLanguageModel",
        "tasks.translation.TranslationTask",
        "tasks.translation_multi_simple_epoch.TranslationMultiSimpleEpochTask",
        "tasks.language_modeling.LanguageModelingTask",
        "tasks.masked_lm.MaskedLMTask",
        "tasks.sentence_prediction.SentencePredictionTask",
        "criterions.adaptive_loss.AdaptiveLoss",
        "criterions.cross_entropy.CrossEntropyCriterion",
        "criterions.label_smoothed_cross_entropy.LabelSmoothedCrossEntropyCriterion",
        "criterions.label_smoothed_cross_entropy_with_alignment."
        "LabelSmoothedCrossEntropyCriterionWithAlignment",
        "criterions.masked_lm.MaskedLmLoss",
        "criterions.sentence_prediction.SentencePredictionCriterion",
        "data.encoders.byte_bpe.ByteBPE",
        "data.encoders.bytes.Bytes",
        "data.encoders.characters.Characters",
        "data.encoders.fastbpe.fastBPE",
        "data.encoders.gpt2_bpe.GPT2BPE",
        "data.encoders.hf_byte_bpe.HuggingFaceByteLevelBPE",
        "data.encoders.sentencepiece_bpe.SentencepieceBPE",
        "data.encoders.subword_nmt_bpe.SubwordNMTBPE",
        "data.encoders.moses_tokenizer.MosesTokenizer",
        "data.encoders.nltk_tokenizer.NLTKTokenizer",
        "data.encoders.space_tokenizer.SpaceTokenizer",
    )
)
"""Classes of fairseq that were read for what they do with a string of their configuration."""

EVALUATED = re.compile(
    r"(.*_)?(adaptive_(softmax|input)_cutoff|character_filters|xformers_.*)"
    r"|left_pad_(source|target)"
)
"""Fields whose text the classes of :data:`READ` hand to ``eval``."""
NUMBERS = re.compile(r"[-+0-9eE.,\s()\[\]]*")
"""Text that is the same evaluated or not: numbers in brackets."""
TRUTHS = ("True", "False", "None")
"""Likewise."""
PROGRAMS = {"dataset_impl": "fasta"}
"""Values that make fairseq start a program, in a shell."""
FILES = re.compile(
    r"(.*_)?embed_path|replace_unk|sentencepiece_model(_path)?|bpe_\w+|gpt2_\w+"
    r"|(source|target|lang)_dict|fixed_dictionary"
)
"""Fields that name files which are read whole when a model or its pieces are built. fairseq fetches
those that are addresses."""
ADDRESS = re.compile(r"\s*[A-Za-z][\w+.-]*:")
ENDLESS = ("/dev/", "/proc/", "/sys/")
NAME = re.compile(r"[\w.@+-]*")
"""What fairseq writes without quotes among the overrides of hydra."""

LARGEST_SIZE = 1 << 20
"""Of a number in the settings of a model: layers, widths, positions."""
LARGEST_OF_TASK = {"required_seq_len_multiple": 1024, "num_batch_buckets": LARGEST_SIZE}
"""Likewise, of numbers in the settings of a task that decide how large a batch is."""
NO_SIZE = frozenset({"min_params_to_wrap"})
LONGEST_TEXT, MOST_TEXT, MOST_VALUES, DEEPEST = 1 << 16, 1 << 22, 100_000, 20

PARTS: Dict[str, List[Mapping[str, Any]]] = {
    "model": [ARCH_MODEL_REGISTRY, MODEL_REGISTRY],
    "task": [TASK_REGISTRY],
    "criterion": [CRITERION_REGISTRY],
    "bpe": [REGISTRIES["bpe"]["registry"]],
    "tokenizer": [REGISTRIES["tokenizer"]["registry"]],
}
"""What fairseq builds from a checkpoint, and where it looks for the name."""

Settings = Mapping[str, Any]


def check(state: Any, to_build: bool = True) -> None:
    """Check what :func:`.archives.contents` found.

    Args:
        state: what the checkpoint holds, without its tensors.
        to_build: whether anything is built from it. If not, its settings may name what is not
            registered, and are taken as they are: whoever builds from them checks them.

    Raises:
        Refusal: it is no checkpoint of fairseq.
        Untrusted: it asks for what is not known to be harmless.
    """
    if not isinstance(state, dict) or not isinstance(state.get("model"), dict):
        raise Refusal("is not a checkpoint of fairseq: it has no model")
    if not any(isinstance(value, TensorInFile) for value in state["model"].values()):
        raise Refusal("is not a checkpoint of fairseq: its model has no parameters")
    for name, value in state["model"].items():
        # torch lets a module keep more of its state than tensors, under this name.
        if not isinstance(name, str) or not (
            isinstance(value, TensorInFile) or name.endswith("_extra_state")
        ):
            raise Refusal(f"is not a checkpoint of fairseq: {shown(name)} is no parameter")
    _check_history(state)
    args, cfg = state.get("args"), state.get("cfg")
    if args is None and cfg is None:
        raise Refusal("is not a checkpoint of fairseq: it has neither cfg nor args")
    _count([args, cfg])
    if args is not None and not isinstance(args, argparse.Namespace):
        raise Refusal("is not a checkpoint of fairseq: its args are no Namespace")
    if cfg is not None and not isinstance(cfg, dict):
        raise Refusal("is not a checkpoint of fairseq: its cfg is no mapping")
    if not to_build:
        return
    if args is not None:
        _check_flat(vars(args))
    if cfg is not None:
        for part in ("model", "task") if args is None else ():
            if not _names(part, cfg.get(part)):
                raise Refusal(f"is not a checkpoint of fairseq: its cfg names no {part}")
        _check_cfg(cfg)


def _check_history(state: Settings) -> None:
    """What is said of its training has to be what fairseq and ``average`` say."""
    history = state.get("optimizer_history")
    if history is not None and not (
        isinstance(history, list)
        and all(isinstance(each, dict) for each in history)
        and all(isinstance(each.get("num_updates", 0), int) for each in history)
    ):
        raise Refusal("is not a checkpoint of fairseq: its optimizer_history is none")
    if not isinstance(state.get("extra_state", {}), dict):
        raise Refusal("is not a checkpoint of fairseq: its extra_state is none")
    averaged = state.get("averaged_from", [])
    if not isinstance(averaged, list) or not all(isinstance(name, str) for name in averaged):
        raise Refusal("is not a checkpoint of fairseq: its averaged_from holds no names")


def _count(value: Any) -> None:
    """Refuse what holds itself, or one thing so often that a copy of it would never end."""
    left, text, waiting = MOST_VALUES, MOST_TEXT, [(value, 0)]
    while waiting:
        value, depth = waiting.pop()
        if isinstance(value, argparse.Namespace):
            value = vars(value)
        inner = [*value, *value.values()] if isinstance(value, dict) else value
        if isinstance(inner, (list, tuple)):
            left -= len(inner)
        elif isinstance(inner, (str, bytes)):
            text -= len(inner)
        if left < 0 or text < 0 or depth > DEEPEST:
            raise Untrusted("has a configuration larger than any that fairseq writes")
        if isinstance(inner, (list, tuple)):
            waiting += [(each, depth + 1) for each in inner]


def _check_cfg(cfg: Settings) -> None:
    """The configuration since fairseq 0.10: a section for each part."""
    sections = _fields(FairseqConfig)
    for section, settings in cfg.items():
        if isinstance(settings, argparse.Namespace):
            _check_flat(vars(settings), section)
        elif section in PARTS:
            declared = _declared(section, _names(section, settings))
            if isinstance(settings, dict):
                sized = declared if section == "model" else ()
                _check_settings(section, settings, declared, sized)
        elif isinstance(settings, dict) and section in sections:
            _check_settings(section, settings, _fields(sections[section][0].type))
        else:
            _check_plain(section, settings)


def _check_flat(settings: Settings, section: str = "args") -> None:
    """Settings of all parts in one: the flags, of older checkpoints and older models."""
    declared: Dict[str, List[Any]] = {}
    sized: Container[str] = ()
    for (field,) in _fields(FairseqConfig).values():
        _add(declared, _fields(field.type))
    for part in PARTS:
        names = [settings.get("arch" if part == "model" else part)]
        if part == section:
            names.append(settings.get("_name"))
        of_part = _declared(part, [name for name in names if name is not None])
        if part == "model":
            sized = of_part
        _add(declared, of_part)
    for registry in REGISTRIES:
        name = settings.get(registry)
        if name is not None and not (isinstance(name, str) and NAME.fullmatch(name)):
            raise Untrusted(f"has {section}.{registry} = {shown(name)}, which is no name")
    _check_settings(section, settings, declared, sized)


# Names


def _names(part: str, settings: Any) -> List[Any]:
    """What a section names, in each of the ways that fairseq looks for it."""
    if isinstance(settings, argparse.Namespace):
        settings = vars(settings)
    names = [settings]
    if isinstance(settings, dict):
        names = [settings.get(key) for key in ("_name", "arch" if part == "model" else part)]
    return [name for name in names if name is not None]


def _declared(part: str, names: List[Any]) -> Dict[str, List[Any]]:
    """The fields that the classes of these names declare."""
    declared: Dict[str, List[Any]] = {}
    for name in names:
        kind = _class(part, name)
        _add(declared, _fields(getattr(kind, "__dataclass", None)))
        if part == "model" and issubclass(kind, (TransformerModelBase, RobertaModel)):
            _add(declared, _transformer_fields())
    return declared


def _class(part: str, name: Any) -> Any:
    """The class that fairseq would build."""
    what = "architecture" if part == "model" else part
    found = [names[name] for names in PARTS[part] if isinstance(name, str) and name in names]
    if not found:
        raise Untrusted(
            f"asks for the {what} {shown(name)}, which is not registered: see --user-dir"
        )
    kind = found[0]
    if kind.__module__.split(".")[0] == "fairseq" and (
        f"{kind.__module__}.{kind.__qualname__}" not in READ
    ):
        raise Untrusted(
            f"asks for fairseq's {what} {name}, which is not among those known to run no code from "
            "a checkpoint"
        )
    return kind


# Values


def _fields(kind: Any) -> Dict[str, List[Any]]:
    if not dataclasses.is_dataclass(kind):
        return {}
    return {field.name: [field] for field in dataclasses.fields(kind)}


def _add(declared: Dict[str, List[Any]], more: Mapping[str, List[Any]]) -> None:
    for name, fields in more.items():
        declared.setdefault(name, []).extend(fields)


def _transformer_fields() -> Dict[str, List[Any]]:
    """Those of fairseq's transformer, which it reads with the prefix of their side and without."""
    declared = _fields(TransformerConfig)
    for name, (field,) in list(declared.items()):
        for inner, members in _fields(field.type).items():
            _add(declared, {inner: members, f"{name}_{inner}": members})
    return declared


def _check_settings(
    section: str,
    settings: Settings,
    declared: Mapping[str, List[Any]],
    sized: Container[str] = (),
) -> None:
    """Check each field; ``sized`` are those that decide how large a model is."""
    for key, value in settings.items():
        where = f"{section}.{key}"
        fields = declared.get(key, [])
        if fields and not any(_fits(value, field.type, field.default) for field in fields):
            raise Untrusted(f"has {where} = {shown(value)}, which is not of the declared type")
        if not fields:
            _check_plain(where, value)
        _check_evaluated(where, str(key), value)
        _check_files(where, str(key), value, fields)
        if key in LARGEST_OF_TASK:
            _check_size(where, value, LARGEST_OF_TASK[key])
        if key in sized and key not in NO_SIZE:
            _check_size(where, value)


def _check_evaluated(where: str, key: str, value: Any) -> None:
    if isinstance(value, dict):
        for inner, each in value.items():
            _check_evaluated(f"{where}.{inner}", str(inner), each)
    if not isinstance(value, (str, dict)):
        return
    harmless = isinstance(value, str) and (value in TRUTHS or NUMBERS.fullmatch(value))
    if EVALUATED.fullmatch(key) and not harmless:
        raise Untrusted(f"has {where} = {shown(value)}, which fairseq would evaluate as Python")
    if PROGRAMS.get(key) == value:
        raise Untrusted(f"has {where} = {shown(value)}, for which fairseq starts programs")


def _check_files(where: str, key: str, value: Any, fields: List[Any]) -> None:
    if isinstance(value, dict):
        for inner, each in value.items():
            _check_files(f"{where}.{inner}", str(inner), each, [])
    if not isinstance(value, str) or not FILES.fullmatch(key):
        return
    if ADDRESS.match(value) and value not in [field.default for field in fields]:
        raise Untrusted(f"has {where} = {shown(value)}, which fairseq would fetch")
    try:
        kind = os.stat(value).st_mode
    except (OSError, ValueError):
        return
    if not stat.S_ISREG(kind) or os.path.realpath(value).startswith(ENDLESS):
        raise Untrusted(f"has {where} = {shown(value)}, which is no file that ends")


def _check_size(where: str, value: Any, largest: int = LARGEST_SIZE) -> None:
    if isinstance(value, str) and NUMBERS.fullmatch(value):
        with contextlib.suppress(ValueError):
            value = float(value)
    if isinstance(value, (int, float)) and abs(value) > largest:
        raise Untrusted(f"has {where} = {shown(value)}, which is larger than any model")


def _fits(value: Any, kind: Any, default: Any) -> bool:
    """Whether a value is of a declared type, with the liberties that fairseq itself takes."""
    if value is None:
        return True
    if isinstance(value, str) and "${" in value:  # a reference to another field
        return value == default
    if kind is type(None):
        return False
    if get_origin(kind) is Union:
        return any(_fits(value, each, default) for each in get_args(kind))
    if isinstance(kind, type) and issubclass(kind, Enum):
        return value in [each.value for each in kind]
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            return False
        _check_settings("settings", value, _fields(kind))
        return True
    if isinstance(value, str) and kind is not str and kind is not Any:
        # Older checkpoints hold lists and numbers as text.
        harmless = value in TRUTHS or NUMBERS.fullmatch(value)
        return len(value) <= LONGEST_TEXT and bool(harmless)
    if kind in (bool, int, float):
        return isinstance(value, (bool, int, float))
    if kind is str:
        return isinstance(value, str) and _is_plain(value)
    if get_origin(kind) in (list, tuple):
        inner = get_args(kind)[0] if get_args(kind) else Any
        return isinstance(value, (list, tuple)) and all(_fits(v, inner, None) for v in value)
    return _is_plain(value)


def _check_plain(where: str, value: Any) -> None:
    if not _is_plain(value):
        raise Untrusted(f"has {where} = {shown(value)}, which is no plain value")


def _is_plain(value: Any) -> bool:
    """Numbers, text that refers to nothing, and lists and mappings of these."""
    if isinstance(value, str):
        # fairseq writes older settings as overrides of hydra, in quotes.
        return len(value) <= LONGEST_TEXT and "${" not in value and "\\'" not in value
    if isinstance(value, dict):
        return all(isinstance(key, (str, int)) and _is_plain(v) for key, v in value.items())
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float))
