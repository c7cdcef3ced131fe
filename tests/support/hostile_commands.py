"""Every command that loads a checkpoint, each in a process of its own that is watched.

  python hostile_commands.py CORPUS GOOD_RUN STUDY FOLDER [KIND ...]

prints a line of JSON for each command and kind of :mod:`support.hostile`: whether its code ran, the
exit status, how much memory it took beyond that of a good checkpoint, and what it said. All is
imported once; each command runs in a fork.
"""

import html
import json
import os
import re
import resource
import runpy
import shutil
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch

import fairseq_sparsemixer
from fairseq_sparsemixer import cli
from fairseq_sparsemixer.files import sha256_of
from support import hostile
from support.forks import status_of
from support.small_run import MAX_POSITIONS

USER_DIR = ["--user-dir", str(Path(fairseq_sparsemixer.__file__).parent)]
NAME = "checkpoint_best.pt"
SCORED = "sparsemixer-4-seed1"
"""The run of the study whose checkpoint the report loads."""
OURS = (
    "translate", "evaluate", "baseline", "gradients", "report", "average", "best", "ensemble",
    "upcycle", "prune",
)  # fmt: skip


def commands(corpus, good, study, file):
    """{name: (module or None for ours, arguments)}; each loads ``file``, NAME in a run folder."""
    run, bin_folder = file.parent, corpus / "bin"
    every = ["--required-batch-size-multiple", "1", "--cpu"]
    train = ["--arch", "switch_transformer_demo", "--num-experts", "4", "--router", "sparsemixer",
             "--share-all-embeddings", "--optimizer", "adam", "--lr", "0.01",
             "--max-tokens", "1000", "--max-update", "2", "--save-dir", "saved",
             "--no-progress-bar", "--num-workers", "0", "--disable-validation", "--no-save",
             "--max-source-positions", str(MAX_POSITIONS),
             "--max-target-positions", "40"]  # fmt: skip
    for side in ("encoder", "decoder"):
        for name, value in (("layers", 1), ("embed-dim", 32), ("ffn-embed-dim", 64)):
            train += [f"--{side}-{name}", str(value)]
        train += [f"--{side}-attention-heads", "2"]
    text = ["--source", str(corpus / "raw" / "test.en"), "--reference"]
    text += [str(corpus / "raw" / "test.de"), "--output", "scores.json"]
    data = ["--data", str(corpus)]
    return {
        "translate": (None, ["translate", run, *data, "--input", corpus / "raw" / "test.en"]),
        "ensemble": (None, ["translate", f"{good}:{file}", *data,
                            "--input", corpus / "raw" / "test.en"]),
        "evaluate": (None, ["evaluate", run, *data, *text]),
        "baseline": (None, ["evaluate", good.parent, *data, *text, "--baseline", run]),
        "gradients": (None, ["gradients", run, *data, "--tokens", "8", "--output", "gradients"]),
        "report": (None, ["report", study, "--output", "report.html"]),
        "average": (None, ["average", "--inputs", good, file, "--output", "mean.pt"]),
        "upcycle": (None, ["upcycle", file, "--experts", "2", "--output", "up.pt"]),
        "prune": (None, ["prune", run, *data, "--sentences", "2", "--beam", "1"]),
        "best": (None, ["average", "--inputs", run, "--best", "2", "--output", "mean.pt"]),
        "from_pretrained": ("from_pretrained", [run, NAME, bin_folder]),
        "generate": ("fairseq_cli.generate", [bin_folder, *USER_DIR, "--path", file, *every]),
        "interactive": ("fairseq_cli.interactive", [bin_folder, *USER_DIR, "--path", file, "--cpu",
                                                    "--input", corpus / "pieces" / "test.en"]),
        "validate": ("fairseq_cli.validate", [bin_folder, *USER_DIR, "--path", file, *every,
                                              "--task", "translation", "--max-tokens", "1000"]),
        "restore": ("fairseq_cli.train", [bin_folder, *USER_DIR, "--restore-file", file, *train,
                                          *every]),
        "finetune": ("fairseq_cli.train", [bin_folder, *USER_DIR, "--finetune-from-model", file,
                                           *train, *every]),
    }  # fmt: skip


def from_pretrained(run, name, data):
    from fairseq_sparsemixer.models import SwitchTransformerModel

    model = SwitchTransformerModel.from_pretrained(run, name, data)
    model.translate("the red house")


def _in_child(module, arguments, folder, said):
    os.chdir(folder)
    descriptor = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    os.close(0)
    # What would be taken without a bound ends here, rather than the machine.
    resource.setrlimit(resource.RLIMIT_DATA, (12 << 30, 12 << 30))
    sys.argv = [str(module), *map(str, arguments)]
    if module is None:
        return cli.main(sys.argv[1:])
    if module == "from_pretrained":
        from_pretrained(*sys.argv[1:])
    else:
        runpy.run_module(module, run_name="__main__")
    return 0


def run(module, arguments, folder):
    """Run a command in a fork, in ``folder``; (exit status, peak in MiB, what it said)."""
    said = folder / "said"
    child = os.fork()
    if not child:
        status = 1
        try:
            status = status_of(lambda: _in_child(module, arguments, folder, said))
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    _, status, usage = os.wait4(child, 0)
    return os.waitstatus_to_exitcode(status), usage.ru_maxrss // 1024, said.read_text()


def _replace_scored(run_folder, file):
    """Put ``file`` where the checkpoint was that a run's scores are of, and let them be of it."""
    shutil.copy(file, run_folder / "checkpoint_last.pt")
    (run_folder / "evaluation" / "routing.json").unlink(missing_ok=True)
    for path in (run_folder / "evaluation").glob("*.json"):
        scores = json.loads(path.read_text())
        scores["checkpoints"][0]["sha256"] = sha256_of(file)
        path.write_text(json.dumps(scores))


def trial(kind, name, corpus, good, study, folder):
    """One command on one kind, as a mapping."""
    place = Path(tempfile.mkdtemp(dir=folder))
    (place / "run").mkdir()
    file = place / "run" / NAME
    message = None
    if kind is None:
        shutil.copy(good, file)
    else:
        message = hostile.write(kind, good, file)
    own_study = place / "study"
    if name == "report":
        shutil.copytree(study, own_study)
        _replace_scored(own_study / SCORED, file)
    if name == "best":
        for value in ("1.000", "2.000"):
            shutil.copy(file, place / "run" / f"checkpoint.best_loss_{value}.pt")
    module, arguments = commands(corpus, good, own_study, file)[name]
    begin = time.perf_counter()
    status, peak, said = run(module, arguments, place)
    page = place / "report.html"
    if page.is_file():  # which says what it could not find out, and why
        pattern = r"cannot read the checkpoint [^<]*"
        said += "".join(f"\nerror: {text}" for text in set(re.findall(pattern, page.read_text())))
    result = {
        "kind": kind, "command": name, "status": status, "peak": peak,
        "ran": any(place.rglob(hostile.CANARY)), "message": message, "said": said[-3000:],
        "seconds": round(time.perf_counter() - begin, 1),
    }  # fmt: skip
    shutil.rmtree(place)
    return result


NOTHING_BUILT = ("average", "best", "restore", "finetune")
"""They build no model from a checkpoint's configuration, which may then ask for a large one."""
MORE_MEMORY = 400
"""MiB that a command may take beyond what it takes for a good checkpoint."""


def check(trial, usual):
    """Raise AssertionError unless a trial of a hostile checkpoint ended as it should.

    Args:
        trial: what :func:`trial` returned.
        usual: the peak of the same command for a good checkpoint, in MiB.
    """
    name, said = trial["command"], trial["said"]
    assert not trial["ran"], "its code ran"
    assert trial["peak"] < usual + MORE_MEMORY, "it took more memory"
    harmless = trial["message"] is None or (name in NOTHING_BUILT and trial["status"] == 0)
    if harmless:
        return
    errors = [line for line in said.splitlines() if "error: " in line]
    assert len(errors) == 1 and "Traceback" not in said, said
    assert re.search(trial["message"], html.unescape(errors[0])), said
    expected = 0 if name == "report" else 2 if name in OURS else 1
    assert trial["status"] == expected, trial["status"]


def main(corpus, good_run, study, folder, *kinds):
    torch.set_num_threads(1)
    import fairseq_cli.generate
    import fairseq_cli.interactive
    import fairseq_cli.train
    import fairseq_cli.validate  # noqa: F401

    corpus, good, study, folder = map(Path, (corpus, f"{good_run}/{NAME}", study, folder))
    for kind in [None, *(kinds or hostile.KINDS)]:
        for name in commands(corpus, good, study, Path("x", NAME)):
            if name == "report" and not study.is_dir():
                continue
            try:
                result = trial(kind, name, corpus, good, study, folder)
            except Exception:
                result = {"kind": kind, "command": name, "failed": traceback.format_exc()}
            print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
