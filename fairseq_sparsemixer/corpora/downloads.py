"""Files of a web server: resumed where a connection broke, and verified.

Where nobody publishes a checksum, the one of the first download is recorded (:class:`Checksums`).
The record can be kept, shared and given to others, who then get the same bytes or an error.
"""

import hashlib
import http.client
import re
import socket
import time
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, NamedTuple, Optional

from tqdm import tqdm

from fairseq_sparsemixer.corpora.resumable import say
from fairseq_sparsemixer.errors import UserError
from fairseq_sparsemixer.files import (
    check_writable,
    read_json,
    replace_durably,
    sha256_of,
    write_json,
)
from fairseq_sparsemixer.locks import in_turn

ATTEMPTS = 5
"""Connections tried in a row without a byte of progress."""
_TIMEOUT = 60  # seconds without a byte
_BLOCK = 1 << 16
_WHOLE, _PART = 200, 206  # what else succeeds (204: no content) is not a file
_LENGTH = re.compile(r"[0-9]{1,18}")
# Not every OSError: a full disk is no reason to try again.
_NETWORK_ERRORS = (
    urllib.error.URLError,
    http.client.HTTPException,
    ConnectionError,
    socket.timeout,
)


@dataclass(frozen=True)
class RemoteFile:
    """A file to download.

    Attributes:
        url: where it is published.
        md5: checksum published by others, if any.
    """

    url: str
    md5: Optional[str] = None

    @property
    def name(self) -> str:
        """The name that it is kept under."""
        return self.url.rsplit("/", 1)[1]


class Checksums:
    """SHA-256 of downloads, ``{"NAME": {"url": ..., "bytes": ..., "sha256": ...}}`` in a file.

    Raises:
        UserError: the file is not such a record.
    """

    def __init__(self, path: Path):
        self.path = path
        if path.is_dir():
            raise UserError(f"--checksums {path} is a folder; give it the name of a file")
        self.entries: Dict[str, Dict[str, Any]] = {}
        if not path.is_file():
            check_writable(path, "--checksums")  # before the first download
        else:
            cure = "it is to be a record of checksums; remove it, or name another with --checksums"
            self.entries = read_json(path, {str: {"sha256": str, "bytes": int}}, cure)

    def expected(self, name: str) -> Optional[str]:
        """The recorded SHA-256 of a file, or None."""
        return self.entries.get(name, {}).get("sha256")

    def record(self, remote: RemoteFile, path: Path) -> None:
        """Add what was downloaded; a recorded file stays as it is."""
        if remote.name not in self.entries:
            size = path.stat().st_size
            entry = {"url": remote.url, "bytes": size, "sha256": sha256_of(path)}
            with in_turn(self.path, beside=True):
                # Another process may have added to it meanwhile.
                self.entries = {remote.name: entry, **Checksums(self.path).entries}
                write_json(self.path, self.entries)


class Shelf(NamedTuple):
    """Where downloads are kept, and come from.

    Attributes:
        folder: an interrupted download goes on there.
        checksums: a recorded SHA-256 must match; it goes before the published MD5.
        mirror: scheme and host (and path) in place of those of a file's URL.
    """

    folder: Path
    checksums: Checksums
    mirror: Optional[str]

    def check_made_from(self, archives: Dict[str, Any], corpus: Path) -> None:
        """Raise a :class:`UserError` where a corpus was made from other archives than recorded.

        Args:
            archives: entries as of :class:`Checksums`, of what it was made from.
            corpus: its folder.
        """
        for name, entry in archives.items():
            if self.checksums.expected(name) not in (None, entry["sha256"]):
                raise UserError(
                    f"{corpus} was made from another {name} than {self.checksums.path} asks for: "
                    "name another folder with --output"
                )


class ShelfChoice(NamedTuple):
    """What a user says of a :class:`Shelf`.

    Attributes:
        downloads: its folder; None for ``download`` in that of the corpus.
        checksums: the record; None for ``checksums.json`` beside the downloads.
        mirror: see there.
    """

    downloads: Optional[Path] = None
    checksums: Optional[Path] = None
    mirror: Optional[str] = None

    def shelf(self, corpus: Path) -> Shelf:
        """That of the corpus in a folder.

        Raises:
            UserError: see :class:`Checksums`.
        """
        folder = self.downloads or corpus / "download"
        return Shelf(folder, Checksums(self.checksums or folder / "checksums.json"), self.mirror)


DEFAULT_SHELF = ShelfChoice()
"""In the corpus' own folder, from where files are published."""


def obtain(remote: RemoteFile, shelf: Shelf) -> Path:
    """The file on the shelf: the copy there if it is the right one, else downloaded.

    Raises:
        UserError: no network, no such file, or not the recorded or published bytes.
    """
    folder, checksums, mirror = shelf
    path = folder / remote.name
    if not path.is_file():
        with in_turn(path, beside=True):
            if not path.is_file():  # another process may have downloaded it meanwhile
                _obtain_anew(remote, path, checksums, mirror)
                return path
    problem = _problem(remote, path, checksums)
    if problem:
        raise UserError(
            f"{path} is damaged or another file: {problem}. Remove it to have it downloaded again"
        )
    return path


def _obtain_anew(
    remote: RemoteFile, path: Path, checksums: Checksums, mirror: Optional[str]
) -> None:
    url = remote.url
    if mirror is not None:
        url = mirror.rstrip("/") + urllib.parse.urlsplit(remote.url).path
    partial = path.with_name(f".{remote.name}.partial")
    _download(url, partial)
    problem = _problem(remote, partial, checksums)
    tag = _tag_path(partial)
    if problem:
        partial.unlink()
        tag.unlink(missing_ok=True)
        raise UserError(
            f"{url} is not the file that was expected: {problem}; name another server with "
            f"--mirror, or, if this file is right, put its SHA-256 into {checksums.path}"
        )
    replace_durably(partial, path)
    tag.unlink(missing_ok=True)


def md5_of(path: Path) -> str:
    """MD5 of a small file's bytes, in hexadecimal."""
    return hashlib.md5(path.read_bytes()).hexdigest()


def _problem(remote: RemoteFile, path: Path, checksums: Checksums) -> str:
    """What is wrong with the bytes of ``path``; empty where nothing is known to be."""
    recorded = checksums.expected(remote.name)
    if recorded is not None:
        found = sha256_of(path)
        wrong = found != recorded
        return f"its SHA-256 is {found} and {checksums.path} has {recorded}" if wrong else ""
    if remote.md5 is not None:
        found = md5_of(path)
        return f"its MD5 is {found} and sacreBLEU has {remote.md5}" if found != remote.md5 else ""
    return ""


def _download(url: str, partial: Path) -> None:
    """Fetch ``url`` into ``partial``, going on after its last byte as often as it gets further.

    Beside the bytes lies the server's tag of the file's version: two versions are never mixed.
    """
    say(f"downloading {url}")
    partial.parent.mkdir(parents=True, exist_ok=True)
    failures = 0
    furthest = _size(partial)
    while True:
        try:
            _fetch_rest(url, partial)
            return
        except urllib.error.HTTPError as error:
            if error.code < 500:
                raise UserError(
                    f"{url}: the server says {error.code} {error.reason}; name a mirror with "
                    f"--mirror, or put the file at {partial.parent / url.rsplit('/', 1)[1]}"
                ) from error
            reason: object = f"{error.code} {error.reason}"
        except _NETWORK_ERRORS as error:
            reason = getattr(error, "reason", error)
        failures = 0 if _size(partial) > furthest else failures + 1
        furthest = max(furthest, _size(partial))
        if failures >= ATTEMPTS:
            raise UserError(
                f"{url} cannot be downloaded ({reason}): check the network and run the command "
                f"again, which goes on at byte {_size(partial)}, or put the file at "
                f"{partial.parent / url.rsplit('/', 1)[1]}"
            )
        say(f"{url}: {reason}; going on at byte {_size(partial)}")
        time.sleep(min(failures, 3))


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _tag_path(partial: Path) -> Path:
    """Where the server's tag of the version lies that ``partial`` is of."""
    return partial.with_name(f"{partial.name}.tag")


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows http to http and https, and https to https alone."""

    def redirect_request(
        self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> Any:
        """See urllib, which would also follow to ftp, and from https to http."""
        allowed = ("https",) if req.type == "https" else ("http", "https")
        if urllib.parse.urlsplit(newurl).scheme.lower() not in allowed:
            raise urllib.error.HTTPError(
                req.full_url, code, f"{msg}, to {newurl}, which is not followed", headers, fp
            )
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _fetch_rest(url: str, partial: Path) -> None:
    """One connection: append what ``partial`` lacks, or begin anew where the server has to."""
    have = _size(partial)
    tag = _read_tag(partial) if have else ""
    request = urllib.request.Request(url)
    if tag:
        request.add_header("Range", f"bytes={have}-")
        # Another version of the file comes whole, with status 200.
        request.add_header("If-Range", tag)
    try:
        response = urllib.request.build_opener(_Redirects).open(request, timeout=_TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code != 416:  # nothing after the last byte
            raise
        if error.headers.get("Content-Range", "").endswith(f"/{have}"):
            return
        partial.unlink(missing_ok=True)
        raise ConnectionError("the file has changed on the server") from error
    with response:
        new_tag = response.headers.get("ETag") or response.headers.get("Last-Modified") or ""
        if response.status not in (_WHOLE, _PART):
            raise urllib.error.HTTPError(
                url, response.status, response.reason, response.headers, None
            )
        resumed = response.status == _PART
        starts_here = response.headers.get("Content-Range", "").startswith(f"bytes {have}-")
        if resumed and not (tag and starts_here and new_tag in ("", tag)):
            partial.unlink(missing_ok=True)
            raise ConnectionError("the server sent another part, or of another version")
        length = response.headers.get("Content-Length")
        if length is not None and not _LENGTH.fullmatch(length):
            raise ConnectionError(f"the server sent a length that is none ({length[:20]})")
        start = have if resumed else 0
        total = None if response.length is None else start + response.length
        whole = response.headers.get("Content-Range", "").rpartition("/")[2]
        if resumed and _LENGTH.fullmatch(whole):
            total = int(whole)  # the server may send less than the rest
        with (
            partial.open("ab" if resumed else "wb") as file,
            tqdm(
                total=total, initial=start, unit="B", unit_scale=True, leave=False, disable=None
            ) as bar,
        ):
            if not resumed:
                _tag_path(partial).write_text(new_tag, encoding="utf-8")
            while block := _read(response):
                file.write(block)
                bar.update(len(block))
    # http.client does not tell a broken connection from the end of the file.
    if total is not None and _size(partial) != total:
        raise ConnectionError(f"the connection broke at byte {_size(partial)} of {total}")
    if _size(partial) == 0:
        raise ConnectionError("the server sent an empty file")


def _read_tag(partial: Path) -> str:
    path = _tag_path(partial)
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def _read(response: Any) -> bytes:
    """The next bytes; every error of the network as a :class:`ConnectionError`."""
    try:
        return response.read(_BLOCK)
    except OSError as error:
        raise ConnectionError(str(error)) from error
