"""A folder that :mod:`.exporting` wrote becomes a run of fairseq again."""

import re
import shutil
from argparse import Namespace
from pathlib import Path
from typing import Any, Dict

import torch
from fairseq import checkpoint_utils, tasks
from fairseq.dataclass.configs import FairseqConfig
from fairseq.tasks.translation import TranslationConfig
from omegaconf import OmegaConf, open_dict
from torch import Tensor

from fairseq_sparsemixer.errors import UserError
from fairseq_sparsemixer.export.exporting import MODEL_TYPE, MODELING
from fairseq_sparsemixer.files import atomic_folder, read_json
from fairseq_sparsemixer.models.config import SIDES
from fairseq_sparsemixer.requirements import load
from fairseq_sparsemixer.runs.archives import reason
from fairseq_sparsemixer.runs.mending import BEST
from fairseq_sparsemixer.runs.reading import CheckpointError
from fairseq_sparsemixer.text import SENTENCEPIECE_MODEL

_CURE = "give a folder that `fairseq-sparsemixer export` wrote"
_CONFIG = {
    "model_type": str,
    **{f"{side}_layers": int for side in SIDES},
    **{f"{side}_moe_layers": [int] for side in SIDES},
    "fairseq": {
        "model": {str: (str, int, float, bool)},
        "source_lang": str,
        "target_lang": str,
        "updates": int,
    },
}
_LIMITS = ("max_source_positions", "max_target_positions")
_LANGUAGE = re.compile(r"\w[\w.-]*")
FILES = {
    SENTENCEPIECE_MODEL: SENTENCEPIECE_MODEL,
    "dict.source.txt": "dict.{source_lang}.txt",
    "dict.target.txt": "dict.{target_lang}.txt",
}
"""What is copied, by the names there and here."""


def import_folder(folder: Path, output: Path) -> None:
    """Write a run folder, whole or not at all.

    Args:
        folder: that was exported, or saved again by transformers.
        output: a new folder.

    Raises:
        UserError: ``folder`` is something else, does not fit itself, or asks for what is not known
            to be harmless.
    """
    config = _config(folder)
    tensors = _tensors(folder)
    only_training = load(
        MODELING, "export"
    ).SparseMixerForSeq2SeqLM._keys_to_ignore_on_load_unexpected
    with atomic_folder(output) as run:
        for there, here in FILES.items():
            try:
                shutil.copyfile(folder / there, run / here.format(**config["fairseq"]))
            except FileNotFoundError as error:
                raise UserError(f"{folder} has no {there}; {_CURE}") from error
        path = run / BEST
        _write(path, config, output, tensors)
        whole = _model(folder, path).state_dict()
        for name in sorted(whole.keys() ^ tensors.keys()):
            if name in tensors or not any(re.search(each, name) for each in only_training):
                lacks = "holds" if name in tensors else "lacks"
                raise UserError(f"{folder} {lacks} {name}, unlike its config.json; {_CURE}")
        _write(path, config, output, whole)


def _config(folder: Path) -> Dict[str, Any]:
    """What config.json says."""
    config = read_json(folder / "config.json", {"model_type?": (str, None)}, _CURE)
    if config.get("model_type") != MODEL_TYPE:
        raise UserError(f"{folder} is a model of type {config.get('model_type')!r}; {_CURE}")
    config = read_json(folder / "config.json", _CONFIG, _CURE)
    for side in ("source_lang", "target_lang"):
        if not _LANGUAGE.fullmatch(config["fairseq"][side]):
            raise UserError(f"{folder} has a {side} that is none; {_CURE}")
    return config


def _tensors(folder: Path) -> Dict[str, Tensor]:
    """The parameters by their names in fairseq, of one matrix all names."""
    safetensors = load("safetensors.torch", "export")
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise UserError(f"{folder} has no model.safetensors; {_CURE}")
    tensors: Dict[str, Tensor] = {}
    for path in paths:
        try:
            tensors.update(safetensors.load_file(path))
        except Exception as error:  # it has one of its own
            raise UserError(f"cannot read {path} ({error}): copy it again") from error
    sources = ("encoder.embed_tokens", "decoder.embed_tokens", "decoder.output_projection")
    for source, target in zip(sources, sources[1:]):
        if f"{target}.weight" not in tensors and f"{source}.weight" in tensors:
            tensors[f"{target}.weight"] = tensors[f"{source}.weight"]
    for side in SIDES:
        # What transformers does not keep: without it fairseq takes the model for one of before
        # 2018, which had no norm behind its last layer.
        tensors.setdefault(f"{side}.version", torch.tensor([3.0]))
    return tensors


def _write(path: Path, config: Dict[str, Any], output: Path, model: Dict[str, Tensor]) -> None:
    """A checkpoint as fairseq writes them, without state of the optimiser."""
    made, fairseq = dict(config["fairseq"]["model"]), config["fairseq"]
    for side in SIDES:
        # As they were built: of a model that was pruned by layers some are left.
        layers = config[f"{side}_moe_layers"]
        made[f"{side}_layers"] = config[f"{side}_layers"]
        made[f"{side}_moe_layers"] = ",".join(map(str, layers)) or "none"
        made.pop(f"{side}_layers_to_keep", None)
        made.pop(f"{side}_embed_path", None)
    task = TranslationConfig(
        data=str(output.resolve()),
        source_lang=fairseq["source_lang"],
        target_lang=fairseq["target_lang"],
        **{name: made[name] for name in _LIMITS if name in made},
    )
    cfg = OmegaConf.to_container(OmegaConf.structured(FairseqConfig()), enum_to_str=True)
    assert isinstance(cfg, dict)
    cfg["task"] = {**vars(task), "_name": "translation"}
    cfg["model"] = made if "arch" not in made else Namespace(**made)
    # What fairseq would else take for an older form of its own.
    history = {"optimizer_name": None, "lr_scheduler_state": {"best": None}}
    state = {
        "args": None,
        "cfg": cfg,
        "model": model,
        "optimizer_history": [{**history, "num_updates": fairseq["updates"]}],
        "extra_state": {},
    }
    with path.open("wb") as file:
        torch.save(state, file)


def _model(folder: Path, path: Path) -> Any:
    """fairseq's model of the checkpoint ``path``, which lies beside its dictionaries.

    Raises:
        UserError: names ``folder``, which it was made of.
    """
    try:
        state = checkpoint_utils.load_checkpoint_to_cpu(str(path))
        with open_dict(state["cfg"]):
            state["cfg"].task.data = str(path.parent)
        task = tasks.setup_task(state["cfg"].task)
        paths = [str(path)]
        return checkpoint_utils.load_model_ensemble(paths, None, task, False, state=state)[0][0]
    except CheckpointError as error:
        why = f"it {error.refusal}"
    except Exception as error:  # fairseq checks few settings: they fail wherever they are used
        why = reason(error)
    raise UserError(f"{folder} cannot be imported ({why}); {_CURE}")
