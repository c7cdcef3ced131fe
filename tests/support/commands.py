"""Running fairseq's command lines on a toy corpus, and reading what they print and write.

Everything that is expensive is built once for a test session, shared by the workers of xdist.
"""

import json
import os
import random
import shutil
import struct
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from filelock import FileLock

import fairseq_sparsemixer
from fairseq_sparsemixer import cli

PACKAGE = Path(fairseq_sparsemixer.__file__).parent
TIMEOUT_SECONDS = 300

# Word for word, reversible; half of the words become two tokens, so that the two languages have
# vocabularies of different sizes.
LEXICON = {f"e{i}": f"d{i}" if i < 12 else f"d{i} s{i}" for i in range(24)}
SENTENCES = {"train": 400, "valid": 29, "test": 25, "test1": 12}

SIZE = {
    "arch": "switch_transformer_demo",
    "encoder-layers": 2,
    "decoder-layers": 2,
    "encoder-embed-dim": 32,
    "encoder-ffn-embed-dim": 64,
    "encoder-attention-heads": 2,
    "decoder-attention-heads": 2,
    "num-experts": 4,
    "router": "sparsemixer",
}
CRITERION = {"criterion": "label_smoothed_cross_entropy_with_routing", "label-smoothing": 0.1}
ADAM = {
    "optimizer": "adam",
    "lr": 0.01,
    "lr-scheduler": "inverse_sqrt",
    "warmup-updates": 20,
    "dropout": 0.1,
}
EVERY_SENTENCE = {"required-batch-size-multiple": 1}
RUN = {
    "max-tokens": 400,
    **EVERY_SENTENCE,
    "cpu": True,
    "num-workers": 0,
    "log-format": "json",
    "log-interval": 1,
}


def flags(settings):
    """Command line of {"flag": value}; True is a bare flag, None no flag."""
    words = []
    for name, value in settings.items():
        if value is not None:
            words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return words


# What is started in the background ignores SIGINT, and so does what it starts: also these tests.
HEAR_INTERRUPTIONS = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"


def start(module, *arguments, prelude=None, cwd=None):
    """Start a module, or the script of a path, after the statements of ``prelude`` if any."""
    how = [str(module)] if isinstance(module, Path) else ["-m", module]
    if prelude is not None:
        run_module = f"import runpy; runpy.run_module({module!r}, run_name='__main__')"
        how = ["-c", f"{prelude}\n{run_module}"]
    return subprocess.Popen(
        [sys.executable, *how, *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    )


def finish(*processes):
    """Wait for processes that were started together; a CompletedProcess for each."""
    # One thread for each: two workers that talk to each other must both be read.
    with ThreadPoolExecutor(len(processes)) as pool:
        return list(pool.map(_finish, processes))


def _finish(process):
    try:
        output, errors = process.communicate(timeout=TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        output, errors = process.communicate()
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def run(module, *arguments, **options):
    """Run ``python -m MODULE`` to its end, which must be a good one."""
    (result,) = finish(start(module, *arguments, **options))
    return checked(result)


def checked(result):
    """``result``, of a command that must have ended well."""
    tails = (result.stdout[-3000:], result.stderr[-3000:])
    assert result.returncode == 0, "\n".join([" ".join(result.args), *tails])
    return result


def train_command(data, save_dir, *, arch=SIZE, criterion=CRITERION, optimizer=ADAM, **more):
    """Arguments of ``fairseq_cli.train``; ``more`` with _ for -."""
    more = {name.replace("_", "-"): value for name, value in more.items()}
    settings = {**arch, **criterion, **optimizer, **RUN, "save-dir": save_dir, **more}
    return [data, "--user-dir", PACKAGE, *flags(settings)]


def train(data, save_dir, **settings):
    """Train; see :func:`train_command`."""
    return run("fairseq_cli.train", *train_command(data, save_dir, **settings))


def logged(output, tag):
    """What fairseq logged as JSON under ``tag``: a list of dicts with names free of the tag."""
    entries = []
    for line in output.splitlines():
        # "... | INFO | tag | {...}", and under hydra "[...][tag][INFO] - {...}"
        head, brace, rest = line.partition('{"')
        if brace and (f"| {tag} |" in head or f"[{tag}]" in head):
            # fairseq writes null for what it has no value of, such as a layer left out by LayerDrop
            values = {k: v for k, v in json.loads(brace + rest).items() if v is not None}
            entries.append({key.removeprefix(f"{tag}_"): float(values[key]) for key in values})
    assert entries, f"nothing logged for {tag}:\n{output[-3000:]}"
    return entries


def without_clock(entry):
    """A log entry without what differs between two equal runs."""
    return {k: v for k, v in entry.items() if k not in ("wps", "ups", "wall", "train_wall")}


def load(path):
    """A checkpoint."""
    return torch.load(path, map_location="cpu", weights_only=True)


def parameters(path):
    """The model's tensors in a checkpoint."""
    return load(path)["model"]


def printed(output, kind):
    """{sentence number: columns} of generate's and interactive's "KIND-number<TAB>columns"."""
    rows = (line.split("\t") for line in output.splitlines() if line.startswith(f"{kind}-"))
    return {int(name.split("-")[1]): columns for name, *columns in rows}


def hypotheses(output):
    """{sentence number: text} of the best hypotheses."""
    return {number: text for number, (_, text) in printed(output, "H").items()}


def positional_scores(output):
    """{sentence number: [log2 of the probability of each token]}."""
    rows = printed(output, "P").items()
    return {number: [float(score) for score in scores.split()] for number, (scores,) in rows}


def events(directory):
    """{tag: [(step, value)]} of the TensorBoard event files of a directory."""
    from tensorboardX.proto.event_pb2 import Event

    values = {}
    for path in sorted(directory.glob("*tfevents*")):
        data = path.read_bytes()
        while data:
            # a record: length (8 bytes), its checksum (4), the event, its checksum (4)
            (length,) = struct.unpack("<Q", data[:8])
            event = Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]
            for value in event.summary.value:
                values.setdefault(value.tag, []).append((event.step, value.simple_value))
    return values


def sentences(count, seed):
    """``count`` sentences in the two toy languages."""
    rng = random.Random(seed)
    sources = [rng.choices(list(LEXICON), k=rng.randint(2, 9)) for _ in range(count)]
    return {
        "en": [" ".join(words) for words in sources],
        "de": [" ".join(LEXICON[word] for word in words) for words in sources],
    }


def build_corpus(directory):
    """``raw`` text, binarised with a ``joined`` dictionary and with ``separate`` ones."""
    raw = directory / "raw"
    raw.mkdir(parents=True)
    for seed, (split, count) in enumerate(SENTENCES.items()):
        for language, lines in sentences(count, seed).items():
            (raw / f"{split}.{language}").write_text("".join(f"{line}\n" for line in lines))
    common = {
        "source-lang": "en",
        "target-lang": "de",
        "trainpref": raw / "train",
        "validpref": raw / "valid",
        "testpref": f"{raw / 'test'},{raw / 'test1'}",
    }
    processes = [
        start("fairseq_cli.preprocess", *flags({**common, **more, "destdir": directory / name}))
        for name, more in (("joined", {"joined-dictionary": True}), ("separate", {}))
    ]
    for result in finish(*processes):
        checked(result)


class Shared:
    """Directories that are built once for a test session, whichever worker comes first."""

    def __init__(self, root):
        root.mkdir(exist_ok=True)
        self.root = root

    def directory(self, name, build):
        """The directory ``name``, filled by ``build(directory)``."""
        directory, done = self.root / name, self.root / f"{name}.done"
        with FileLock(f"{directory}.lock"):
            if not done.exists():
                shutil.rmtree(directory, ignore_errors=True)
                build(directory)
                done.touch()
        return directory


def parse(name, *arguments):
    """The flags of a sub-command."""
    return cli.build_parser().parse_args([name, *map(str, arguments)])


def command(name, *arguments):
    """Run a sub-command in this process; a UserError comes through."""
    args = parse(name, *arguments)
    args.run(args)
