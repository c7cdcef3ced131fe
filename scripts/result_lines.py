"""Results of a long job, a line of JSON each, which may have been stopped in the middle of one."""

import json


def read_results(path, key):
    """{value of ``key``: line}, the last of each, of a file or none; half a line is cut off."""
    known = {}
    if path.is_file():
        whole = path.read_bytes()
        whole = whole[: whole.rfind(b"\n") + 1]
        for line in whole.splitlines():
            result = json.loads(line)
            known[result[key]] = result
        with path.open("rb+") as file:
            file.truncate(len(whole))
    return known


def add_result(path, result):
    """Add a line, at once."""
    with path.open("ab", buffering=0) as file:
        file.write(json.dumps(result).encode() + b"\n")
