"""From settings to a model, and from a checkpoint into it: what the models have in common."""

import argparse
import contextlib
from typing import Any, Callable, Dict, Iterator, Optional, Sequence, Tuple, Type, Union

import torch
import torch.distributed as dist
from fairseq.checkpoint_utils import prune_state_dict
from fairseq.data import Dictionary
from fairseq.dataclass import FairseqDataclass
from fairseq.dataclass.utils import gen_parser_from_dataclass, merge_with_parent
from fairseq.models import BaseFairseqModel
from fairseq.models.transformer import TransformerConfig
from fairseq.tasks import FairseqTask
from fairseq.tasks.language_modeling import LanguageModelingTask
from fairseq.tasks.masked_lm import MaskedLMTask
from fairseq.tasks.sentence_prediction import SentencePredictionTask
from fairseq.tasks.translation import TranslationTask
from fairseq.tasks.translation_multi_simple_epoch import TranslationMultiSimpleEpochTask
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor
from torch.nn.parallel.distributed import DistributedDataParallel

from fairseq_sparsemixer.models.config import (
    SIDES,
    ConfigError,
    SwitchTransformerConfig,
    check_workers,
    expert_settings,
)
from fairseq_sparsemixer.moe.parallel import ExpertParallel, is_spread

Settings = Union[argparse.Namespace, DictConfig]
Fill = Callable[[argparse.Namespace], Any]
"""One of fairseq's architectures: sets the attributes that its argument does not have."""

PAIRS = (TranslationTask, TranslationMultiSimpleEpochTask)
TEXTS = (LanguageModelingTask,)
INPUTS = (MaskedLMTask, SentencePredictionTask)
"""fairseq's tasks by what their batches hold: two sentences, words and the next ones, one input."""


def given(settings: Settings) -> argparse.Namespace:
    """The settings that are not None."""
    if isinstance(settings, DictConfig):
        values: Any = OmegaConf.to_container(settings, resolve=True, enum_to_str=True)
    else:
        values = vars(settings)
    return argparse.Namespace(**{k: v for k, v in values.items() if v is not None})


def fill_gaps(settings: Settings, config: Type[FairseqDataclass], fill: Fill) -> None:
    """Give the settings that are missing or None what one of fairseq's architectures says.

    Args:
        settings: flags or hydra's node, changed in place.
        config: the fields that it may have.
        fill: the architecture.
    """
    filled = given(settings)
    fill(filled)
    for name, field in config.__dataclass_fields__.items():
        value = getattr(filled, name, None)
        if value is not None and not name.startswith("_"):
            # fairseq fills in base_shuffle, a number, with False
            is_number = field.type in (int, Optional[int])
            setattr(settings, name, int(value) if is_number and value is False else value)


def dictionary_of(size: int) -> Dictionary:
    """One of so many entries, for a model of which only their number matters."""
    dictionary = Dictionary()
    for number in range(size - len(dictionary)):
        dictionary.add_symbol(f"word{number}")
    return dictionary


class SwitchModel(BaseFairseqModel):
    """The base of the models, beside fairseq's own."""

    config: Type[FairseqDataclass] = SwitchTransformerConfig
    """Its settings."""
    sides: Sequence[str] = SIDES
    """Of fairseq's transformer, those that it has."""
    tasks = ""
    """What it is trained on, for messages."""
    refused_tasks: Tuple[Type, ...] = ()
    """Those of fairseq whose batches it cannot read."""

    @staticmethod
    def base_architecture(args: argparse.Namespace) -> None:
        """Fill in what neither the user, a named architecture nor ``config`` gives."""

    @classmethod
    def add_args(cls, parser: argparse.ArgumentParser) -> None:
        """Add a flag for every setting."""
        # Without defaults: a flag that is not given is for the architecture to fill.
        gen_parser_from_dataclass(parser, cls.config(), delete_default=True, with_prefix="")

    @classmethod
    def _read(cls, settings: Settings, task: FairseqTask) -> argparse.Namespace:
        """All settings, from flags or from hydra's node.

        Raises:
            ConfigError: for a setting that is unknown or not supported, and a task that does not go
                with the model.
        """
        if getattr(settings, "scale_fc", False):
            raise ConfigError("--scale-fc must be off: experts have no inner layer norm")
        if isinstance(task, cls.refused_tasks):
            of_task = getattr(task, "args", None) or task.cfg
            name = getattr(of_task, "_name", None) or type(task).__name__
            raise ConfigError(
                f"--task {name} has nothing for this model to read: choose --task {cls.tasks}, or "
                "another --arch"
            )
        if isinstance(settings, DictConfig):
            # hydra builds the node before it knows this dataclass: fill in and refuse unknown keys.
            try:
                settings = merge_with_parent(cls.config(), settings)
            except OmegaConfBaseException as error:
                raise ConfigError(f"model settings: {str(error).splitlines()[0]}") from None
        args = given(cls.config.from_namespace(settings))
        cls.base_architecture(args)
        for name, field in cls.config.__dataclass_fields__.items():
            if not hasattr(args, name):
                of_elsewhere = str(field.default).startswith("${")  # and is None there
                setattr(args, name, None if of_elsewhere else field.default)
        return args

    @classmethod
    def _expand(cls, args: argparse.Namespace) -> TransformerConfig:
        """fairseq's nested settings, with those of the experts as ``experts``.

        Raises:
            ConfigError: for a setting that is out of range.
        """
        experts = expert_settings(args, cls.sides)
        cfg = TransformerConfig.from_namespace(given(args))
        cfg.experts = experts
        cfg.expert_parallel = _expert_parallel(experts.parallel_size)
        cfg.init_experts = None
        return cfg

    @classmethod
    def _finished(cls, model: "SwitchModel", cfg: TransformerConfig) -> Any:
        """``model``, with what is to be known of it."""
        model.cfg = cfg
        if cfg.expert_parallel is not None:
            DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(
                model, [name for name, value in model.named_parameters() if is_spread(value)]
            )
        return model

    def load_state_dict(
        self,
        state_dict: Dict[str, Tensor],
        strict: bool = True,
        model_cfg: Optional[Settings] = None,
        args: Optional[argparse.Namespace] = None,
    ) -> Any:
        """Load parameters, of the layers to keep.

        Raises:
            ConfigError: for a checkpoint of another shape, naming the first parameter that differs.
        """
        if model_cfg is not None:
            if len(self.sides) > 1:
                _keep_the_other_side(model_cfg, state_dict)
            # Here rather than in fairseq, so that a difference is looked for in what is loaded.
            state_dict = prune_state_dict(state_dict, model_cfg)
        try:
            return super().load_state_dict(state_dict, strict, model_cfg, args)
        except RuntimeError as error:
            difference = _first_difference(self._whole_shapes(), state_dict)
            if difference is None:
                raise
            raise ConfigError(f"the checkpoint does not fit the model: {difference}") from error

    def _whole_shapes(self) -> Dict[str, torch.Size]:
        """Of what a checkpoint holds of it, whichever worker's experts these are."""
        size = self.cfg.experts.parallel_size
        spread = {name for name, value in self.named_parameters() if is_spread(value)}
        return {
            name: torch.Size([size * len(value), *value.shape[1:]])
            if name in spread
            else value.shape
            for name, value in self.state_dict().items()
        }


@contextlib.contextmanager
def naming_conflicts() -> Iterator[None]:
    """Have fairseq's own checks of flags that do not fit together end with a ConfigError."""
    try:
        yield
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _expert_parallel(size: int) -> Optional[ExpertParallel]:
    """What spreads the experts, where several workers train; else whoever reads them has all."""
    if size == 1 or not (dist.is_available() and dist.is_initialized()):
        return None
    check_workers(size, dist.get_world_size())
    return ExpertParallel(size)


def _keep_the_other_side(settings: Settings, state_dict: Dict[str, Tensor]) -> None:
    """Keep all layers of the encoder where only the decoder is pruned, and the other way round.

    fairseq drops every layer of a side without ``layers_to_keep`` where the other has one.
    """
    kept = [getattr(settings, f"{side}_layers_to_keep", None) for side in SIDES]
    if not any(kept):
        return
    for side, layers in zip(SIDES, kept):
        if not layers:
            prefix = f"{side}.layers."
            numbers = {n[len(prefix) :].split(".")[0] for n in state_dict if n.startswith(prefix)}
            setattr(settings, f"{side}_layers_to_keep", ",".join(sorted(numbers, key=int)))


_CURES = {
    "embed_tokens": "its vocabulary is another: binarise the data with its dictionary "
    "(fairseq-preprocess --srcdict), or give another checkpoint",
    "embed_positions": "give the --max-positions (of a language model --tokens-per-sample, of "
    "translation --max-source-positions and --max-target-positions) that it was trained with",
}
"""By a part of the name of the parameter that differs in shape."""
_CURE = (
    "give the --arch, --router, --num-experts and layer flags that it was trained with, or another "
    "--save-dir"
)


def _first_difference(here: Dict[str, torch.Size], there: Dict[str, Tensor]) -> Optional[str]:
    """Which parameter of the model differs from the checkpoint's in name or shape, and the cure."""
    for name, shape in here.items():
        if name not in there:
            return f"it has no {name}; {_CURE}"
        if there[name].shape != shape:
            # A width differs in all of them, a vocabulary or a number of positions in the first.
            same_width = there[name].shape[1:] == shape[1:]
            cures = [cure for part, cure in _CURES.items() if part in name and same_width]
            cure = (cures or [_CURE])[0]
            return f"{name} is {tuple(there[name].shape)} there and {tuple(shape)} here; {cure}"
    extra = [name for name in there if name not in here]
    return f"the model has no {extra[0]}; {_CURE}" if extra else None
