#!/usr/bin/env python
"""Start every pair of commands that write in one place at once, and count what comes of it.

    python scripts/two_at_once.py FOLDER
    python scripts/two_at_once.py FOLDER --only prepare,study     # one pair again

The place, a small corpus and a study of it, is made first, below FOLDER, where a line for each pair
is kept in results.jsonl: the same command goes on where it stopped. Who comes first waits when it
has its lock, until the other has begun; each is also killed there, and started again
(tests/support/pairs.py). A pair comes to one of

    both right           one after the other, or side by side, as each alone
    the second waited    and then went well, as the first did
    one was refused      as another is at work there, in one sentence; the other went well
    one was told         in one sentence, of what it needs and the other has taken or not yet made
    wrong                all else

The exit status is 1 where one is wrong.
"""

import argparse
import itertools
import logging
import os
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from result_lines import add_result, read_results  # noqa: E402
from support import commands, pairs  # noqa: E402

from fairseq_sparsemixer.tables import format_table  # noqa: E402


def main():
    """See above."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="for the place and the results")
    parser.add_argument("--only", metavar="FIRST,SECOND", help="one pair, or one that is killed")
    args = parser.parse_args()
    folder = args.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["OMP_NUM_THREADS"] = "1"
    template = commands.Shared(folder / "good").directory("place", pairs.build_place)
    logging.getLogger().handlers.clear()  # each command has its own
    # check has no place; with itself it shows that it needs none.
    names = [name for name in pairs.COMMANDS if name != "check"]
    wanted = [("check", "check"), *itertools.combinations_with_replacement(names, 2)]
    wanted += [(name, "killed") for name in names]
    if args.only is not None:
        wanted = [tuple(args.only.split(","))]
    path = folder / "results.jsonl"
    known = read_results(path, "pair")
    for first, second in wanted:
        pair = f"{first},{second}"
        if pair in known and args.only is None:
            continue
        if second == "killed":
            outcome = pairs.try_killed(first, template, folder / "place")
        else:
            outcome = pairs.try_pair(first, second, template, folder / "place")
        known[pair] = dict(zip(("pair", "outcome", "why", "seconds"), (pair, *outcome)))
        add_result(path, known[pair])
        print(f"{pair}: {outcome[0]} {outcome[1]}", flush=True)
    results = [known[f"{first},{second}"] for first, second in wanted]
    rows = [["", *pairs.OUTCOMES]]
    for kind, killed in (("pairs", False), ("killed", True)):
        found = [r["outcome"] for r in results if r["pair"].endswith(",killed") == killed]
        rows.append([kind, *(str(Counter(found)[outcome]) for outcome in pairs.OUTCOMES)])
    print(format_table(rows))
    return int(any(each["outcome"] == "wrong" for each in results))


if __name__ == "__main__":
    sys.exit(main())
