"""Folders of the version before the restructuring, built from text (data/before)."""

import json
import random
import re
import shutil
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch
from fairseq import options
from fairseq_cli import preprocess
from google.protobuf import json_format
from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2

import fairseq_sparsemixer

DATA = Path(__file__).parents[1] / "data" / "before"
PACKAGE = Path(fairseq_sparsemixer.__file__).resolve().parent
COMMANDS = json.loads((DATA / "commands.json").read_text())
"""The command lines that the runs were started with, and that go on with them."""
TRAINED = Path("runs", "wmt14", "sparsemixer-2-seed1")
TINY = 1 / 256
"""Unit of the weights: they are exact."""
CLOCKS = ("wps", "ups", "wall", "train_wall", "seconds", "cpu_seconds", "words_per_second")


# The folders


def build(root):
    """Write all folders below ``root``, as the version before left them."""
    root.mkdir(parents=True)
    for source in sorted(DATA.rglob("*")):
        target = root / source.relative_to(DATA)
        if source.is_dir():
            target.mkdir(parents=True, exist_ok=True)
        else:
            text = source.read_text(encoding="utf-8").replace("@ROOT@", str(root))
            target.write_text(text.replace("@PACKAGE@", str(PACKAGE)), encoding="utf-8")
    configs = _take(root / "configs.json")
    shared = {name: _take(root / f"{name}.json") for name in ("weights", "model", "cfg")}
    _build_corpus(root / "data", _take(root / "sentencepiece.json"))
    _build_study_corpus(root / "data", root / "study")
    for name, text in configs.items():
        path = root / "study" / "configs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    for path in root.rglob("demo.json"):
        state = json.loads(path.read_text())
        state["settings"]["configs"] = configs
        path.write_text(json.dumps(state))
    for path in sorted(root.rglob("checkpoints.json")):
        _build_run(path.parent, root, **shared)


def _take(path):
    content = json.loads(path.read_text(encoding="utf-8"))
    path.unlink()
    return content


def _build_corpus(folder, model):
    """From ``raw`` and ``spm/dict.txt`` what ``prepare`` made of them, byte for byte."""
    proto = json_format.ParseDict(model, sentencepiece_model_pb2.ModelProto())
    (folder / "spm" / "spm.model").write_bytes(proto.SerializeToString(deterministic=True))
    pieces = SentencePieceProcessor(model_file=str(folder / "spm" / "spm.model"))
    for path in folder.glob("raw/*.??"):
        lines = path.read_text(encoding="utf-8").splitlines()
        encoded = "".join(" ".join(pieces.encode(line, out_type=str)) + "\n" for line in lines)
        (folder / "spm" / path.name).write_text(encoded, encoding="utf-8")
    prefixes = [f"--{split}pref={folder / 'spm' / split}" for split in ("train", "valid", "test")]
    arguments = [
        *("--source-lang", "en", "--target-lang", "de", "--joined-dictionary", *prefixes),
        *("--srcdict", str(folder / "spm" / "dict.txt"), "--destdir", str(folder / "bin")),
    ]
    preprocess.main(options.get_preprocessing_parser().parse_args(arguments))
    (folder / "bin" / "preprocess.log").unlink()
    shutil.copyfile(folder / "spm" / "spm.model", folder / "bin" / "sentencepiece.bpe.model")
    for path in folder.glob(".steps/*.json"):
        # A corpus is made anew by another version, which is not what is tested here.
        text = path.read_text()
        version = f'"version": "{fairseq_sparsemixer.__version__}"'
        path.write_text(re.sub(r'"version": "[\d.]+"', version, text))


def _build_study_corpus(data, study):
    shutil.copytree(data / "bin", study / "data" / "bin")
    shutil.copytree(data / "copy", study / "data" / "copy")
    for split in ("valid", "test"):
        for language in ("en", "de"):
            name = f"{split}.{language}"
            shutil.copyfile(data / "raw" / name, study / "data" / "raw" / name)
    shutil.copyfile(data / "record.json", study / "data" / "record.json")


def _build_run(folder, root, weights, model, cfg):
    for path in (root / "data" / "bin").glob("*"):
        if path.name.startswith(("dict.", "sentencepiece.")):
            shutil.copyfile(path, folder / path.name)
    for log, other in (("train.log", "hydra_train.log"), ("hydra_train.log", "train.log")):
        if (folder / log).is_file() and not (folder / other).is_file():
            shutil.copyfile(folder / log, folder / other)
    for path in folder.glob("points.*.choices.json"):
        layers = {name: np.array(rows, dtype=np.int16) for name, rows in _take(path).items()}
        np.savez_compressed(path.with_name(path.name.replace(".choices.json", ".npz")), **layers)
    kept = _take(folder / "checkpoints.json")
    weights = {**weights, **kept["weights"]}
    cfg = whole_cfg(cfg, kept["cfg"])
    last = kept["files"]["checkpoint_last.pt"]
    model = last["model"] or model
    for name, content in kept["files"].items():
        if isinstance(content, str):
            shutil.copyfile(folder / content, folder / name)
            continue
        extra = {**last["extra_state"], **content["extra_state"]}
        whole = {**last, **content, "extra_state": extra}
        seed = f"{folder.relative_to(root)}/{name}"
        state = {**decode(whole), "cfg": cfg, "model": _model(model, weights, seed)}
        optimizer = state["last_optimizer_state"]
        step = state.pop("step", optimizer["state"]["step"])
        optimizer["state"] = _adam(optimizer["state"]["shapes"], step, seed)
        if "averaged_from" in state:
            del state["last_optimizer_state"]
        torch.save(state, folder / name)


def whole_cfg(cfg, changes):
    """The settings of one run, which are kept as what differs from another's."""
    whole = dict(cfg)
    for section, value in changes.items():
        if isinstance(value, dict) and "~changes" in value:
            value = {**cfg[section], **value["~changes"]}
        whole[section] = value
    return whole


def _model(described, weights, seed):
    """Weights near those of ``weights``, others in each checkpoint; tied ones are one tensor."""
    model, rng = OrderedDict(), random.Random(seed)
    for key, shape in described.items():
        if isinstance(shape, str):
            model[key] = model[shape]
        else:
            units = [int(unit) + rng.randint(-5, 5) for unit in weights[key].split()]
            model[key] = torch.tensor(units, dtype=torch.float32).mul(TINY).view(shape)
    return model


def _adam(shapes, step, seed):
    rng = random.Random(f"{seed} adam")
    state = {}
    for number, shape in enumerate(shapes):
        size = int(np.prod(shape))
        mean = torch.tensor([rng.randint(-8, 8) for _ in range(size)], dtype=torch.float32)
        square = torch.tensor([rng.randint(1, 16) for _ in range(size)], dtype=torch.float32)
        state[number] = {
            "step": step,
            "exp_avg": mean.div(2**12).view(shape),
            "exp_avg_sq": square.div(2**16).view(shape),
        }
    return state


def decode(value):
    """What JSON has no word for: tensors, tuples, ordered dicts."""
    if isinstance(value, list):
        return [decode(each) for each in value]
    if not isinstance(value, dict):
        return value
    if "~tensor" in value:
        return torch.tensor(value["~tensor"], dtype=getattr(torch, value["dtype"]))
    if "~tuple" in value:
        return tuple(decode(each) for each in value["~tuple"])
    if "~ordered" in value:
        return OrderedDict((key, decode(each)) for key, each in value["~ordered"])
    return {key: decode(each) for key, each in value.items()}
