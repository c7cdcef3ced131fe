"""Miniature archives of GLUE with the true names, columns and faults; the sentences are made up."""

import io
import random
import zipfile

from support.phrases import ADVERBS, OBJECTS, SUBJECTS, VERBS

DATA = "/glue/data"
MRPC_TRAIN = "/senteval/senteval_data/msr_paraphrase_train.txt"
MRPC_DEV = f"{DATA}/mrpc_dev_ids.tsv"
SIZES = {"train": 24, "dev": 8, "dev_matched": 8, "dev_mismatched": 6, "test": 5}
PARSES = [f"sentence{number}_{kind}" for kind in ("binary_parse", "parse") for number in (1, 2)]
HEADERS = {
    "CoLA": None,
    "SST-2": ["sentence", "label"],
    "STS-B": [
        *("index", "genre", "filename", "year", "old_index", "source1", "source2"),
        *("sentence1", "sentence2", "score"),
    ],
    "QQP": ["id", "qid1", "qid2", "question1", "question2", "is_duplicate"],
    "MNLI": ["index", "promptID", "pairID", "genre", *PARSES, "sentence1", "sentence2"],
    "QNLI": ["index", "question", "sentence", "label"],
    "RTE": ["index", "sentence1", "sentence2", "label"],
}
LABELS = {
    "CoLA": ["0", "1"],
    "SST-2": ["0", "1"],
    "MRPC": ["0", "1"],
    "QQP": ["0", "1"],
    "STS-B": ["0.000", "2.500", "5.000"],
    "MNLI": ["neutral", "entailment", "contradiction"],
    "QNLI": ["entailment", "not_entailment"],
    "RTE": ["entailment", "not_entailment"],
}
ARCHIVES = {"QQP": "QQP-clean.zip", "QNLI": "QNLIv2.zip"}


def sentence(rng):
    return " ".join(rng.choice(part)[0] for part in (SUBJECTS, VERBS, OBJECTS, ADVERBS)) + "."


def rows(task, table):
    """(first text, second text, label) of a table, always the same."""
    rng = random.Random(f"{task} {table}")
    return [
        (sentence(rng), f'"{sentence(rng)}', LABELS[task][number % len(LABELS[task])])
        for number in range(SIZES[table])
    ]


def line(task, table, number, one, other, label):
    """A row of a table that has labels."""
    if task == "CoLA":
        return ["gj04", label, "*" if label == "0" else "", one]
    if task == "SST-2":
        return [one, label]
    if task == "MNLI":
        annotators = [label] * (1 if table == "train" else 5)
        return [str(number), "p", f"p{number}", "fiction", *["( a )"] * 4, one, other,
                *annotators, label]  # fmt: skip
    before = {"STS-B": 7, "QQP": 3}.get(task, 1)
    return [*[str(number)] * before, one, other, label]


def header(task, table):
    if task == "MNLI":
        annotators = 1 if table == "train" else 5
        return [*HEADERS[task], *(f"label{i}" for i in range(1, annotators + 1)), "gold_label"]
    return HEADERS[task]


def table_text(task, table):
    lines = [] if task == "CoLA" else [header(task, table)]
    lines += [line(task, table, i, *row) for i, row in enumerate(rows(task, table))]
    if task == "QQP" and table == "train":
        lines.insert(3, ["7", "15", "16", "A question that ends here,"])
        lines.insert(4, ["and goes on?", "A question.", "0"])
    return "".join("\t".join(cells) + "\n" for cells in lines).encode()


def zipped(files):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in files.items():
            file.writestr(name, content)
    return buffer.getvalue()


def members(task):
    """The files of one archive."""
    tables = ["dev_matched", "dev_mismatched"] if task == "MNLI" else ["dev"]
    files = {f"{task}/{table}.tsv": table_text(task, table) for table in ("train", *tables)}
    return {f"{task}/": b"", **files, f"{task}/test.tsv": b"index\tsentence\n0\tNot wanted.\n"}


def published():
    """{path: content} on the server."""
    found = {
        f"{DATA}/{ARCHIVES.get(task, f'{task}.zip')}": zipped(members(task)) for task in HEADERS
    }
    numbered = list(enumerate(rows("MRPC", "train") + rows("MRPC", "dev"), 100))
    lines = [["Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"]]
    lines += [[label, f"{i}", f"{2 * i}", one, other] for i, (one, other, label) in numbered]
    text = "".join("\t".join(cells) + "\r\n" for cells in lines)
    found[MRPC_TRAIN] = b"\xef\xbb\xbf" + text.encode()
    held_out = numbered[SIZES["train"] :]
    found[MRPC_DEV] = "".join(f"{i}\t{2 * i}\n" for i, _ in held_out).encode()
    return found
