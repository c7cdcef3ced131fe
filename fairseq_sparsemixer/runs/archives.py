"""What a checkpoint's file holds, found without running any of it or making room for it.

A checkpoint is a zip archive of uncompressed records: a pickle (``data.pkl``) and the storage of
each tensor. torch does not compare the records with the archive's checksums, and before 2.9 not
their sizes with what the pickle says of them. Here both are compared, and the pickle is read with
stand-ins for tensors (:mod:`.tensors` puts tensors in their place): the few names that a checkpoint
of fairseq needs are known, and every other is code. What a pickle may make is counted: in a few
bytes it can say "this text of 16 MB" a million times, or a mapping whose key takes years to hash.
"""

import argparse
import collections
import math
import pickle
import re
import reprlib
import struct
import zipfile
from typing import IO, Any, BinaryIO, Callable, ClassVar, Dict, List, NamedTuple, Tuple

CHUNK = 1 << 20
"""Bytes that are read at once."""
LONGEST_PICKLE = 32 << 20
"""Bytes of the pickle: that of a model of 30,000 tensors with its optimiser has some 6 MB."""
LONGEST_DIRECTORY = 32 << 20
"""Bytes of the archive's directory: that of 90,000 tensors has some 10 MB."""
MOST_OBJECTS = 4_000_000
"""That a pickle makes or remembers: that of 30,000 tensors with their optimiser has 1.5 million."""
MOST_DIMENSIONS = 64
LARGEST, LARGEST_KEY = 1 << 63, 1 << 60
NUMBER = re.compile(r"[<>=|]?[biuf][1248]")
"""numpy's codes of numbers: no objects, no text, no records."""


class StorageKind(NamedTuple):
    """What stands for the type of a storage: torch's name of its elements, and their bytes."""

    dtype: str
    size: int


STORAGES = {
    "DoubleStorage": StorageKind("float64", 8), "LongStorage": StorageKind("int64", 8),
    "ComplexFloatStorage": StorageKind("complex64", 8), "FloatStorage": StorageKind("float32", 4),
    "IntStorage": StorageKind("int32", 4), "HalfStorage": StorageKind("float16", 2),
    "BFloat16Storage": StorageKind("bfloat16", 2), "ShortStorage": StorageKind("int16", 2),
    "CharStorage": StorageKind("int8", 1), "ByteStorage": StorageKind("uint8", 1),
    "BoolStorage": StorageKind("bool", 1),
}  # fmt: skip


class Refusal(Exception):
    """Why a checkpoint is not taken: what follows its name in a sentence."""


class Damaged(Refusal):
    """It is not as it was written."""


class Untrusted(Refusal):
    """It asks for what is not known to be harmless, and may be."""


class _Shown(reprlib.Repr):
    def repr_instance(self, x: Any, level: int) -> str:
        return repr(x) if x is None or isinstance(x, (bool, float)) else f"<{type(x).__name__}>"


_SHOWN = _Shown()
_SHOWN.maxlevel, _SHOWN.maxstring, _SHOWN.maxother = 2, 50, 50


def shown(value: Any) -> str:
    """A value in a message: short, and on one line, whatever it is."""
    text = _SHOWN.repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def named(name: str) -> str:
    """A name in a message, likewise."""
    return ascii(name[:100])[1:-1]


def reason(error: Exception) -> str:
    """An error in a message, likewise."""
    return f"{type(error).__name__}: {error}".partition("\n")[0][:200]


class _Storage(NamedTuple):
    kind: StorageKind
    record: str
    elements: int


class TensorInFile(NamedTuple):
    """What stands for a tensor: where its elements are in which storage."""

    storage: _Storage
    offset: int
    shape: Tuple[int, ...]
    stride: Tuple[int, ...]

    @property
    def record(self) -> str:
        """That which holds its storage."""
        return self.storage.record

    @property
    def bytes_held(self) -> int:
        """Those of its storage."""
        return self.storage.elements * self.storage.kind.size

    @property
    def bytes_claimed(self) -> int:
        """Those of its own elements."""
        return math.prod(self.shape) * self.storage.kind.size


def _check_sizes(*numbers: Any) -> None:
    if len(numbers) > 2 * MOST_DIMENSIONS + 1:
        raise Damaged("is damaged: a tensor has more dimensions than torch knows")
    if not all(type(number) is int and 0 <= number < LARGEST for number in numbers):
        raise Damaged("is damaged: a tensor has a size that is none")


class NumpyType:
    """What stands for numpy's ``dtype`` of numbers."""

    def __init__(self, code: str, *_: Any) -> None:
        if not isinstance(code, str) or not NUMBER.fullmatch(code):
            raise Refusal(f"holds values of numpy's type {shown(code)}, which are no numbers")
        self.code = code

    def __setstate__(self, state: Tuple[Any, ...]) -> None:
        if state[1] not in ("<", ">", "=", "|"):
            raise Damaged("is damaged: numpy knows no such order of bytes")
        self.code = f"{state[1]}{self.code}"

    def numbers(self, data: bytes) -> Any:
        """The one-dimensional array that ``data`` holds."""
        import numpy as np

        return np.frombuffer(data, dtype=self.code)


class NumpyArray:
    """What stands for an array of numpy: ``values``, a list of numbers or of such lists."""

    def __init__(self, *_: Any) -> None:
        self.values: Any = []

    def __setstate__(self, state: Tuple[Any, ...]) -> None:
        _, shape, kind, by_column, data = state
        _check_sizes(*shape)
        if 0 in shape:  # whose lists of no elements may be many
            return
        order = "F" if by_column else "C"
        self.values = kind.numbers(data).reshape(shape, order=order).tolist()


def numpy_number(kind: NumpyType, data: bytes) -> Any:
    """A Python number for one of numpy."""
    (number,) = kind.numbers(data[:16]).tolist()
    return number


def numpy_array_class() -> None:
    """Stands for the class, which a pickled array names and nothing needs."""


# numpy 1 and 2 name these differently.
NUMPY: Dict[str, Any] = {
    "numpy.dtype": NumpyType,
    "numpy.ndarray": numpy_array_class,
    "numpy.core.multiarray._reconstruct": NumpyArray,
    "numpy._core.multiarray._reconstruct": NumpyArray,
    "numpy.core.multiarray.scalar": numpy_number,
    "numpy._core.multiarray.scalar": numpy_number,
}
"""What is read in place of numpy's own, by its name in a pickle."""


def _tensor(
    storage: _Storage,
    offset: int,
    shape: Tuple[int, ...],
    stride: Tuple[int, ...],
    requires_grad: Any = None,
    hooks: Any = None,
) -> TensorInFile:
    """What stands for a tensor.

    Raises:
        Damaged: it claims more elements than its storage holds.
    """
    _check_sizes(offset, *shape, *stride)
    if not isinstance(storage, _Storage) or len(shape) != len(stride):
        raise Damaged("is damaged: a tensor has no storage or no shape")
    elements = math.prod(shape)
    last = sum((size - 1) * step for size, step in zip(shape, stride)) + offset
    if elements and max(elements, last + 1) > storage.elements:
        name = named(storage.record)
        raise Damaged(f"is damaged: a tensor claims more elements than {name} holds")
    return TensorInFile(storage, offset, tuple(shape), tuple(stride))


def _parameter(tensor: Any, *_: Any) -> Any:
    return tensor


def _size(numbers: Any) -> Any:
    if not isinstance(numbers, tuple):
        raise Damaged("is damaged: a shape is none")
    return numbers


def _ordered() -> Any:
    return collections.OrderedDict()


def _encode(text: str, encoding: str) -> bytes:
    """How old pickles hold bytes."""
    if encoding != "latin1":
        raise Refusal(f"holds bytes encoded as {shown(encoding)}, which fairseq does not write")
    return text.encode(encoding)


_KNOWN: Dict[str, Any] = {
    "argparse.Namespace": argparse.Namespace,
    "collections.OrderedDict": _ordered,
    "_codecs.encode": _encode,
    "torch.Size": _size,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
    **{f"torch.{name}": kind for name, kind in STORAGES.items()},
    **NUMPY,
}

_OPERATIONS = frozenset(
    code[0]
    for code in (
        pickle.PROTO, pickle.STOP, pickle.MARK, pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE,
        pickle.BININT, pickle.BININT1, pickle.BININT2, pickle.LONG1, pickle.BINFLOAT,
        pickle.BINUNICODE, pickle.SHORT_BINSTRING, pickle.EMPTY_DICT, pickle.EMPTY_LIST,
        pickle.EMPTY_TUPLE, pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3,
        pickle.APPEND, pickle.APPENDS, pickle.SETITEM, pickle.SETITEMS, pickle.BINGET,
        pickle.LONG_BINGET, pickle.BINPUT, pickle.LONG_BINPUT, pickle.BINPERSID, pickle.GLOBAL,
        pickle.REDUCE, pickle.NEWOBJ, pickle.BUILD,
    )
)  # fmt: skip
"""Those that torch.save writes, and torch.load reads with ``weights_only``."""
_COUNTED = (
    pickle.EMPTY_DICT, pickle.EMPTY_LIST, pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2,
    pickle.TUPLE3, pickle.LONG_BINPUT, pickle.BINPERSID, pickle.GLOBAL, pickle.REDUCE,
    pickle.NEWOBJ, pickle.BUILD,
)  # fmt: skip
"""Those that make more than they are long."""


def _counted(do: Callable[["_Unpickler"], None]) -> Callable[["_Unpickler"], None]:
    def counted(self: "_Unpickler") -> None:
        self.spend(1)
        do(self)

    return counted


class _Unpickler(pickle._Unpickler):
    """Reads a pickle with stand-ins.

    Python's own class rather than that in C, which makes room for whatever number a pickle gives
    its memo.
    """

    dispatch: ClassVar[Dict[int, Any]] = {
        key: do for key, do in pickle._Unpickler.dispatch.items() if key in _OPERATIONS
    }

    stack: List[Any]
    pop_mark: Callable[[], List[Any]]

    def __init__(self, file: IO[bytes], sizes: Dict[str, int]) -> None:
        super().__init__(file)
        self._sizes = sizes
        self._left = MOST_OBJECTS

    def spend(self, objects: int) -> None:
        """Count what is made.

        Raises:
            Refusal: it is too much.
        """
        self._left -= objects
        if self._left < 0:
            raise Refusal("holds more beside its tensors than any that fairseq writes")

    def find_class(self, module: str, name: str) -> Any:
        """A stand-in.

        Raises:
            Refusal: for a name that no checkpoint needs.
        """
        known = _KNOWN.get(f"{module}.{name}")
        if known is None:
            raise Refusal(f"holds code ({named(f'{module}.{name}')}), which is never run")
        return known

    def persistent_load(self, pid: Any) -> _Storage:
        """The storage of a tensor.

        Raises:
            Damaged: its record is missing or of another size.
        """
        _, kind, key, _, elements = pid
        # Of other types one record might have several keys, and be read as often.
        if not isinstance(kind, StorageKind) or type(key) is not str:
            raise Damaged("is damaged: a tensor has no storage")
        _check_sizes(elements)
        record = f"data/{key}"
        if self._sizes.get(record) != elements * kind.size:
            raise Damaged(f"is damaged: {named(record)} is missing or of another size")
        return _Storage(kind, record, elements)

    def _reduce(self) -> None:
        pickle._Unpickler.dispatch[pickle.REDUCE[0]](self)  # type: ignore[arg-type]
        if isinstance(self.stack[-1], bytes):
            self.spend(len(self.stack[-1]) // 32)

    def _build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, (NumpyType, NumpyArray)):
            self.spend(len(state[-1]) if isinstance(target, NumpyArray) else 1)
            target.__setstate__(state)
        elif type(target) in (argparse.Namespace, collections.OrderedDict):
            self.spend(len(state))
            if not all(type(key) is str for key in state):
                raise Damaged("is damaged: an attribute has no name")
            vars(target).update(state)
        else:
            raise Damaged("is damaged: it sets the state of what has none")

    def _new_object(self) -> None:
        arguments, kind = self.stack.pop(), self.stack.pop()
        if kind is not argparse.Namespace or arguments:
            raise Damaged("is damaged: it makes what no checkpoint holds")
        self.stack.append(argparse.Namespace())

    def _set_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set(self.stack[-1], [key], [value])

    def _set_items(self) -> None:
        items = self.pop_mark()
        self._set(self.stack[-1], items[::2], items[1::2])

    def _set(self, mapping: Any, keys: List[Any], values: List[Any]) -> None:
        for key in keys:
            # Of tuples and of large numbers, many can be made that have one hash.
            if not (key is None or type(key) in (str, bool, int, float)) or (
                type(key) is int and abs(key) >= LARGEST_KEY
            ):
                raise Refusal(f"has a mapping with the key {shown(key)}, which fairseq never has")
        if not isinstance(mapping, dict):
            raise Damaged("is damaged: it sets an entry of what has none")
        mapping.update(zip(keys, values))

    dispatch[pickle.REDUCE[0]] = _reduce
    dispatch[pickle.BUILD[0]] = _build
    dispatch[pickle.NEWOBJ[0]] = _new_object
    dispatch[pickle.SETITEM[0]] = _set_item
    dispatch[pickle.SETITEMS[0]] = _set_items
    for _code in _COUNTED:
        dispatch[_code[0]] = _counted(dispatch[_code[0]])


def verify(file: BinaryIO) -> Dict[str, int]:
    """Compare a file with its checksums, which takes about as long as reading it.

    Returns:
        The size of each record by its name, without the folder that all are in.

    Raises:
        Refusal: it is none of torch's archives, is damaged, or would take more room than it has.
    """
    try:
        return _verify(file)
    except (Refusal, OSError):
        raise
    except Exception as error:  # zipfile, zlib, struct, codecs: each has its own
        raise Damaged(f"is damaged ({reason(error)})") from error


def _verify(file: BinaryIO) -> Dict[str, int]:
    file.seek(0)
    start = file.read(4)
    total = file.seek(0, 2)
    file.seek(0)
    if start[:1] == b"\x80":
        raise Untrusted(
            "is a pickle and no archive, as torch wrote it before 1.6: it may hold code and has no "
            "checksums"
        )
    if not start.startswith(b"PK\x03\x04"):
        raise Refusal("is not a checkpoint of fairseq")
    _check_directory(file, total)
    with zipfile.ZipFile(file) as archive:
        records = archive.infolist()
        _check_records(records, total)
        for record in records:
            with archive.open(record) as stream:
                while stream.read(CHUNK):
                    pass  # the last of these raises where the checksum differs
    return {record.filename.partition("/")[2]: record.file_size for record in records}


def _check_directory(file: BinaryIO, total: int) -> None:
    """The directory has to be the last of the file, where no reader can find another."""
    file.seek(max(0, total - 98))
    end = file.read()
    directory_end = total - 22
    if end[-22:-18] != b"PK\x05\x06" or end[-2:] != b"\0\0":
        raise Damaged("is damaged: it does not end as an archive does")
    size, offset = struct.unpack("<LL", end[-10:-2])
    if end[-42:-38] == b"PK\x06\x07":  # of the large, which torch always writes
        size, offset = struct.unpack("<QQ", end[40:56])
        directory_end = total - 98
    if offset + size != directory_end:
        raise Damaged("is damaged: its directory is not where it says")
    if size > LONGEST_DIRECTORY:
        raise Refusal("holds more tensors than any that fairseq writes")


def _check_records(records: List[zipfile.ZipInfo], total: int) -> None:
    names = [record.filename for record in records]
    if any(record.orig_filename != record.filename for record in records):
        raise Damaged("is damaged: a record has two names")
    inner = {name.partition("/")[2] for name in names}
    if "constants.pkl" in inner or any(name.startswith("code/") for name in inner):
        raise Refusal("is a TorchScript archive, which is a program and no checkpoint of fairseq")
    # torch takes large letters for small ones.
    if len({name.lower() for name in names}) < len(names) or (
        len({name.partition("/")[0] for name in names}) != 1
    ):
        raise Damaged("is damaged: two records have one name, or are in two folders")
    packed = [r for r in records if r.compress_type != zipfile.ZIP_STORED]
    if packed or sum(record.file_size for record in records) > total:
        raise Damaged("is damaged: its records claim more bytes than it has")
    if "data.pkl" not in inner:
        raise Refusal("is not a checkpoint of fairseq")


def contents(file: BinaryIO) -> Any:
    """What a checkpoint holds, with a :class:`TensorInFile` for each tensor.

    Raises:
        Refusal: see :func:`verify`; or it names what no checkpoint of fairseq needs.
    """
    sizes = verify(file)
    if sizes["data.pkl"] > LONGEST_PICKLE:
        raise Refusal(f"has {sizes['data.pkl']} bytes beside its tensors, which fairseq never has")
    try:
        with zipfile.ZipFile(file) as archive:
            folder = archive.infolist()[0].filename.partition("/")[0]
            with archive.open(f"{folder}/data.pkl") as stream:
                return _Unpickler(stream, sizes).load()
    except (Refusal, OSError):
        raise
    except Exception as error:
        # A pickle is a program for a small machine, and may break it in any way.
        raise Damaged(f"is damaged or was not written by torch.save ({reason(error)})") from error
