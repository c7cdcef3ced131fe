"""The tasks of GLUE (arXiv 1804.07461) as fairseq's ``sentence_prediction`` reads them.

======================================  ===========================================================
``raw/TASK/{train,valid,valid1}.*``     text of ``input0`` and ``input1``, and ``label``
``spm/``                                the model of pieces, the dictionary, and the text in pieces
``bin/TASK/{input0,input1,label}``      what fairseq fine-tunes on
``record.json``                         archives, counts, settings
======================================  ===========================================================

Pieces and dictionary are those of the corpus that the model was pre-trained on. What GLUE calls
``dev`` is ``valid``, and of MNLI ``valid`` is matched and ``valid1`` mismatched. Test sets have no
labels, and are left out.
"""

import shutil
from pathlib import Path
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

from fairseq_sparsemixer.corpora import binarise, spm
from fairseq_sparsemixer.corpora.archives import unpack
from fairseq_sparsemixer.corpora.downloads import (
    DEFAULT_SHELF,
    RemoteFile,
    Shelf,
    ShelfChoice,
    obtain,
)
from fairseq_sparsemixer.corpora.folder import CORPUS_RECORD, steps_in
from fairseq_sparsemixer.corpora.pieces import write_text
from fairseq_sparsemixer.corpora.resumable import STEPS, StepResult
from fairseq_sparsemixer.errors import UserError
from fairseq_sparsemixer.files import (
    iterate_lines,
    read_json,
    scratch_folder,
    sha256_of,
    write_json,
    write_lines,
)
from fairseq_sparsemixer.version import __version__

MEGABYTES = 2000
"""Of disk, for archives and text of all tasks; reckoned, and rather too much."""
_SERVER = "https://dl.fbaipublicfiles.com"
_MRPC = {
    "train": RemoteFile(f"{_SERVER}/senteval/senteval_data/msr_paraphrase_train.txt"),
    "dev": RemoteFile(f"{_SERVER}/glue/data/mrpc_dev_ids.tsv"),
}

Row = Dict[str, str]


class GlueTask(NamedTuple):
    """Where a task lies, and which columns of its tables are what.

    Attributes:
        archive: its name on the server; None of MRPC, which is no archive.
        folder: in the archive.
        inputs: the columns of text.
        label: the column of the class or score.
        header: the columns, where the tables do not begin with them.
        valid: the tables of development.
        largest: the largest score, where it has scores; they are divided by it.
    """

    archive: Optional[str]
    folder: str
    inputs: Tuple[str, ...]
    label: str
    header: Optional[Tuple[str, ...]] = None
    valid: Tuple[str, ...] = ("dev.tsv",)
    largest: Optional[float] = None


_PAIR = ("sentence1", "sentence2")
TASKS = {
    "CoLA": GlueTask(
        "CoLA.zip", "CoLA", ("sentence",), "label", ("source", "label", "mark", "sentence")
    ),
    "SST-2": GlueTask("SST-2.zip", "SST-2", ("sentence",), "label"),
    "MRPC": GlueTask(None, "", ("#1 String", "#2 String"), "Quality"),
    "STS-B": GlueTask("STS-B.zip", "STS-B", _PAIR, "score", largest=5.0),
    "QQP": GlueTask("QQP-clean.zip", "QQP", ("question1", "question2"), "is_duplicate"),
    "MNLI": GlueTask(
        "MNLI.zip",
        "MNLI",
        _PAIR,
        "gold_label",
        valid=("dev_matched.tsv", "dev_mismatched.tsv"),
    ),
    "QNLI": GlueTask("QNLIv2.zip", "QNLI", ("question", "sentence"), "label"),
    "RTE": GlueTask("RTE.zip", "RTE", _PAIR, "label"),
}
"""Those that are scored by published averages: without WNLI."""


def prepare_glue(
    output: Path,
    vocabulary: Path,
    *,
    tasks: Sequence[str] = tuple(TASKS),
    archives: ShelfChoice = DEFAULT_SHELF,
) -> Dict[str, Any]:
    """Build tasks of GLUE in ``output``; finished ones are skipped, and others are left alone.

    Args:
        output: folder; made if need be.
        vocabulary: folder of the corpus, made by ``prepare``, that the model was pre-trained on.
        tasks: names in :data:`TASKS`.
        archives: where they are kept, and come from.

    Returns:
        What is in ``record.json``.

    Raises:
        UserError: no pieces in ``vocabulary``; another task; no disk space; see
            :func:`.archives.unpack`; a table that is not that of the task.
    """
    for task in tasks:
        if task not in TASKS:
            raise UserError(f"--tasks {task}: GLUE has the tasks {', '.join(TASKS)}")
    names = ("spm.model", "dict.txt")
    for name in names:
        if not (vocabulary / "spm" / name).is_file():
            raise UserError(
                f"--vocabulary {vocabulary}: there is no spm/{name}; give the folder of a corpus "
                "that `fairseq-sparsemixer prepare` made with SentencePiece"
            )
    checksums = {name: sha256_of(vocabulary / "spm" / name) for name in names}
    with steps_in(output, MEGABYTES, "glue") as steps:
        others = _others(output, tasks, checksums)
        shelf = archives.shelf(output)
        (output / "spm").mkdir(exist_ok=True)
        settings = {"version": __version__, "sha256": checksums}
        steps.run("vocabulary", settings, [], lambda: _copy(vocabulary / "spm", output, names))
        made = {}
        for task in tasks:
            made[task] = steps.run(
                task,
                settings,
                [output / "spm" / name for name in names],
                lambda task=task: _build(output, task, shelf),  # type: ignore[misc]
            )
            shelf.check_made_from(made[task]["archives"], output)
        record = {
            "corpus": "glue",
            "vocabulary": {"folder": str(vocabulary), "sha256": checksums},
            "tasks": {**others, **made},
            "versions": {"fairseq-sparsemixer": __version__},
        }
        write_json(output / CORPUS_RECORD, record)
        return record


def _others(output: Path, tasks: Sequence[str], checksums: Dict[str, str]) -> Dict[str, Any]:
    """What is known of tasks that were made before and are not asked for.

    Of the records of their steps: that of the corpus is not there while anything is made.

    Raises:
        UserError: they were cut with another vocabulary, which no file of theirs tells.
    """
    cure = "name another folder with --output"
    shape = ({"made_from": {"settings": {"sha256": dict}}, "result": dict}, {"outputs": dict})
    paths = {name: output / STEPS / f"{name}.json" for name in TASKS if name not in tasks}
    records = {name: read_json(path, shape, cure) for name, path in paths.items() if path.is_file()}
    others = {name: each for name, each in records.items() if "result" in each}
    if any(each["made_from"]["settings"]["sha256"] != checksums for each in others.values()):
        raise UserError(
            f"{output} holds {', '.join(others)} in another vocabulary: {cure}, or make them anew, "
            "too, with --tasks"
        )
    return {name: each["result"] for name, each in others.items()}


def _copy(source: Path, output: Path, names: Sequence[str]) -> StepResult:
    for name in names:
        shutil.copyfile(source / name, output / "spm" / name)
    return [output / "spm" / name for name in names], {}


def _build(folder: Path, name: str, shelf: Shelf) -> StepResult:
    """From the archive to ``bin/`` of one task."""
    import sentencepiece

    task = TASKS[name]
    with scratch_folder(folder / f".{name}.partial") as scratch:
        tables, archives = (_of_archive if task.archive else _mrpc)(task, shelf, scratch)
        outputs, sentences = _write_raw(folder / "raw" / name, tables, task)
    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "spm" / "spm.model"))
    vocabulary = {line.rpartition(" ")[0] for line in iterate_lines(folder / "spm" / "dict.txt")}
    unknown = 0
    for number in range(len(task.inputs)):
        column = f"input{number}"
        for split in sentences:
            path = folder / "spm" / name / f"{split}.{column}"
            cut = spm.encode(model, folder / "raw" / name / path.name, threads=1)
            unknown += write_text(path, cut).describe(vocabulary)["unknown"]
            outputs.append(path)
        texts = {split: f"spm/{name}/{split}.{column}" for split in sentences}
        outputs += binarise.build_one_text(folder, texts, f"bin/{name}/{column}", "spm/dict.txt")
    labels = {split: f"raw/{name}/{split}.label" for split in sentences}
    if task.largest is None:
        outputs += binarise.build_one_text(folder, labels, f"bin/{name}/label")
    else:
        for split, scored in labels.items():
            outputs.append(folder / "bin" / name / "label" / f"{split}.label")
            scores = (float(line) / task.largest for line in iterate_lines(folder / scored))
            write_lines(outputs[-1], map(str, scores))
    return outputs, {"archives": archives, "sentences": sentences, "unknown": unknown}


Tables = Dict[str, Iterator[Row]]
"""By the name that fairseq gives a part: train, valid, valid1."""


def _of_archive(task: GlueTask, shelf: Shelf, scratch: Path) -> Tuple[Tables, Dict[str, Any]]:
    """The tables of an archive, and what is recorded of it."""
    remote = RemoteFile(f"{_SERVER}/glue/data/{task.archive}")
    names = ("train.tsv", *task.valid)
    members = {f"{task.folder}/{name}": scratch / name for name in names}
    unpack(remote, members, shelf, MEGABYTES)
    splits = ("train", "valid", "valid1")
    tables = {split: _rows(scratch / name, task) for split, name in zip(splits, names)}
    return tables, {remote.name: shelf.checksums.entries[remote.name]}


def _mrpc(task: GlueTask, shelf: Shelf, scratch: Path) -> Tuple[Tables, Dict[str, Any]]:
    """Those of MRPC: GLUE took its development set out of the training text, by the two numbers."""
    train, held_out = (obtain(remote, shelf) for remote in (_MRPC["train"], _MRPC["dev"]))
    for remote, path in ((_MRPC["train"], train), (_MRPC["dev"], held_out)):
        shelf.checksums.record(remote, path)
    valid = {tuple(line.split("\t")) for line in iterate_lines(held_out)}

    def part(of_valid: bool) -> Iterator[Row]:
        for row in _rows(train, task):
            if ((row["#1 ID"], row["#2 ID"]) in valid) == of_valid:
                yield row

    entries = shelf.checksums.entries
    archives = {remote.name: entries[remote.name] for remote in _MRPC.values()}
    return {"train": part(False), "valid": part(True)}, archives


def _rows(path: Path, task: GlueTask) -> Iterator[Row]:
    """The rows of a table; what has another number of columns (some of QQP) is left out.

    Raises:
        UserError: it lacks a column of the task.
    """
    lines = iterate_lines(path)
    header = task.header or next(lines, "").split("\t")
    for column in (*task.inputs, task.label):
        if column not in header:
            raise UserError(
                f"{path.name} is not the published table: it has no column {column!r}; remove the "
                "archive and run the command again"
            )
    for line in lines:
        cells = line.split("\t")
        if len(cells) == len(header):
            yield dict(zip(header, cells))


def _write_raw(folder: Path, tables: Tables, task: GlueTask) -> Tuple[List[Path], Dict[str, int]]:
    """Write a file for each column; the files, and how many lines each part has."""
    outputs, sentences = [], {}
    for split, table in tables.items():
        rows = list(table)
        if not rows:
            raise UserError(
                f"the table {split} of {folder.name} has no row of as many columns as it has "
                "names; remove the archive and run the command again"
            )
        sentences[split] = len(rows)
        for number, column in enumerate(task.inputs):
            outputs.append(folder / f"{split}.input{number}")
            write_lines(outputs[-1], (row[column] for row in rows))
        outputs.append(folder / f"{split}.label")
        write_lines(outputs[-1], (row[task.label] for row in rows))
    return outputs, sentences
