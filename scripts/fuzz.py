#!/usr/bin/env python
"""Give the commands damaged, odd and hostile input, and count what comes of it.

    python scripts/fuzz.py FOLDER --number 10000 --seed 1
    python scripts/fuzz.py FOLDER --seed 1 --only 4711     # one trial again: all that it said

What is tried follows from the seed and the number of a trial alone: flags, hydra's overrides,
plans, corpora, folders of runs and what is in them, checkpoints, dictionaries, subword models,
lines (tests/support/fuzz_kinds.py). Good files are made first, below FOLDER, where a line for each
trial is kept in SEED.jsonl: the same command goes on where it stopped. Each trial is made in a
process of its own with a folder of its own, and comes to one of (tests/support/fuzz_runner.py)

    right           it went well, with as many lines out as in, or the translations of before
    clear error     exit status 2, and one sentence at the end
    unclear error   another status or another end
    wrong           it went well, and the result is not what it should be
    traceback       or a signal
    hang            more than a minute of its own
    lost data       a file is changed or gone that was no output of the command
    code run        the input ran something

All but the first two are faults; they are listed, and the exit status is then 1.
"""

import argparse
import json
import logging
import os
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from result_lines import add_result, read_results  # noqa: E402
from support import commands, fuzz_kinds, fuzz_runner, small_run  # noqa: E402
from support.report_study import build_study  # noqa: E402

from fairseq_sparsemixer.tables import format_table  # noqa: E402


def make_goods(folder):
    """The good files, made where they are not there yet."""
    shared = commands.Shared(folder / "good")
    corpus = shared.directory("corpus", small_run.build_corpus)
    run = shared.directory("run", lambda made: small_run.train(corpus, made))
    study = shared.directory("study", lambda made: build_study(corpus, made))
    laid_out = shared.directory("laid_out", lambda made: fuzz_kinds.lay_out(corpus, made))
    return fuzz_kinds.Goods(corpus, run, study, laid_out)


def table(results):
    """Counts of verdicts by kind, as text."""
    rows = []
    for kind in (*fuzz_kinds.KINDS, "all"):
        counts = Counter(each["verdict"] for each in results if kind in (each["kind"], "all"))
        row = [kind, sum(counts.values()), *(counts[name] for name in fuzz_runner.VERDICTS)]
        rows.append(list(map(str, row)))
    return format_table([["kind", "trials", *fuzz_runner.VERDICTS], *rows])


def main():
    """See above."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="for good files and results")
    parser.add_argument("--number", type=int, default=1000, help="trials (default: 1000)")
    parser.add_argument("--seed", type=int, default=1, help="default: 1")
    parser.add_argument("--only", type=int, help="the number of one trial")
    parser.add_argument("--again", action="store_true", help="make those with faults once more")
    args = parser.parse_args()
    folder = args.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    goods = make_goods(folder)
    logging.getLogger().handlers.clear()  # each command has its own
    os.nice(10)
    if args.only is not None:
        result, said = fuzz_kinds.try_one(goods, args.seed, args.only, folder)
        print(said, json.dumps(result, ensure_ascii=False, indent=2), sep="\n")
        return int(result["verdict"] not in fuzz_runner.GOOD)
    path = folder / f"{args.seed}.jsonl"
    known = read_results(path, "number")
    for number in range(args.number):
        again = args.again and number in known
        if number in known and not (again and known[number]["verdict"] not in fuzz_runner.GOOD):
            continue
        result, _ = fuzz_kinds.try_one(goods, args.seed, number, folder)
        known[number] = result
        add_result(path, result)
    results = [known[number] for number in range(args.number)]
    faults = [each for each in results if each["verdict"] not in fuzz_runner.GOOD]
    for each in faults:
        print(f"{each['number']}: {each['verdict']}: {each['kind']}: {each['what'][:200]!r}")
    print(table(results))
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
