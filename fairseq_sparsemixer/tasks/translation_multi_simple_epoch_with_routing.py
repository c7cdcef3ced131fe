"""fairseq's multilingual translation, with a point of measurements at every validation."""

import argparse
import ast
import contextlib
from dataclasses import dataclass, field, make_dataclass
from typing import Any, Dict, Iterator, List, Optional, Tuple, Type

from fairseq import utils
from fairseq.data import ConcatDataset
from fairseq.dataclass import FairseqDataclass
from fairseq.dataclass.utils import gen_parser_from_dataclass
from fairseq.tasks import register_task
from fairseq.tasks.translation_multi_simple_epoch import TranslationMultiSimpleEpochTask
from omegaconf import II, OmegaConf

from fairseq_sparsemixer.models.config import ConfigError
from fairseq_sparsemixer.tasks.translated import Part, TranslatedTask, TranslationPointsConfig


def _flags_of(task: Type[TranslationMultiSimpleEpochTask]) -> Iterator[argparse.Action]:
    """The flags of a task that fairseq knows as flags alone."""
    parser = argparse.ArgumentParser(add_help=False)
    task.add_args(parser)
    yield from parser._actions


def _as_field(flag: argparse.Action) -> Tuple[str, Any, Any]:
    """Name, type and field of a dataclass; what is neither number nor switch may be text."""
    metadata: Dict[str, Any] = {"help": flag.help}
    if len(flag.option_strings) > 1:
        metadata["argparse_alias"] = flag.option_strings[0]
    numbers = {int: Optional[int], float: Optional[float]}
    kind = bool if flag.const is True else numbers.get(flag.type, Any)  # type: ignore[call-overload]
    default = ",".join(flag.default) if isinstance(flag.default, list) else flag.default
    return flag.dest, kind, field(default=default, metadata=metadata)


def _read(flag: argparse.Action, value: Any) -> Any:
    """A setting as the task wants it, whose text may come from a checkpoint: nothing is evaluated.

    Raises:
        ConfigError: it is not what the flag takes.
    """
    name = flag.option_strings[-1] if flag.option_strings else flag.dest
    if flag.dest in ("left_pad_source", "left_pad_target"):
        if str(value) not in ("True", "False"):
            raise ConfigError(f"{name} must be True or False, not {value}")
        return str(value)  # which fairseq evaluates
    if not isinstance(value, str) or not callable(flag.type) or flag.type is str:
        return value
    if flag.type is utils.csv_str_list:
        return value.split(",")
    try:
        found = ast.literal_eval(value)
    except (ValueError, SyntaxError):
        found = None
    if not isinstance(found, dict):
        raise ConfigError(f"{name} must be a dictionary such as {{'main': 1}}, not {value}")
    return found


@dataclass
class _ElsewhereConfig(TranslationPointsConfig):
    """What the task reads of other parts' settings."""

    seed: int = II("common.seed")
    dataset_impl: Optional[str] = II("dataset.dataset_impl")
    train_subset: str = II("dataset.train_subset")


_FLAGS = list(_flags_of(TranslationMultiSimpleEpochTask))


TranslationMultiSimpleEpochWithRoutingConfig: Type[FairseqDataclass] = make_dataclass(
    "TranslationMultiSimpleEpochWithRoutingConfig",
    [_as_field(flag) for flag in _FLAGS],
    bases=(_ElsewhereConfig,),
    namespace={"__module__": __name__},
)


class _Numbered(ConcatDataset):
    """A validation set of several pairs of languages, whose lines are numbered through."""

    def __getitem__(self, idx: int) -> Dict[str, Any]:
        """See fairseq."""
        return {**super().__getitem__(idx), "id": idx}


@register_task(
    "translation_multi_simple_epoch_with_routing",
    dataclass=TranslationMultiSimpleEpochWithRoutingConfig,
)
class TranslationMultiSimpleEpochWithRoutingTask(TranslatedTask, TranslationMultiSimpleEpochTask):
    """Points tell losses, scores and load of each pair of languages; BLEU of all is their mean.

    Without ``points_file``, it is fairseq's task ``translation_multi_simple_epoch``.
    """

    @staticmethod
    def add_args(parser: argparse.ArgumentParser) -> None:
        """See fairseq, whose older tasks would add their own flags alone."""
        gen_parser_from_dataclass(parser, TranslationMultiSimpleEpochWithRoutingConfig())

    @classmethod
    def setup_task(cls, cfg: Any, **kwargs: Any) -> Any:
        """See fairseq, which wants a namespace, and lists that flags have been made to."""
        settings: Any = vars(cfg)
        if OmegaConf.is_config(cfg):
            settings = OmegaConf.to_container(cfg, resolve=True)
        args = argparse.Namespace(**settings)
        for flag in _FLAGS:
            setattr(args, flag.dest, _read(flag, getattr(args, flag.dest)))
        return super().setup_task(args, **kwargs)

    def load_dataset(self, split: str, *args: Any, **kwargs: Any) -> None:
        """See fairseq."""
        super().load_dataset(split, *args, **kwargs)
        dataset = self.datasets[split]
        if isinstance(dataset, ConcatDataset):
            self.datasets[split] = _Numbered(dataset.datasets)
        elif split == self.subset and self.args.points_file:
            raise ConfigError(
                "--points-file needs lines that are numbered, which fairseq's "
                "--lang-tok-replacing-bos-eos takes away: leave out one of the two"
            )

    def parts(self) -> List[Part]:
        """See :class:`TranslatedTask`: a pair of languages each."""
        dataset: Any = self.dataset(self.subset)
        found: List[Part] = []
        start = 0
        for pair, data in zip(self.lang_pairs, dataset.datasets):
            source, target = pair.split("-")
            lines = range(start, start + len(data))
            found.append(Part(source, target, f"{pair}.{target}", lines))
            start = lines.stop
        return found

    def groups(self) -> Optional[List[str]]:
        """See :class:`MeasuredTask`: pairs of languages."""
        parts = zip(self.lang_pairs, self.parts())
        return [pair for pair, part in parts for _ in part.lines]

    @contextlib.contextmanager
    def translating(self, part: Part) -> Iterator[None]:
        """See :class:`TranslatedTask`; fairseq's takes the languages for those of a command."""
        before = self.args.source_lang, self.args.target_lang
        self.args.source_lang, self.args.target_lang = part.source_lang, part.target_lang
        try:
            yield
        finally:
            self.args.source_lang, self.args.target_lang = before
