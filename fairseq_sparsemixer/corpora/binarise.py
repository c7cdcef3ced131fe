"""fairseq's binary data from text in pieces."""

import shutil
import struct
from pathlib import Path
from types import MappingProxyType
from typing import List, Mapping, Optional

from fairseq_sparsemixer.corpora.folder import SPLITS, Languages, count_lines, piece_path
from fairseq_sparsemixer.corpora.resumable import StepResult
from fairseq_sparsemixer.corpora.subprocesses import ProgramError, run_python
from fairseq_sparsemixer.corpora.workers import useful_workers
from fairseq_sparsemixer.files import atomic_path, replace_durably, scratch_folder
from fairseq_sparsemixer.text import SENTENCEPIECE_MODEL

# fairseq-preprocess cuts a file into as many parts as it has workers, and does one of them alone
# when all others are done. Small parts keep that short.
_PARTS_PER_WORKER = 4


def build_binary(
    folder: Path,
    languages: Languages,
    pieces: str = "spm",
    subwords: Mapping[str, str] = MappingProxyType({"spm/spm.model": SENTENCEPIECE_MODEL}),
    workers: Optional[int] = None,
) -> StepResult:
    """Run ``fairseq-preprocess`` with one dictionary for both languages.

    Args:
        folder: of the corpus.
        languages: source and target; of one pair of several (:func:`.folder.sides_of`).
        pieces: subfolder of the text in pieces; its ``dict.txt`` is the dictionary if there is
            one, else fairseq makes one from the training text.
        subwords: files in ``folder`` that say how to cut text, and their names in ``bin/``.
        workers: processes at most (default: the cores).

    Raises:
        RuntimeError: fairseq failed, or did not keep every sentence.
    """
    of_pair, _, source = languages[0].rpartition(".")
    target = languages[1].rpartition(".")[2]
    binary = folder / "bin"
    binary.mkdir(exist_ok=True)
    sentences = {
        split: count_lines(piece_path(folder, split, languages[0], pieces)) for split in SPLITS
    }
    command = ["-m", "fairseq_cli.preprocess", "--source-lang", source, "--target-lang", target]
    for split in SPLITS:
        name = f"{split}.{of_pair}" if of_pair else split
        command += [f"--{split}pref", f"{pieces}/{name}"]
    dictionary = folder / pieces / "dict.txt"
    if dictionary.is_file():
        command += ["--srcdict", f"{pieces}/{dictionary.name}"]
    processes = useful_workers(sentences["train"], workers)
    parts = 1 if processes == 1 else _PARTS_PER_WORKER * processes
    command += ["--joined-dictionary", "--workers", str(parts)]
    with scratch_folder(folder / ".bin.partial") as scratch:
        try:
            # From within: of a path with commas fairseq makes several.
            run_python([*command, "--destdir", scratch.name], cwd=folder)
        except ProgramError as error:
            raise RuntimeError(f"fairseq-preprocess failed:\n{error}") from error
        # Times and paths of this run; all that matters of it is in record.json.
        (scratch / "preprocess.log").unlink()
        for split in SPLITS:
            for language in (source, target):
                index = scratch / f"{split}.{source}-{target}.{language}.idx"
                if _sentences_in(index) != sentences[split]:
                    raise RuntimeError(f"{index.name}: fairseq lost or added sentences")
        outputs = []
        for path in sorted(scratch.iterdir()):
            replace_durably(path, binary / path.name)
            outputs.append(binary / path.name)
    for name, name_in_binary in subwords.items():
        outputs.append(binary / name_in_binary)
        with atomic_path(outputs[-1]) as partial:
            shutil.copyfile(folder / name, partial)
    return outputs, {}


def build_one_text(
    folder: Path, texts: Mapping[str, str], destination: str, dictionary: Optional[str] = None
) -> List[Path]:
    """Run ``fairseq-preprocess`` on one text, as fairseq's tasks without translation read it.

    Args:
        folder: in which all paths are.
        texts: of ``train``, ``valid``, ``valid1`` and so on, ``test``, in this order.
        destination: the folder to be made.
        dictionary: its own is that of the training text, without more.

    Returns:
        What was made.

    Raises:
        RuntimeError: fairseq failed, or did not keep every line.
    """
    command = ["-m", "fairseq_cli.preprocess", "--only-source"]
    for kind in SPLITS:
        files = [text for split, text in texts.items() if split.startswith(kind)]
        if files:
            command += [f"--{kind}pref", ",".join(files)]
    if dictionary is not None:
        command += ["--srcdict", dictionary]
    else:
        command += ["--padding-factor", "1"]
    target = folder / destination
    with scratch_folder(target.with_name(f".{target.name}.partial")) as scratch:
        scratch_name = scratch.relative_to(folder).as_posix()
        try:
            run_python([*command, "--destdir", scratch_name], cwd=folder)
        except ProgramError as error:
            raise RuntimeError(f"fairseq-preprocess failed:\n{error}") from error
        (scratch / "preprocess.log").unlink()
        for split, text in texts.items():
            if _sentences_in(scratch / f"{split}.idx") != count_lines(folder / text):
                raise RuntimeError(f"{destination}/{split}: fairseq lost or added lines")
        target.mkdir(exist_ok=True)
        outputs = []
        for path in sorted(scratch.iterdir()):
            outputs.append(target / path.name)
            replace_durably(path, outputs[-1])
    return outputs


def _sentences_in(index: Path) -> int:
    """The number of sentences of a fairseq ``mmap`` index: after magic (9), version, type code."""
    with index.open("rb") as file:
        return struct.unpack_from("<9sQBQ", file.read(26))[3]
