"""Miniature archives of WMT14 English-German with the true names, and a server that has faults."""

import contextlib
import gzip
import hashlib
import http.server
import io
import json
import random
import tarfile
import threading
from pathlib import Path

from support import commands
from support.phrases import ADVERBS, OBJECTS, SUBJECTS, VERBS

EUROPARL = "/wmt13/training-parallel-europarl-v7.tgz"
COMMON_CRAWL = "/wmt13/training-parallel-commoncrawl.tgz"
NEWS_V12 = "/wmt17/translation-task/training-parallel-nc-v12.tgz"
NEWS_V9 = "/wmt14/training-parallel-nc-v9.tgz"
DEV = "/wmt17/translation-task/dev.tgz"
TEST = "/wmt14/test-full.tgz"
PATHS = (EUROPARL, COMMON_CRAWL, NEWS_V12, NEWS_V9, DEV, TEST)
VOCAB_SIZE = 300
MERGES = 250


def sentences(count, seed):
    """Pairs of sentences, some with what tokenisation is about."""
    rng = random.Random(seed)
    pairs = []
    for _ in range(count):
        parts = [rng.choice(part) for part in (SUBJECTS, VERBS, OBJECTS, ADVERBS)]
        english, german = (" ".join(part[side] for part in parts) for side in (0, 1))
        ending = rng.choice([(".", "."), ("!", "!"), (", wasn't it?", ", nicht wahr?")])
        english, german = english + ending[0], german + ending[1]
        if rng.random() < 0.2:
            english, german = f'"{english}"', f"„{german}“"
        if rng.random() < 0.2:
            english, german = f"Well-known: {english}", f"Alt-bekannt: {german}"
        pairs.append((english, german))
    return pairs


def text(pairs, side):
    return "".join(f"{pair[side]}\n" for pair in pairs).encode()


def sgm(pairs, side):
    lines = [f'<seg id="{number}">{pair[side]} </seg>' for number, pair in enumerate(pairs, 1)]
    return ('<srcset setid="newstest2014">\n<doc docid="1">\n<p>\n' + "\n".join(lines)
            + "\n</p>\n</doc>\n</srcset>\n").encode()  # fmt: skip


def parallel(stem, pairs):
    return {f"{stem}.en": text(pairs, 0), f"{stem}.de": text(pairs, 1)}


# Nothing that training could use.
DIRT = [
    ("", "Eine Zeile ohne Quelle."),
    ("A line without a translation.", "   "),
    ("word " * 90, "Wort " * 90),
    ("Yes.", "Ja " * 40),
]


def members():
    """For each archive what is in it; other languages lie about, as in the real ones."""
    europarl = parallel("training/europarl-v7.de-en", [*sentences(500, 1), *DIRT])
    crawl = parallel("commoncrawl.de-en", sentences(200, 2))
    crawl["commoncrawl.de-en.en"] += b"Not UTF-8: \xe4\n"
    crawl["commoncrawl.de-en.de"] += b"Kein UTF-8.\n"
    # One training sentence is a test sentence, and no-break spaces and U+2028 split nothing.
    news = [*sentences(100, 3), sentences(30, 5)[0], ("10\u00a0% of\u2028it.", "10\u00a0% davon.")]
    return {
        EUROPARL: {**europarl, "training/europarl-v7.fr-en.en": b"Not wanted.\n"},
        COMMON_CRAWL: {**crawl, "commoncrawl.de-en.annotation": b"0\n"},
        NEWS_V12: parallel("training/news-commentary-v12.de-en", news),
        NEWS_V9: parallel("training/news-commentary-v9.de-en", sentences(50, 6)),
        DEV: parallel("dev/newstest2013", sentences(24, 4)),
        TEST: {
            "test-full/newstest2014-deen-src.en.sgm": sgm(sentences(30, 5), 0),
            "test-full/newstest2014-deen-ref.de.sgm": sgm(sentences(30, 5), 1),
        },
    }


def tgz(files, extra=()):
    """A compressed archive as bytes; ``extra`` are further members, by ``tarfile.TarInfo``."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for info in extra:
            tar.addfile(info, io.BytesIO(b"x" * info.size))
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return gzip.compress(buffer.getvalue(), mtime=0)


class Server:
    """Serves ``files`` (path -> bytes) and counts requests; ``break_after`` cuts connections.

    Attributes:
        files: what there is.
        break_after: path -> numbers of bytes after which successive connections break.
        requests: (path, first byte asked for) of every request.
        ranges: whether the server knows them.
        careless: sends the rest of whatever version it has, and calls it so.
        answers: path -> (status, headers, body) in place of a file.
    """

    def __init__(self):
        made = members()
        self.files = {path: tgz(made[path]) for path in PATHS}
        self.break_after = {}
        self.requests = []
        self.ranges = True
        self.careless = False
        self.answers = {}
        self.url = ""

    def answer(self, handler):
        path = handler.path
        asked = handler.headers.get("Range") if self.ranges else None
        start = int(asked[len("bytes=") : -1]) if asked else 0
        self.requests.append((path, start))
        if path in self.answers:
            status, headers, body = self.answers[path]
            handler.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                handler.send_header(name, value)
            handler.end_headers()
            handler.wfile.write(body)
            return
        if path not in self.files:
            handler.send_error(404)
            return
        content = self.files[path]
        tag = f'"{hash(content)}"'
        if asked and handler.headers.get("If-Range") != tag and not self.careless:
            start = 0
        if start >= len(content):
            handler.send_response(416)
            handler.send_header("Content-Range", f"bytes */{len(content)}")
            handler.send_header("Content-Length", "0")
            handler.end_headers()
            return
        handler.send_response(206 if start else 200)
        if start:
            end = len(content) - 1
            handler.send_header("Content-Range", f"bytes {start}-{end}/{len(content)}")
        handler.send_header("ETag", tag)
        handler.send_header("Content-Length", str(len(content) - start))
        handler.end_headers()
        pending = self.break_after.get(path)
        end = start + pending.pop(0) if pending else len(content)
        handler.wfile.write(content[start:end])
        if end < len(content):
            handler.close_connection = True
            handler.wfile.flush()


@contextlib.contextmanager
def serving():
    """Yield a running :class:`Server` on this machine."""
    server = Server()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            server.answer(self)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        server.url = f"http://127.0.0.1:{httpd.server_address[1]}"
        thread = threading.Thread(target=httpd.serve_forever, daemon=True)
        thread.start()
        yield server
        httpd.shutdown()
        thread.join()


def write_pins(path: Path, server: Server):
    """A record with the miniature archives that sacreBLEU has another checksum of."""
    entries = {}
    for name in (DEV, TEST):
        content = server.files[name]
        entries[name.rsplit("/", 1)[1]] = {
            "url": name, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest(),
        }  # fmt: skip
    path.write_text(json.dumps(entries))
    return path


def prepare(server, output, *arguments):
    """``prepare wmt14`` from the server's archives; its record."""
    pins = output.parent / "pins.json"
    if not pins.is_file():
        output.parent.mkdir(parents=True, exist_ok=True)
        write_pins(pins, server)
    size = ["--merges", MERGES] if "moses" in arguments else ["--vocab-size", VOCAB_SIZE]
    places = ["--mirror", server.url, "--checksums", pins, "--output", output]
    commands.command("prepare", "wmt14", *places, *arguments, *size)
    return json.loads((output / "record.json").read_text())
