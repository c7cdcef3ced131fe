"""The languages of sentences, by the tags that fairseq's multilingual task puts into them.

Shape suffixes: B sentences, T tokens of the longest, L languages.
"""

import copy
import dataclasses
from typing import Any, Dict, List

import torch
from fairseq.data.multilingual.multilingual_utils import get_lang_tok
from fairseq.models.transformer import TransformerConfig
from fairseq.tasks import FairseqTask
from fairseq.tasks.translation_multi_simple_epoch import TranslationMultiSimpleEpochTask
from torch import Tensor

from fairseq_sparsemixer.models.config import SIDES, ConfigError, ExpertSettings
from fairseq_sparsemixer.moe import ROUTERS

_FLAGS = {"encoder": "--encoder-langtok tgt", "decoder": "--decoder-langtok"}


def find_tags(experts: ExpertSettings, task: FairseqTask) -> Dict[str, List[int]]:
    """By side, the entries of the dictionary that tag its sentences, in the order of the languages.

    Empty where the router does not read languages; else of each side that has experts.

    Raises:
        ConfigError: the task tags no sentences of a side.
    """
    if not ROUTERS[experts.router].needs_languages:
        return {}
    layers = {"encoder": experts.encoder_layers, "decoder": experts.decoder_layers}
    return {side: _tags(task, side) for side in SIDES if layers[side]}


def _tags(task: FairseqTask, side: str) -> List[int]:
    of_encoder = side == "encoder"
    multilingual = isinstance(task, TranslationMultiSimpleEpochTask)
    spec = task.args.langtoks["main"][0 if of_encoder else 1] if multilingual else None
    if spec is None:
        raise ConfigError(
            f"--router language finds no language in the {side}: train with "
            f"--task translation_multi_simple_epoch {_FLAGS[side]}, give --{side}-moe-layers none, "
            "or choose another --router"
        )
    of_source = spec.startswith("src")
    languages = {pair.split("-")[0 if of_source else 1] for pair in task.args.lang_pairs}
    dictionary = task.source_dictionary if of_encoder else task.target_dictionary
    return [
        dictionary.index(get_lang_tok(language, task.args.lang_tok_style, spec))
        for language in task.langs
        if language in languages
    ]


def of_side(cfg: TransformerConfig, side: str) -> TransformerConfig:
    """Settings of the layers of a side, whose router knows how many languages there are."""
    tags = cfg.language_tags.get(side)
    if tags is None:
        return cfg
    cfg = copy.copy(cfg)
    options = {**cfg.experts.router_options, "num_languages": len(tags)}
    cfg.experts = dataclasses.replace(cfg.experts, router_options=options)
    return cfg


def keep_tags(side: Any, tags: Dict[str, List[int]], name: str) -> None:
    """Keep the tags with the parameters: a checkpoint knows which languages it was trained on."""
    kept = torch.tensor(tags[name]) if name in tags else None
    side.register_buffer("language_tags", kept)


def tokens_and_languages(tokens_BT: Tensor, tags_L: Tensor, so_far: bool) -> Tensor:
    """(B, T) int64: language + L * token, with languages numbered in the order of the tags.

    The language is that of the sentence's tag, wherever it stands; where there is none, the first.

    Args:
        so_far: only a tag that stands at or before a token counts for it.
    """
    numbers_L = torch.arange(1, len(tags_L) + 1, device=tags_L.device)
    tagged_BT = ((tokens_BT.unsqueeze(-1) == tags_L) * numbers_L).sum(dim=-1)
    tagged_BT = tagged_BT.cummax(dim=1)[0] if so_far else tagged_BT.amax(dim=1, keepdim=True)
    return (tagged_BT - 1).clamp(min=0) + len(tags_L) * tokens_BT
