"""Checkpoints that try to run code or to take all memory, made from a good one.

Each that tries to run code writes the file :data:`CANARY` names, in the folder where it runs.
"""

import argparse
import copy
import io
import pickle
import zipfile
from pathlib import Path

import torch

CANARY = "code_was_run"
EVAL = f"__import__('pathlib').Path('{CANARY}').touch() or [(8, 3)] * 2"


class RunsWhenUnpickled:
    def __reduce__(self):
        return exec, (f"open('{CANARY}', 'w').close()",)


def _settings(state, part):
    """A part of the configuration, as a dict that can be written to."""
    settings = state["cfg"][part]
    return vars(settings) if isinstance(settings, argparse.Namespace) else settings


def _with(part, **changes):
    def change(state):
        _settings(state, part).update(changes)

    return change


def _named(part, name, **changes):
    """Another class of fairseq, with its settings."""

    def change(state):
        keys = {"_name": name, ("arch" if part == "model" else part): name}
        state["cfg"][part] = {**(state["cfg"][part] or {}), **keys, **changes}

    return change


def _old_style(**changes):
    """The flags of all parts in one, as fairseq wrote them before 0.10."""

    def change(state):
        flat = {}
        for settings in state["cfg"].values():
            flat.update(settings if isinstance(settings, dict) else {})
        for part in ("task", "criterion", "optimizer", "lr_scheduler"):
            flat[part] = state["cfg"][part]["_name"]
        flat["arch"] = state["cfg"]["model"]["_name"]
        state["args"], state["cfg"] = argparse.Namespace(**{**flat, **changes}), None

    return change


def _evaluated_everywhere(state):
    """A string that runs when it is evaluated, in every field of every part."""
    for settings in state["cfg"].values():
        for key in settings or {}:
            if key not in ("_name", "arch", "task"):
                settings[key] = EVAL


def _many_times(state):
    value = "x"
    for _ in range(60):
        value = [value, value]
    state["cfg"]["common"]["plasma_path"] = value


def _deep(state):
    value = "x"
    for _ in range(100):
        value = [value]
    state["cfg"]["task"]["data"] = value


FCONV = {"encoder_layers": EVAL, "decoder_layers": EVAL, "decoder_attention": EVAL}
FCONV.update(encoder_embed_dim=8, decoder_embed_dim=8, decoder_out_embed_dim=8, dropout=0.1)
NOT_PART_OF_IT = "not among those known to run no code"
NOT_DECLARED = "not of the declared type"
EVALUATED = "which fairseq would evaluate"

CHANGES = {
    "architecture that evaluates": (_named("model", "fconv", **FCONV), NOT_PART_OF_IT),
    "architecture of speech": (
        _named("model", "wav2vec2", conv_feature_layers=EVAL),
        NOT_PART_OF_IT,
    ),
    "task that starts programs": (
        _named("task", "audio_pretraining", post_save_script=f"touch {CANARY}"),
        NOT_PART_OF_IT,
    ),
    "criterion that evaluates": (_named("criterion", "ctc", wer_args=EVAL), NOT_PART_OF_IT),
    "cutoff as text": (_with("model", adaptive_softmax_cutoff=EVAL), NOT_DECLARED),
    "attention of xformers": (_with("model", encoder_xformers_att_config=EVAL), EVALUATED),
    "attention without its side": (_with("model", xformers_att_config=EVAL), EVALUATED),
    "nested encoder": (
        _with("model", encoder={"xformers_att_config": EVAL}),
        "no plain value|would evaluate",
    ),
    "every field": (_evaluated_everywhere, "declared type|would evaluate"),
    "data of a kind read by a shell": (
        _with("task", dataset_impl="fasta", data=f"; touch {CANARY};"),
        "starts programs",
    ),
    "old arguments": (_old_style(adaptive_softmax_cutoff=EVAL), NOT_DECLARED),
    "old arguments of another architecture": (_old_style(arch="fconv", **FCONV), NOT_PART_OF_IT),
    "old arguments that leave their quotes": (
        _old_style(data=f"\\',x:${{oc.env:HOME}},y:'{EVAL}"),
        "no plain value|declared type",
    ),
    "resolver": (_with("task", data="${oc.env:HOME}"), "declared type"),
    "reference to itself": (_with("task", data="${task.data}"), "declared type"),
    "unknown architecture": (_named("model", "nowhere"), "is not registered"),
    "100,000 layers": (_with("model", encoder_layers=100_000, decoder_layers=100_000), "larger"),
    "10**12 layers": (_with("model", encoder_layers=10**12), "larger"),
    "10**9 wide": (_with("model", encoder_embed_dim=10**9, decoder_embed_dim=10**9), "larger"),
    "2**20 wide": (
        _with("model", encoder_ffn_embed_dim=2**20, decoder_ffn_embed_dim=2**20),
        "larger",
    ),
    "2**20 experts": (_with("model", num_experts=2**20), "larger"),
    "10**6 positions": (
        _with("task", max_source_positions=10**6),
        None,
    ),
    "one list many times": (_many_times, "larger than any"),
    "deep lists": (_deep, "larger than any"),
    "text in place of a number": (_with("model", dropout="much"), NOT_DECLARED),
    "a mapping in place of a number": (_with("model", encoder_layers={"a": 1}), NOT_DECLARED),
    "no model in cfg": (lambda state: state["cfg"].pop("model"), "names no model"),
    "no cfg": (lambda state: state.update(cfg=None, args=None), "neither cfg nor args"),
    "no model": (lambda state: state.pop("model"), "has no model"),
    "user_dir": (_with("common", user_dir="hostile_user_dir"), None),
}
"""By name: what is done to the state, and what the refusal says; None where it is harmless."""


def _state(path):
    return copy.deepcopy(torch.load(path, map_location="cpu", weights_only=True))


def _rewritten(path, change):
    """The bytes of an archive with ``change(name, data)`` in place of each record."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(buffer, "w") as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))
    return buffer.getvalue()


def _pickled_with_code(good):
    state = {**_state(good), "more": RunsWhenUnpickled()}
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def _legacy(good):
    buffer = io.BytesIO()
    torch.save({**_state(good), "more": RunsWhenUnpickled()}, buffer,
               _use_new_zipfile_serialization=False)  # fmt: skip
    return buffer.getvalue()


class _Program(torch.nn.Module):
    def forward(self, x):
        return x + 1


def _torchscript(good):
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(_Program()), buffer)
    return buffer.getvalue()


def _compressed(good):
    """A record of 2 GB in 2 MB."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(good) as old, zipfile.ZipFile(buffer, "w") as new:
        for name in old.namelist():
            if name.endswith("/data/0"):
                with new.open(zipfile.ZipInfo(name), "w", force_zip64=True):
                    pass
                info = zipfile.ZipInfo(name.replace("/data/0", "/data/zeros"))
                info.compress_type = zipfile.ZIP_DEFLATED
                with new.open(info, "w", force_zip64=True) as record:
                    for _ in range(2000):
                        record.write(bytes(1 << 20))
            new.writestr(name.replace("/data/0", "/data/00"), old.read(name))
    return buffer.getvalue()


def _claims_more(good):
    """Each storage of 32 elements claims to hold 2**30."""

    def change(name, data):
        return data.replace(b"K ", b"J\0\0\0\x40") if name.endswith("data.pkl") else data

    return _rewritten(good, change)


def _bytearray(good):
    """A pickle that asks for 30 GB of zeros."""

    def change(name, data):
        if not name.endswith("data.pkl"):
            return data
        return (
            b"\x80\x02cbuiltins\nbytearray\n\x8a\x05" + (30 << 30).to_bytes(5, "little") + b"\x85R."
        )

    return _rewritten(good, change)


FILES = {
    "pickle that runs code": (_pickled_with_code, r"holds code \(builtins?\.exec\)|__builtin__"),
    "bare pickle": (lambda good: pickle.dumps(RunsWhenUnpickled()), "is a pickle and no archive"),
    "pickle of old torch": (_legacy, "is a pickle and no archive"),
    "TorchScript": (_torchscript, "is a TorchScript archive"),
    "compressed record": (_compressed, "claim more bytes"),
    "storage that is too small": (_claims_more, "claims more elements|of another size"),
    "room for a byte array": (_bytearray, r"holds code \(builtins.bytearray\)"),
    "text": (lambda good: b"Dear reader,\n", "is not a checkpoint of fairseq"),
    "nothing": (lambda good: b"", "is not a checkpoint of fairseq"),
    "half of it": (lambda good: good.read_bytes()[: good.stat().st_size // 2], "is damaged"),
}
"""By name: what makes the bytes of the file from a good one, and what the refusal says."""

KINDS = [*CHANGES, *FILES]


def write(kind, good, path):
    """Write the checkpoint of a kind to ``path``; what its refusal has to say, if refused."""
    if kind in FILES:
        make, message = FILES[kind]
        Path(path).write_bytes(make(Path(good)))
    else:
        change, message = CHANGES[kind]
        state = _state(good)
        change(state)
        torch.save(state, path)
    return message


def write_field(good, path, part, key, value):
    """Write a checkpoint in which one field of the configuration has another value."""
    state = _state(good)
    _settings(state, part)[key] = value
    torch.save(state, path)
