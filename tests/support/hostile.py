"""Checkpoints that try to run code or to take all memory, made from a good one.

Each that tries to run code writes the file :data:`CANARY` names, in the folder where it runs.
"""

import argparse
import copy
import io
import pickle
import struct
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


def _many_texts(state):
    state["cfg"]["common"]["seed"] = ["x" * 60_000] * 90_000


def _same_parameters(state):
    """3000 of a megabyte each, which are one."""
    parameter = torch.zeros(1 << 18)
    state["model"].update((f"parameter{number}", parameter) for number in range(3000))


def _deep_state(state):
    value = "x"
    for _ in range(200):
        value = [value]
    state["extra_state"]["more"] = value


def _pieces(**settings):
    return {"_name": "sentencepiece", "sentencepiece_enable_sampling": False, **settings}


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
    "one text many times": (_many_texts, "larger than any"),
    "one parameter many times": (_same_parameters, "more often than any"),
    "deep lists beside the settings": (_deep_state, "deeper than any"),
    "embedding without end": (_with("model", encoder_embed_path="/dev/zero"), "no file that ends"),
    "pieces without end": (
        lambda state: state["cfg"].update(bpe=_pieces(sentencepiece_model="/dev/zero")),
        "no file that ends",
    ),
    "pieces from elsewhere": (
        lambda state: state["cfg"].update(bpe=_pieces(sentencepiece_model="http:/0.0.0.0/m")),
        "would fetch",
    ),
    "words from a device": (_with("generation", replace_unk="/dev/zero"), "no file that ends"),
    "10**9 tokens of padding": (_with("task", required_seq_len_multiple=10**9), "larger than any"),
    "old arguments with a program for hydra": (
        _old_style(scoring="shuffle(range(1,9))"),
        "which is no name",
    ),
    "parameter that is none": (
        lambda state: state["model"].update({"encoder.embed_tokens.weight": 5}),
        "is no parameter",
    ),
    "extra state that is none": (lambda state: state.update(extra_state=5), "extra_state is none"),
    "history that is none": (lambda state: state.update(optimizer_history=5), "history is none"),
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


def _in_one_folder(path, padding):
    """The records of an archive, its directory and what ends it."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(buffer, "w") as new:
        for name in old.namelist():
            inner = name.partition("/")[2]
            new.writestr(zipfile.ZipInfo(f"x/{inner}"), old.read(name))
        new.writestr(zipfile.ZipInfo("x/padding"), bytes(padding))
        start = new.start_dir
    return buffer.getvalue()[:start], buffer.getvalue()[start:-22], buffer.getvalue()[-22:]


def _two_directories(good):
    """Python's reader takes the directory before the end, torch's that which the end names."""
    bad = Path(good).with_name("architecture_that_evaluates.pt")
    write("architecture that evaluates", good, bad)
    seen, directory, _ = _in_one_folder(good, 0)
    hidden, named, end = _in_one_folder(bad, 2 * len(seen))
    bad.unlink()
    moved, place = bytearray(directory), 0
    while place < len(moved):
        (offset,) = struct.unpack("<L", moved[place + 42 : place + 46])
        moved[place + 42 : place + 46] = struct.pack("<L", offset + len(hidden) - len(seen))
        place += 46 + sum(struct.unpack("<HHH", moved[place + 28 : place + 34]))
    end = end[:12] + struct.pack("<LL", len(named), len(hidden)) + end[20:]
    return hidden + named + seen + bytes(moved) + end


def _renamed(name):
    """A second pickle, under a name that readers may take for that of the first."""

    def make(good):
        buffer = io.BytesIO(good.read_bytes())
        with zipfile.ZipFile(buffer, "a") as archive:
            folder = archive.namelist()[0].partition("/")[0]
            archive.writestr(zipfile.ZipInfo("?"), pickle.dumps(RunsWhenUnpickled()))
            archive.filelist[-1].filename = f"{folder}/{name}"
        return buffer.getvalue()

    return make


# A pickle by hand.


def _text(text):
    return b"X" + struct.pack("<I", len(text)) + text.encode()


def _number(number):
    return b"\x8a\x08" + number.to_bytes(8, "little")


def _name(module, name):
    return f"c{module}\n{name}\n".encode()


def _storage(key, kind=None, elements=1):
    kind = kind or _name("torch", "FloatStorage")
    return b"(" + _text("storage") + kind + key + _text("cpu") + _number(elements) + b"tQ"


def _tensor(storage, shape):
    return (
        _name("torch._utils", "_rebuild_tensor_v2")
        + b"(" + storage + b"K\0(" + shape + b"t(" + b"K\1" * shape.count(b"K") + b"t\x89NtR"
    )  # fmt: skip


def _pairs_of_pairs():
    """A tuple of 2**60 texts, in 300 bytes."""
    return _text("x") + b"".join(bytes([ord("q"), i, ord("h"), i, 0x86]) for i in range(60))


DTYPE = _name("numpy", "dtype") + _text("f8") + b"\x85R"
NAN = b"G" + struct.pack(">d", float("nan"))
PICKLES = {
    "a text times a number": (_storage(_text("0"), _text("x" * 8), 10**10), "no storage"),
    "one record under many keys": (
        b"(" + b"".join(_tensor(_storage(NAN), b"K\1") for _ in range(3)) + b"t", "no storage"
    ),
    "a shape of text": (_tensor(_storage(_text("0")), _text("K" * 9) + b"M\xff\xff"), "is none"),
    "a shape of a million sides": (
        _tensor(_storage(_text("0")), b"\x8a\xff" + b"\x7f" * 255 + b"q\0" + b"h\0K\1" * 10**6),
        "more dimensions",
    ),
    "a type without end": (_name("numpy", "dtype") + _pairs_of_pairs() + b"\x85R", "no numbers"),
    "a key without end": (_storage(_pairs_of_pairs()), "no storage"),
    "a mapping that hashes without end": (b"}" + _pairs_of_pairs() + b"Ns", "mapping with the key"),
    "a mapping of numbers with one hash": (
        b"}(" + b"".join(_number(i * (2**61 - 1)) + b"N" for i in (1, 2, 3)) + b"u",
        "mapping with the key",
    ),
    "an order without end": (DTYPE + b"(K\3" + _pairs_of_pairs() + b"NNNtb", "no such order"),
    "lists of nothing": (
        _name("numpy.core.multiarray", "_reconstruct") + b")R(K\1(" + _number(10**9) + b"K\0t"
        + DTYPE + b"\x89" + _name("_codecs", "encode") + _text("") + _text("latin1")
        + b"\x86Rtb", "has no model",
    ),
    "a text encoded many times": (
        _text("x" * (1 << 20)) + b"q\0" + _name("_codecs", "encode") + b"q\1(h\1h\0"
        + _text("latin1") + b"q\2\x86R" + b"h\1h\0h\2\x86R" * 3000 + b"t",
        "more beside its tensors",
    ),
    "an attribute of millions": (
        _name("argparse", "Namespace") + b"q\0)\x81}q\1("
        + b"".join(_text(f"{i}") + b"N" for i in range(10_000)) + b"ub"
        + b"h\0)\x81h\1b" * 5000, "more beside its tensors",
    ),
    "5 million mappings": (b"(" + b"}" * 5_000_000 + b"t", "more beside its tensors"),
}  # fmt: skip
"""By name: a program for the machine that reads pickles, and what the refusal says."""

FILES = {
    "two directories": (_two_directories, "directory is not where it says"),
    "two pickles by case": (_renamed("DATA.PKL"), "two records have one name"),
    "two pickles by end": (_renamed("data.pkl\0"), "two names|one name"),
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
    if kind in PICKLES:
        program, message = PICKLES[kind]
        Path(path).write_bytes(
            _rewritten(
                good,
                lambda name, data: (
                    b"\x80\x02" + program + b"." if name.endswith("data.pkl") else data
                ),
            )
        )
    elif kind in FILES:
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
