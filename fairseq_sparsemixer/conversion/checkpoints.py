"""A checkpoint's model without its dictionaries, and a checkpoint of another model."""

from pathlib import Path
from typing import Any, Dict, Optional, Tuple

import torch
from fairseq import models
from fairseq.models.transformer import TransformerModelBase
from omegaconf import OmegaConf
from torch import nn

from fairseq_sparsemixer.errors import UserError
from fairseq_sparsemixer.evaluation.translator import find_checkpoints
from fairseq_sparsemixer.models.building import dictionary_of
from fairseq_sparsemixer.models.config import SIDES
from fairseq_sparsemixer.runs.checkpoints import building, check_finite, load_state, save_model

Settings = Dict[str, Any]


def find_checkpoint(run: str, checkpoint: str) -> Path:
    """The one file that ``RUN_DIR`` and ``--checkpoint`` name.

    Raises:
        UserError: it does not exist, or there are several.
    """
    paths = find_checkpoints(run, checkpoint)
    if len(paths) > 1:
        raise UserError(f"{run} and --checkpoint name {len(paths)} checkpoints; give one")
    return paths[0]


class Vocabularies:
    """What a model reads of a task: dictionaries, of which only their sizes matter here.

    Args:
        state: of a checkpoint, with its embeddings.
        path: of its file.

    Raises:
        UserError: it has no embeddings under fairseq's names.
    """

    def __init__(self, state: Dict[str, Any], path: Path) -> None:
        names = [f"{side}.embed_tokens.weight" for side in SIDES]
        for name in names:
            if name not in state["model"]:
                raise UserError(
                    f"{path} is of no transformer that translates (it has no {name}); give another"
                )
        self.source_dictionary, self.target_dictionary = (
            dictionary_of(len(state["model"][name])) for name in names
        )


def read_transformer(path: Path) -> Tuple[Dict[str, Any], Vocabularies, TransformerModelBase]:
    """A checkpoint's content, what its model reads of a task, and the model.

    Raises:
        UserError: it cannot be read, or its model is no transformer that translates.
    """
    state = load_state(path)
    check_finite(path, state)
    vocabularies = Vocabularies(state, path)
    with building(path):
        settings = state["cfg"].model
        model = models.build_model(settings, vocabularies, from_checkpoint=True)
        model.load_state_dict(state["model"], strict=True, model_cfg=settings)
    if not isinstance(model, TransformerModelBase):
        raise UserError(f"{path} is of no transformer that translates; give another")
    return state, vocabularies, model


def write_model(
    state: Dict[str, Any],
    model: nn.Module,
    settings: Settings,
    output: Path,
    parts: Optional[Dict[str, Settings]] = None,
) -> None:
    """Write a checkpoint of ``model``, with all else as in ``state``.

    Args:
        state: what the checkpoint held that it was made from; changed.
        model: its parameters are written in the dtype of that checkpoint's, routers in float32.
        settings: of the model, with ``_name``.
        output: the file.
        parts: other sections of its settings.

    Raises:
        FullDiskError: it does not fit on the disk.
    """
    dtype = state["model"]["encoder.embed_tokens.weight"].dtype
    cfg: Any = OmegaConf.to_container(state["cfg"], resolve=True, enum_to_str=True)
    cfg.update({"model": settings, **(parts or {})})
    cast: Dict[Any, torch.Tensor] = {}  # tied embeddings stay one storage
    parameters = {}
    for name, value in model.state_dict().items():
        wanted = value.dtype if ".router." in name else dtype
        place = (value.data_ptr(), value.shape, wanted)
        parameters[name] = cast.setdefault(place, value.to(wanted))
    save_model({**state, "args": None, "cfg": cfg, "model": parameters}, output)
