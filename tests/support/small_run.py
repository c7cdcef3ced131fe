"""A corpus in a toy language and a small model trained on it, with fairseq's own commands."""

import os
import random
import subprocess
import sys
from pathlib import Path

import sentencepiece

import fairseq_sparsemixer
from fairseq_sparsemixer.files import read_lines, write_lines

LEXICON = {
    "the": "das", "a": "ein", "red": "rote", "blue": "blaue", "old": "alte", "new": "neue",
    "house": "Haus", "car": "Auto", "book": "Buch", "lamp": "Licht", "is": "ist", "was": "war",
    "here": "hier", "there": "dort", "not": "nicht", "and": "und",
}  # fmt: skip
MAX_POSITIONS = 30
USER_DIR = ["--user-dir", Path(fairseq_sparsemixer.__file__).parent]


def sentences(count, seed):
    """Word-for-word pairs of a toy language: even a model of a few updates tells them apart."""
    rng = random.Random(seed)
    sources = [rng.choices(list(LEXICON), k=rng.randint(2, 9)) for _ in range(count)]
    return (
        [" ".join(words) for words in sources],
        [" ".join(LEXICON[word] for word in words) for words in sources],
    )


def python(*arguments, **options):
    """Run a module; its stdout. The error output is shown where it fails."""
    result = subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        **options,
    )
    assert result.returncode == 0, result.stderr.decode()[-4000:]
    return result.stdout.decode()


def build_corpus(root):
    """A prepared corpus: raw/, bin/, copy/ and record.json, as ``prepare`` leaves it."""
    for folder in ("raw", "bin", "copy", "pieces"):
        (root / folder).mkdir(parents=True)
    for seed, (split, count) in enumerate([("train", 300), ("valid", 20), ("test", 21)]):
        for language, lines in zip(("en", "de"), sentences(count, seed)):
            write_lines(root / "raw" / f"{split}.{language}", lines)
    model = root / "bin" / "sentencepiece.bpe.model"
    sentencepiece.SentencePieceTrainer.train(
        input=[str(root / "raw" / f"train.{language}") for language in ("en", "de")],
        model_prefix=str(model)[: -len(".model")],
        vocab_size=60,
        model_type="bpe",
        minloglevel=2,
    )
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(model))
    for split in ("train", "valid", "test"):
        for language in ("en", "de"):
            lines = read_lines(root / "raw" / f"{split}.{language}")
            encoded = [" ".join(pieces.encode(line, out_type=str)) for line in lines]
            write_lines(root / "pieces" / f"{split}.{language}", encoded)
    prefixes = [f"--{split}pref={root / 'pieces' / split}" for split in ("train", "valid", "test")]
    python(
        "-m", "fairseq_cli.preprocess", "-s", "en", "-t", "de", "--joined-dictionary",
        *prefixes, "--destdir", root / "bin",
    )  # fmt: skip
    copied = read_lines(root / "raw" / "train.de")[:21]
    write_lines(root / "copy" / "test.de", copied)


def train(corpus, folder):
    """150 updates of a Switch Transformer: checkpoints by update, by epoch and by loss."""
    python(
        "-m", "fairseq_cli.train", corpus / "bin", "--cpu", *USER_DIR,
        "--arch", "switch_transformer_demo", "--num-experts", 4, "--router", "sparsemixer",
        "--task", "translation", "--share-all-embeddings", "--encoder-layers", 1,
        "--decoder-layers", 1, "--encoder-embed-dim", 32, "--decoder-embed-dim", 32,
        "--encoder-ffn-embed-dim", 64, "--decoder-ffn-embed-dim", 64,
        "--encoder-attention-heads", 2, "--decoder-attention-heads", 2, "--dropout", 0,
        "--optimizer", "adam", "--lr", 0.01, "--max-tokens", 1000, "--max-update", 150,
        "--required-batch-size-multiple", 1, "--max-source-positions", MAX_POSITIONS,
        "--max-target-positions", 40, "--save-interval", 9, "--validate-interval", 9,
        "--save-interval-updates", 50, "--keep-best-checkpoints", 2, "--save-dir", folder,
        "--no-progress-bar", "--num-workers", 0,
    )  # fmt: skip
