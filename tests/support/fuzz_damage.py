"""What is done to good input: damaged bytes, odd values in JSON and YAML, odd texts and lines.

All is drawn from a :class:`random.Random`: the same seed damages alike.
"""

import copy
import json

from support.hostile import CANARY

CODE = [
    f"$(touch {CANARY})",
    f"`touch {CANARY}`",
    f"';touch {CANARY};'",
    f"; touch {CANARY} #",
    f"| touch {CANARY}",
    f"__import__('os').system('touch {CANARY}')",
    f"!!python/object/apply:os.system ['touch {CANARY}']",
    f"{{{{ ''.__class__.__mro__[1].__subclasses__() }}}}${{oc.env:HOME}}{CANARY}",
    f"<script>{CANARY}</script>",
]
"""Texts that run something where they are evaluated or reach a shell."""
TEXTS = [
    "", " ", "no", "null", "true", "~", "-", "--", "-x", "--help", ".", "..", "../up", "a/b", "a:b",
    "a,b", ",", ":", "=", "a=b", "+", "*", "?", "#", "%s%n%d", "{}", "{0.__class__}", "[", "[]",
    "{", "${", "${nope}", "${a.b}", "$HOME", "@file", "'", '"', "\\", "\\\\n", "\n", "a\nb", "\r",
    "\t", "\x1b[31m", "\x7f", "\u0085", "\u2028", "\u202e", "\ufeff", "\U0001f600", "e\u0301", "é",
    "名前", "x" * 300, "x" * 5000, "0", "-0", "-1", "1", "2", "3", "00", "010", "0x10", "1_000",
    "12:30", "1.5", "1e3", "1e400", "-1e400", "nan", "inf", "-inf", "9" * 30, "1" * 5000, "٣",
    "²", "/", "/dev/null", "/nowhere/x", "code.pt", "en", "de", "pt-br", "switch", "dense",
]  # fmt: skip
NUMBERS = [0, 1, -1, 2, 7, 10**9, 10**30, -(10**30), 0.5, 1e308, 1e-320, float("nan"),
           float("inf"), -float("inf"), 2**31, 2**63, 2**64]  # fmt: skip
ALPHABETS = [
    range(32, 127), range(0, 32), range(0xA0, 0x250), range(0x370, 0x600), range(0x900, 0xE00),
    range(0x2000, 0x2070), range(0x3040, 0x3100), range(0x4E00, 0x9FFF), range(0xE000, 0xF900),
    range(0xFE00, 0xFFFE), range(0x1F300, 0x1F700), range(0xE0000, 0xE0080), range(0x300, 0x370),
]  # fmt: skip


def text(rng):
    """An odd text, without NUL or surrogates."""
    kind = rng.random()
    if kind < 0.15:
        return rng.choice(CODE)
    if kind < 0.75:
        return rng.choice(TEXTS)
    return line(rng).replace("\0", "")


def line(rng):
    """A line of any characters but the line feed."""
    length = rng.choice([0, 1, 2, 5, 20, 100]) if rng.random() < 0.97 else 3000
    alphabets = rng.sample(ALPHABETS, rng.randint(1, 3))
    characters = (chr(rng.choice(rng.choice(alphabets))) for _ in range(length))
    return "".join(characters).replace("\n", " ")


def value(rng):
    """An odd value of JSON or YAML."""
    kind = rng.randrange(6)
    if kind < 2:
        return text(rng)
    if kind < 4:
        return rng.choice(NUMBERS)
    deep = []
    for _ in range(rng.choice([1, 1, 1, 50, 200])):
        deep = [deep]
    return copy.deepcopy(rng.choice([None, True, False, {}, [], {"a": [1]}, deep, [None], [[]]]))


def _place(rng, content):
    """(container, key) of a value in nested dicts and lists, the outer ones more often."""
    while True:
        key = rng.choice(list(content) if isinstance(content, dict) else range(len(content)))
        inner = content[key]
        if not isinstance(inner, (dict, list)) or not inner or rng.random() < 0.3:
            return content, key
        content = inner


def values(rng, content):
    """Nested dicts and lists with one to three values changed; (what was done, content)."""
    content = copy.deepcopy(content)
    done = []
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        if not isinstance(content, (dict, list)) or not content or rng.random() < 0.03:
            content = value(rng)
            done.append("another")
            continue
        container, key = _place(rng, content)
        how = rng.choice(["replace", "replace", "replace", "delete", "rename", "double", "number"])
        if how == "delete":
            del container[key]
        elif how == "rename" and isinstance(container, dict):
            container[text(rng)] = container.pop(key)
        elif how == "double" and isinstance(container, list):
            container.append(copy.deepcopy(container[key]))
        elif how == "number":
            container[key] = rng.choice(NUMBERS)
        else:
            container[key] = value(rng)
        done.append(f"{how} {str(key)[:40]}")
    return ", ".join(done), content


def json_bytes(rng, content):
    """The bytes of a JSON file: of odd values, or damaged; (what was done, bytes)."""
    if rng.random() < 0.75:
        what, content = values(rng, content)
        return what, json.dumps(content, ensure_ascii=False, indent=2).encode("utf-8", "replace")
    return damage(rng, json.dumps(content, indent=2).encode())


WHOLE = [
    b"", b"\0", b"\n", b"{}", b"[]", b"7", b"null", b'"x"', b"[" * 100_000, b"{" * 100_000,
    b"\xff\xfe\x00", b"PK\x03\x04", b"PK\x05\x06" + bytes(18), b"\x80\x02.", b"\x1f\x8b\x08",
    b"a: &a [*a]\n", b"%PDF-1.4", b"x" * 100_000, "ÄÖ\n".encode("utf-16"), b"\xef\xbb\xbf",
]  # fmt: skip
"""In place of all that was there."""


def damage(rng, data):
    """Damaged bytes; (what was done, bytes)."""
    if not data or rng.random() < 0.06:
        which = rng.randrange(len(WHOLE))
        return f"whole {which}", WHOLE[which]
    begin = rng.randrange(len(data))
    end = min(len(data), begin + rng.choice([1, 1, 2, 8, 64, 1000]))
    how = rng.choice(["flip", "flip", "flips", "cut", "cut", "drop", "double", "insert", "zero",
                      "swap", "append", "code", "line", "nothing after"])  # fmt: skip
    if how == "flip":
        data = _flip(data, [8 * begin + rng.randrange(8)])
    elif how == "flips":
        data = _flip(data, [rng.randrange(8 * len(data)) for _ in range(rng.randint(2, 200))])
    elif how == "cut":
        data = data[:begin]
    elif how == "drop":
        data = data[:begin] + data[end:]
    elif how == "double":
        data = data[:end] + data[begin:]
    elif how == "insert":
        data = data[:begin] + rng.randbytes(rng.choice([1, 4, 100])) + data[begin:]
    elif how == "zero":
        data = data[:begin] + bytes(end - begin) + data[end:]
    elif how == "swap":
        data = data[end:] + data[:end]
    elif how == "append":
        data += rng.randbytes(rng.choice([1, 22, 1000]))
    elif how == "code":
        data = data[:begin] + rng.choice(CODE).encode() + data[end:]
    elif how == "line":
        lines = data.split(b"\n")
        lines.insert(rng.randrange(len(lines)), line(rng).encode())
        data = b"\n".join(lines)
    else:
        data = data[:begin] + b"\n"
    return f"{how} at {begin}", data


def _flip(data, bits):
    damaged = bytearray(data)
    for bit in bits:
        damaged[bit // 8] ^= 1 << bit % 8
    return bytes(damaged)


def replace_file(rng, path):
    """A file that is gone, a folder, a link, unreadable; what was done."""
    how = rng.choice(["gone", "folder", "broken link", "link to itself", "device"])
    path.unlink()
    if how == "folder":
        path.mkdir()
    elif how != "gone":
        path.symlink_to({"broken link": "nowhere", "device": "/dev/null"}.get(how, path.name))
    return f"{how}: {path.name}"


def spoil(rng, path):
    """Damage the file ``path``, or what stands in its place; what was done."""
    if rng.random() < 0.08:
        return replace_file(rng, path)
    data = path.read_bytes()
    if path.suffix == ".json" and rng.random() < 0.8:
        what, data = json_bytes(rng, json.loads(data))
    else:
        what, data = damage(rng, data)
    path.write_bytes(data)
    return f"{path.name}: {what}"
