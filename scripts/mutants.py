#!/usr/bin/env python
"""Change the code in small ways, one at a time, and see which changes no test notices.

    python scripts/mutants.py FOLDER --number 200

A seeded sample of mutations of moe/, criterions/ and models/ is tried in a copy of the checkout
below FOLDER, where everything else is kept too: which lines each test runs (tests.json: ten
minutes, and some more where tests have changed), and a line for each mutant in results.jsonl. For
each mutant the tests that run its line are run, the fastest first, until one fails; cases that only
the mutant has are run too, and one that it does not have is no failure. The same command goes on
where it stopped, with the mutants of the files as they are then; of a file that has changed since
tests.json was made, each test that runs any line counts.

What a test does in other processes is not seen: with --processes, all that start some are run as
well where no other test failed.
"""

import argparse
import ast
import copy
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

from result_lines import add_result, read_results

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "fairseq_sparsemixer"
FOLDERS = ("moe", "criterions", "models")
TESTS = (*FOLDERS, "tasks", "evaluation", "laboratory")
"""Of tests: beam search, teacher forcing and watched routing are run by the rooms above."""
SECONDS = 60
"""Of tests, as long as they take without a mutant; more are left out."""
NO_TESTS = 5
"""What pytest ends with where no test is left."""
AS_HERE = ("-o", "addopts=--import-mode=importlib")
"""Named tests, whatever their marks."""

COMPARISONS = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
ARITHMETIC = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
    ast.Pow: ast.Mult,
    ast.MatMult: ast.Mult,
}
LEFT_OUT = (
    *("detach", "float", "clamp_min", "contiguous", "clone", "square", "sign", "log", "abs"),
    *("masked_fill", "t", "transpose", "flatten", "sqrt", "double", "nan_to_num", "mean", "sum"),
)
"""Methods whose call is replaced by what they are called on."""


def mutations(node):
    """(what was done, the node after it) for each way to change a node."""
    if isinstance(node, ast.Compare) and type(node.ops[0]) in COMPARISONS:
        yield "comparison", changed(node, ops=[COMPARISONS[type(node.ops[0])](), *node.ops[1:]])
    if isinstance(node, (ast.BinOp, ast.AugAssign)) and type(node.op) in ARITHMETIC:
        yield "arithmetic", changed(node, op=ARITHMETIC[type(node.op)]())
    if isinstance(node, ast.BoolOp):
        yield "logic", changed(node, op=ast.Or() if isinstance(node.op, ast.And) else ast.And())
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.Not, ast.USub, ast.Invert)):
        yield "sign", node.operand
    if isinstance(node, ast.Constant) and isinstance(node.value, (bool, int, float)):
        value = not node.value if isinstance(node.value, bool) else node.value + 1
        yield "constant", changed(node, value=value)
    if isinstance(node, (ast.If, ast.IfExp, ast.While)):
        yield "condition", changed(node, test=ast.UnaryOp(ast.Not(), node.test))
    if isinstance(node, (ast.Assign, ast.AugAssign)) or (
        isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
    ):
        yield "left out", ast.Pass()
    if isinstance(node, ast.Call):
        if isinstance(node.func, ast.Attribute) and node.func.attr in LEFT_OUT:
            yield "call left out", node.func.value
        for i in range(len(node.keywords)):
            rest = [*node.keywords[:i], *node.keywords[i + 1 :]]
            yield "keyword left out", changed(node, keywords=rest)
    if isinstance(node, ast.With):
        yield "context left out", ast.If(ast.Constant(True), node.body, [])
    if isinstance(node, ast.Return) and getattr(node.value, "value", node.value) is not None:
        yield "nothing returned", changed(node, value=ast.Constant(None))


def changed(node, **fields):
    """A shallow copy of a node with some fields replaced."""
    result = copy.copy(node)
    for name, value in fields.items():
        setattr(result, name, value)
    return result


def places(node):
    """(parent, field, index, child) of all that is worth changing: no texts, types or errors."""
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns", "decorator_list"):
            continue
        for index, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if not isinstance(child, ast.AST) or isinstance(child, (ast.Raise, ast.Assert)):
                continue
            if getattr(child, "name", "") in ("extra_repr", "__repr__"):
                continue
            yield node, field, index, child
            yield from places(child)


def put(parent, field, index, node):
    """Set what :func:`places` names."""
    if index is None:
        setattr(parent, field, node)
    else:
        getattr(parent, field)[index] = node


def all_mutants(tree):
    """Of each file below FOLDERS: dicts with the key of a mutant, its place and what it does."""
    for folder in FOLDERS:
        for path in sorted((tree / PACKAGE / folder).rglob("*.py")):
            source = path.read_text(encoding="utf-8")
            digest = hashlib.sha256(source.encode()).hexdigest()[:8]
            number = 0
            for _, _, _, node in places(ast.parse(source)):
                for kind, after in mutations(node):
                    name = path.relative_to(tree).as_posix()
                    yield {
                        "key": f"{name}@{digest}#{number}",
                        "file": name,
                        "line": node.lineno,
                        "last_line": node.end_lineno,
                        "kind": kind,
                        "before": one_line(node),
                        "after": one_line(after),
                    }
                    number += 1


def one_line(node):
    """The source of a node, cut."""
    text = " ".join(ast.unparse(ast.fix_missing_locations(copy.deepcopy(node))).split())
    return text if len(text) <= 160 else text[:157] + "..."


def mutated(mutant, source):
    """The source of a file with the mutant in place."""
    tree = ast.parse(source)
    wanted = int(mutant["key"].rsplit("#")[1])
    number = 0
    for parent, field, index, node in list(places(tree)):
        for _, after in mutations(node):
            if number == wanted:
                put(parent, field, index, after)
                return ast.unparse(ast.fix_missing_locations(tree))
            number += 1
    raise LookupError(mutant["key"])


class Recorder:
    """A plugin of pytest: which lines of FOLDERS a test runs, how long it takes, what it starts."""

    def __init__(self, tree):
        self.prefixes = tuple(str(tree / PACKAGE / folder) + os.sep for folder in FOLDERS)
        self.start = len(str(tree)) + 1
        self.tests = {}
        self.cases = {}
        self.shared = set()
        self.started = 0
        original = subprocess.Popen.__init__

        def count(*args, **kwargs):
            self.started += 1
            return original(*args, **kwargs)

        subprocess.Popen.__init__ = count

    def trace(self, frame, event, argument):
        """For sys.settrace: follows the functions of FOLDERS alone."""
        name = frame.f_code.co_filename
        if not name.startswith(self.prefixes):
            return None
        lines = self.lines.setdefault(name[self.start :], set())
        lines.add(frame.f_lineno)

        def in_function(frame, event, argument):
            lines.add(frame.f_lineno)
            return in_function

        return in_function

    def pytest_collection_modifyitems(self, items):
        """Tests that look at what a process made for all of them count as having started it."""
        self.cases = by_file([item.nodeid for item in items])
        self.shared = {item.nodeid for item in items if "shared" in item.fixturenames}

    def pytest_runtest_logstart(self, nodeid, location):
        """Starts with the fixtures of a test."""
        self.lines, self.started, self.since = {}, 0, time.perf_counter()
        self.passed = True
        sys.settrace(self.trace)

    def pytest_runtest_logreport(self, report):
        """Of set-up, call and tear-down."""
        self.passed = self.passed and report.passed

    def pytest_runtest_logfinish(self, nodeid, location):
        """Ends behind the fixtures of a test."""
        sys.settrace(None)
        if self.passed:
            self.tests[nodeid] = {
                "seconds": round(time.perf_counter() - self.since, 3),
                "processes": self.started > 0 or nodeid in self.shared,
                "lines": {name: sorted(lines) for name, lines in self.lines.items()},
            }


class Chosen:
    """A plugin of pytest: runs the named tests, in that order, and those not among ``cases``."""

    def __init__(self, names, cases):
        self.files = list(by_file(names))
        self.order = {name: number for number, name in enumerate(names)}
        self.others = {case for name in self.files for case in cases[name]} - self.order.keys()

    def pytest_collection_modifyitems(self, items):
        """What a test is tried on may depend on the code, and so on the mutant."""
        items[:] = sorted(
            (item for item in items if item.nodeid not in self.others),
            key=lambda item: self.order.get(item.nodeid, len(self.order)),
        )


def by_file(names):
    """The names of tests, by the file that they are in."""
    result = {}
    for name in names:
        result.setdefault(name.split("::")[0], []).append(name)
    return result


def run_tests(arguments, log, seconds, plugin=None, then=None):
    """pytest in a fork of this process, which has imported what is slow; its code, None: killed."""
    child = os.fork()
    if child == 0:
        code = 70
        try:
            os.setsid()
            with log.open("w") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            import pytest

            options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--basetemp"]
            code = pytest.main(
                [*options, str(log.parent / "temporary"), *arguments], [plugin] if plugin else None
            )
            if then is not None:
                then()
        finally:
            sys.stdout.flush()
            os._exit(int(code))
    end, pid = time.monotonic() + seconds, 0
    try:
        while time.monotonic() < end:
            pid, status = os.waitpid(child, os.WNOHANG)
            if pid:
                code = os.waitstatus_to_exitcode(status)
                if code == 70:
                    raise SystemExit(f"the tests could not be started; see {log}")
                return code
            time.sleep(0.05)
        return None
    finally:
        if not pid:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)


def copy_checkout(tree):
    """What git knows and does not ignore, anew."""
    listing = ["git", "ls-files", "-co", "--exclude-standard"]
    names = subprocess.run(listing, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    shutil.rmtree(tree, ignore_errors=True)
    for name in names.splitlines():
        if (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, tree / name)


def enter(tree):
    """Let this process and those it starts import from the copy, and import what is slow."""
    os.chdir(tree)
    os.environ["PYTHONPATH"] = str(tree)
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["OMP_WAIT_POLICY"] = "passive"
    os.nice(10)
    sys.path.insert(0, str(tree))
    sys.dont_write_bytecode = True
    import fairseq  # noqa: F401
    import pytest  # noqa: F401
    import torch  # noqa: F401

    assert PACKAGE not in sys.modules


def digest_of(paths):
    """Of what is in files."""
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(paths))).hexdigest()


def map_tests(folder):
    """Tests that pass, by name, as they were where nothing has changed; all cases, by file."""
    tree, path = folder / "tree", folder / "tests.json"
    found = folder / "found.json"
    recorder = Recorder(tree)
    collect = ["--collect-only", *(f"tests/{name}" for name in TESTS)]
    log = folder / "map.log"
    if run_tests(collect, log, 600, recorder, lambda: found.write_text(json.dumps(recorder.cases))):
        sys.exit(f"the tests cannot be collected: see {log}")
    cases = json.loads(found.read_text())
    files = {name: [digest_of([tree / name]), sorted(names)] for name, names in cases.items()}
    known = {"code": {}, "files": {}, "tests": {}}
    if path.is_file():
        known = json.loads(path.read_text())
    else:
        known["code"] = code_of(tree)
    new = [name for name, file in files.items() if known["files"].get(name) != file]
    if new:
        status = run_tests(
            new, log, 7200, recorder, lambda: found.write_text(json.dumps(recorder.tests))
        )
        if status not in (0, 1):
            sys.exit(f"the tests end with {status}: see {log}")
        kept = {
            name: test
            for name, test in known["tests"].items()
            if name.split("::")[0] in files.keys() - new
        }
        known["tests"] = {**kept, **json.loads(found.read_text())}
        known["files"] = files
        path.write_text(json.dumps(known))
    for name, digest in code_of(tree).items():
        if known["code"].get(name) != digest:
            for test in known["tests"].values():
                if name in test["lines"]:
                    test["lines"][name] = None  # any
    return known["tests"], cases


def code_of(tree):
    """The digest of each file of FOLDERS."""
    return {
        file.relative_to(tree).as_posix(): digest_of([file])
        for name in FOLDERS
        for file in (tree / PACKAGE / name).rglob("*.py")
    }


def choose_tests(mutant, tests, processes):
    """The tests to run, and how long they take without a mutant."""
    lines = set(range(mutant["line"], mutant["last_line"] + 1))
    covering = set()
    for name, test in tests.items():
        run = test["lines"].get(mutant["file"], ())
        if run is None or lines.intersection(run):
            covering.add(name)
    if not covering:  # it runs when the file is imported
        covering = {name for name, test in tests.items() if mutant["file"] in test["lines"]}
    if processes:
        chosen = [name for name, test in tests.items() if test["processes"]]
    else:
        # Those that start processes take longer, but are better than none.
        chosen = [name for name in covering if not tests[name]["processes"]] or covering
    total, result = 0.0, []
    for name in sorted(chosen, key=lambda name: tests[name]["seconds"]):
        total += tests[name]["seconds"]
        if result and total > SECONDS * (10 if processes else 1):
            break
        result.append(name)
    return result, total


def try_mutant(mutant, tests, cases, folder, processes):
    """What became of it: the line of the results."""
    target = folder / "tree" / mutant["file"]
    original = target.read_text(encoding="utf-8")
    since = time.monotonic()
    verdict, run = "survived", 0
    try:
        target.write_text(mutated(mutant, original), encoding="utf-8")
        for with_processes in (False, True)[: 1 + processes]:
            chosen, seconds = choose_tests(mutant, tests, with_processes)
            run += len(chosen)
            if chosen:
                log = folder / "mutant.log"
                plugin = Chosen(chosen, cases)
                code = run_tests(["-x", *AS_HERE, *plugin.files], log, 60 + 6 * seconds, plugin)
                if code not in (0, NO_TESTS):
                    verdict = "timeout" if code is None else "killed"
                    break
    finally:
        target.write_text(original, encoding="utf-8")
    if not run:
        verdict = "no test"
    return {
        **mutant,
        "verdict": verdict,
        "tests": run,
        "seconds": round(time.monotonic() - since, 1),
    }


def main():
    """See above."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="for the copy, the map and the results")
    parser.add_argument("--number", type=int, default=200, help="mutants (default: 200)")
    parser.add_argument("--seed", type=int, default=1, help="of the sample (default: 1)")
    parser.add_argument("--only", default="", help="text that a mutant's file must hold")
    parser.add_argument("--processes", action="store_true", help="see above")
    parser.add_argument(
        "--again", action="store_true", help="try those that no test noticed once more"
    )
    args = parser.parse_args()
    folder = args.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    copy_checkout(folder / "tree")
    enter(folder / "tree")
    tests, cases = map_tests(folder)
    some = Chosen([name for name, test in tests.items() if not test["processes"]][::20], cases)
    if run_tests([*AS_HERE, *some.files], folder / "mutant.log", 600, some) != 0:
        sys.exit(f"tests fail without a mutant: see {folder / 'mutant.log'}")
    sample = [mutant for mutant in all_mutants(folder / "tree") if args.only in mutant["file"]]
    random.Random(args.seed).shuffle(sample)
    results = folder / "results.jsonl"
    known = read_results(results, "key")
    for mutant in sample[: args.number]:
        before = known.get(mutant["key"])
        if before and not (args.again and before["verdict"] in ("survived", "no test")):
            continue
        result = try_mutant(mutant, tests, cases, folder, args.processes)
        known[mutant["key"]] = result
        add_result(results, result)
        print(
            f"{result['verdict']}: {result['file']}:{result['line']} {result['after']}", flush=True
        )
    verdicts = [known[mutant["key"]]["verdict"] for mutant in sample[: args.number]]
    print(", ".join(f"{count} {verdict}" for verdict, count in Counter(verdicts).most_common()))


if __name__ == "__main__":
    main()
