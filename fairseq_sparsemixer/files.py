"""Text that is read strictly, files that are written whole or not at all, by one at a time."""

import codecs
import contextlib
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, Iterator, List

from fairseq_sparsemixer.disk import FullDiskError, cannot_write, full_disk, full_disk_in
from fairseq_sparsemixer.errors import UserError
from fairseq_sparsemixer.locks import in_turn, locked


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def read_lines(path: Path) -> List[str]:
    r"""The lines of a UTF-8 file, split on ``\n`` alone: :func:`iterate_lines` as a list."""
    return list(iterate_lines(path))


def iterate_lines(path: Path) -> Iterator[str]:
    r"""Yield the lines of a UTF-8 file, split on ``\n`` alone.

    ``str.splitlines`` and text mode would also split on characters that occur inside sentences
    (U+2028, U+0085, a lone carriage return) and so shift one side against the other. A byte order
    mark and the carriage return of a Windows line ending are not part of the text.

    Raises:
        UserError: no such file, or bytes that are not UTF-8 (names the line).
    """
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                yield decode_line(line, str(path), number)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; move it there when the block ends without error.

    Who writes the same file meanwhile waits. Of a symbolic link it is the file that it points to,
    and of what cannot be replaced (a device, a pipe) ``path`` itself is yielded.

    Raises:
        FullDiskError: it does not fit on the disk.
    """
    try:
        if _is_special(path):
            yield path
            return
        target = Path(os.path.realpath(path))
        partial = target.with_name(f".{target.name}.partial")
        target.parent.mkdir(parents=True, exist_ok=True)
        # An empty one is there already, and locked.
        with locked(partial, path):
            try:
                yield partial
                replace_durably(partial, target)
            except BaseException:
                with contextlib.suppress(FileNotFoundError):
                    partial.unlink()
                raise
    except UserError:
        raise
    except Exception as error:
        reason = full_disk(error)
        if reason is None:
            raise
        raise FullDiskError(cannot_write(reason, path)) from error


@contextlib.contextmanager
def atomic_folder(path: Path, replaces: Callable[[Path], bool] = lambda _: False) -> Iterator[Path]:
    """Yield a temporary folder beside ``path``; move it there when the block ends without error.

    Who writes the same folder meanwhile waits.

    Args:
        path: new, an empty folder, or one that is replaced.
        replaces: whether a folder that is not empty may be.

    Raises:
        UserError: ``path`` is something else, or cannot be written to.
        FullDiskError: it does not fit on the disk.
    """
    target = Path(os.path.realpath(path))
    partial = target.with_name(f".{target.name}.partial")
    try:
        if os.path.lexists(target) and not target.is_dir():
            raise UserError(f"{path} is no folder; give --output another")
        if target.is_dir() and any(target.iterdir()) and not replaces(target):
            raise UserError(f"{path} holds something else; give --output a new folder")
        with scratch_folder(partial):
            yield partial
            for each in partial.rglob("*"):
                if each.is_file():
                    with each.open("rb") as file:
                        os.fsync(file.fileno())
            aside = target.with_name(f".{target.name}.old")
            if target.is_dir():
                shutil.rmtree(aside, ignore_errors=True)
                os.replace(target, aside)
            os.replace(partial, target)
            shutil.rmtree(aside, ignore_errors=True)
    except UserError:
        raise
    except Exception as error:
        reason = full_disk(error) or full_disk_in(str(error))  # safetensors has errors of its own
        if reason is None:
            raise
        raise FullDiskError(cannot_write(reason, path)) from error


def _is_special(path: Path) -> bool:
    """Whether there is something that is neither a file nor a folder, at the end of all links."""
    return path.exists() and not (path.is_file() or path.is_dir())


def replace_durably(source: Path, target: Path) -> None:
    """Move ``source`` over ``target`` (same file system) once its bytes are on the disk."""
    with source.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(source, target)


def write_lines(path: Path, lines: Iterable[str]) -> None:
    r"""Write UTF-8 lines ended by ``\n``, whole or not at all.

    What a name of a file has that is no text is written as JSON's escapes.
    """
    options: Any = {"encoding": "utf-8", "newline": "\n", "errors": "backslashreplace"}
    with atomic_path(path) as partial, partial.open("w", **options) as file:
        for line in lines:
            file.write(line)
            file.write("\n")


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON, whole or not at all."""
    write_lines(path, [json.dumps(value, ensure_ascii=False, indent=2)])


def read_json(path: Path, shape: Any, cure: str) -> Any:
    """The content of a JSON file.

    Args:
        path: of the file.
        shape: that it must have, see :func:`misfit`.
        cure: what the user may do where it has not, for the error.

    Raises:
        UserError: it cannot be read, is cut off, or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}): {cure}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"cannot read {path} ({error}): {cure}") from error
    wrong = misfit(content, shape)
    if wrong:
        raise UserError(f"cannot read {path} ({wrong}): {cure}")
    return content


def misfit(value: Any, shape: Any, name: str = "its content") -> str:
    """How a value that was read from a file differs from what is expected; empty if it does not.

    Args:
        value: of JSON or YAML.
        shape: a type; None; a tuple of shapes, of which one is enough; ``[shape]`` for a list of
            any length; ``{"key": shape, "key?": shape, str: shape}`` for an object, where a key
            with ``?`` may be missing, and ``str`` stands for all others. A ``float`` may be whole;
            whole numbers have at most 64 bits.
        name: of the value, for the result.
    """
    if isinstance(shape, tuple):
        wrong = [misfit(value, each, name) for each in shape]
        return wrong[0] if all(wrong) else ""
    if isinstance(shape, list):
        if not isinstance(value, list):
            return f"{name} is no list"
        entries = (misfit(each, shape[0], f"entry {n} of {name}") for n, each in enumerate(value))
        return next(filter(None, entries), "")
    if isinstance(shape, dict):
        if not isinstance(value, dict):
            return f"{name} is no object"
        return next(filter(None, _misfits(value, shape)), "")
    if shape is None:
        return "" if value is None else f"{name} is not null"
    if shape in (int, float):
        whole = isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 63
        fits = whole or (shape is float and isinstance(value, float))
        return "" if fits else f"{name} is no {'whole ' * (shape is int)}number"
    return "" if isinstance(value, shape) else f"{name} is no {_KINDS.get(shape, 'value')}"


_KINDS = {str: "text", dict: "object", list: "list", bool: "true or false"}


def _misfits(value: Dict[Any, Any], shape: Dict[Any, Any]) -> Iterator[str]:
    """Of the entries of an object."""
    named = {key.rstrip("?"): key for key in shape if isinstance(key, str)}
    for key, given in named.items():
        if key in value:
            yield misfit(value[key], shape[given], f"its {key}")
        elif not given.endswith("?"):
            yield f"there is no {key}"
    for key in value.keys() - named.keys() if str in shape else ():
        yield misfit(value[key], shape[str], f"its {key}")


@contextlib.contextmanager
def scratch_folder(path: Path) -> Iterator[Path]:
    """An empty folder that is gone after the block; what a killed run left there goes first.

    Who wants the same meanwhile waits.
    """
    with in_turn(path, beside=True):
        if path.exists():
            shutil.rmtree(path)
        path.mkdir(parents=True)
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)


def decode_line(line: bytes, name: str, number: int) -> str:
    """The text of one line of a stream, without its line ending.

    Args:
        line: up to and with ``b"\\n"``, if it has one.
        name: of the stream, for the error.
        number: of the line, from 1; a byte order mark before the first is not text.

    Raises:
        UserError: the line is not UTF-8.
    """
    if number == 1 and line.startswith(codecs.BOM_UTF8):
        line = line[len(codecs.BOM_UTF8) :]
    for ending in (b"\n", b"\r"):
        if line.endswith(ending):
            line = line[:-1]
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{name}, line {number}: not UTF-8 (byte {error.start + 1} of the line); convert the "
            "text to UTF-8"
        ) from error


def check_writable(path: Path, flag: str = "--output") -> None:
    """Refuse an output that cannot become a file, before the work that it is to hold.

    Args:
        path: of the file.
        flag: that names it.

    Raises:
        UserError: ``path`` is a folder or socket, too long a name, or in a place that cannot be
            written to.
    """
    try:
        if path.is_dir():
            raise UserError(f"{path} is a folder; give {flag} the name of a file")
        os.stat(path.with_name(f".{path.name}.partial"))  # of :func:`atomic_path`
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror}); give {flag} another") from error
    if _is_special(path):
        if path.is_socket() or not os.access(path, os.W_OK):
            raise UserError(f"cannot write into {path}; give {flag} the name of a file")
        return
    target = Path(os.path.realpath(path))
    nearest = next(parent for parent in target.parents if parent.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise UserError(f"cannot write into {nearest}; choose another place with {flag}")
