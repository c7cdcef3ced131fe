"""Text of one language, with a label for each sentence, as fairseq's other tasks read it."""

from support import commands
from support.commands import EVERY_SENTENCE, PACKAGE, SENTENCES, flags

ROBERTA = {
    "arch": "switch_roberta_tiny",
    "encoder-layers": 2,
    "encoder-embed-dim": 32,
    "encoder-ffn-embed-dim": 64,
    "encoder-attention-heads": 2,
    "max-positions": 16,
}
LANGUAGE_MODEL = {
    "arch": "switch_transformer_lm_demo",
    "decoder-layers": 2,
    "decoder-embed-dim": 32,
    "decoder-ffn-embed-dim": 64,
    "decoder-attention-heads": 2,
}
SENTENCE_BY_SENTENCE = {"tokens_per_sample": 16, "sample_break_mode": "eos"}
MASKED = {
    "arch": ROBERTA,
    "task": "masked_lm",
    "criterion": {"criterion": "masked_lm_with_routing"},
    **SENTENCE_BY_SENTENCE,
}
REPLACED = {
    **MASKED,
    "arch": {**ROBERTA, "arch": "switch_electra_tiny", "generator-embed-dim": 16},
    "leave_unmasked_prob": 0,
    "random_token_prob": 0,
    "criterion": {"criterion": "electra_with_routing"},
}
CLASSES = {
    "arch": ROBERTA,
    "task": "sentence_prediction",
    "num_classes": 2,
    "init_token": 0,
    "criterion": {"criterion": "sentence_prediction_with_routing"},
}
WORDS = {
    "arch": LANGUAGE_MODEL,
    "task": "language_modeling",
    "criterion": {"criterion": "label_smoothed_cross_entropy_with_routing"},
    **SENTENCE_BY_SENTENCE,
}


def build(server, directory):
    """``input0``, which is the data of masked_lm and language_modeling, and ``label``."""
    raw = directory / "raw"
    raw.mkdir(parents=True)
    for seed, (split, count) in enumerate(SENTENCES.items()):
        lines = commands.sentences(count, seed)["en"]
        labels = ["low" if int(line.split()[0][1:]) < 12 else "high" for line in lines]
        (raw / split).write_text("".join(f"{line}\n" for line in lines))
        (raw / f"{split}.label").write_text("".join(f"{label}\n" for label in labels))
    for folder, ending in (("input0", ""), ("label", ".label")):
        prefs = {f"{part}pref": raw / f"{part}{ending}" for part in ("train", "valid", "test")}
        prefs["testpref"] = f"{prefs['testpref']},{raw / f'test1{ending}'}"
        run(
            server,
            directory,
            "fairseq_cli.preprocess",
            *flags({"only-source": True, **prefs, "destdir": directory / folder}),
        )


def run(server, directory, module, *arguments, status=0):
    """What a command prints that ends with ``status``, a fork of the server's process."""
    log = directory / "output"
    log.unlink(missing_ok=True)
    (found,) = server.run((module, *arguments), output=log)
    text = log.read_text()
    assert found == status, text[-5000:]
    return text


def train(server, data, save_dir, *, status=0, **settings):
    """What fairseq's training prints."""
    save_dir.mkdir(parents=True, exist_ok=True)
    command = commands.train_command(data, save_dir, **settings)
    return run(server, save_dir, "fairseq_cli.train", *command, status=status)


def read(server, module, data, checkpoint, **settings):
    """What a command of fairseq prints that reads a checkpoint."""
    more = {name.replace("_", "-"): value for name, value in settings.items()}
    settings = {"batch-size": 8, "cpu": True, "log-format": "json", **EVERY_SENTENCE, **more}
    words = [data, "--user-dir", PACKAGE, "--path", checkpoint, *flags(settings)]
    return run(server, checkpoint.parent, module, *words)
