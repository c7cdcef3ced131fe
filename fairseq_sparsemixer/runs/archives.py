"""What a checkpoint's file holds, found without running any of it or making room for it.

A checkpoint is a zip archive of uncompressed records: a pickle (``data.pkl``) and the storage of
each tensor. torch does not compare the records with the archive's checksums, and before 2.9 not
their sizes with what the pickle says of them. Here both are compared, and the pickle is read with
stand-ins for tensors: the few names that a checkpoint of fairseq needs are known, and every other
is code.
"""

import argparse
import collections
import math
import pickle
import re
import zipfile
from typing import IO, Any, BinaryIO, ClassVar, Dict, List, NamedTuple, Tuple

CHUNK = 1 << 20
"""Bytes that are read at once."""
LONGEST_PICKLE = 32 << 20
"""Bytes of the pickle: that of a model of 30,000 tensors with its optimiser has some 6 MB."""
NUMBER = re.compile(r"[<>=|]?[biuf][1248]")
"""numpy's codes of numbers: no objects, no text, no records."""

STORAGES = {
    "DoubleStorage": 8, "LongStorage": 8, "ComplexFloatStorage": 8, "FloatStorage": 4,
    "IntStorage": 4, "HalfStorage": 2, "BFloat16Storage": 2, "ShortStorage": 2, "CharStorage": 1,
    "ByteStorage": 1, "BoolStorage": 1,
}  # fmt: skip
"""Bytes of an element by the type of the storage."""


class Refusal(Exception):
    """Why a checkpoint is not taken: what follows its name in a sentence."""


class Damaged(Refusal):
    """It is not as it was written."""


class Untrusted(Refusal):
    """It asks for what is not known to be harmless, and may be."""


class TensorInFile(NamedTuple):
    """What stands for a tensor: its shape, and the record that holds it with its bytes."""

    shape: Tuple[int, ...]
    record: str
    bytes_held: int


class _Storage(NamedTuple):
    record: str
    elements: int
    element_size: int


class NumpyType:
    """What stands for numpy's ``dtype`` of numbers."""

    def __init__(self, code: str, *_: Any) -> None:
        if not isinstance(code, str) or not NUMBER.fullmatch(code):
            raise Refusal(f"holds values of numpy's type {code!r}, which are no numbers")
        self.code = code

    def __setstate__(self, state: Tuple[Any, ...]) -> None:
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
        order = "F" if by_column else "C"
        self.values = kind.numbers(data).reshape(shape, order=order).tolist()


def numpy_number(kind: NumpyType, data: bytes) -> Any:
    """A Python number for one of numpy."""
    (number,) = kind.numbers(data).tolist()
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
    storage: _Storage, offset: int, shape: Tuple[int, ...], stride: Tuple[int, ...], *_: Any
) -> TensorInFile:
    """What stands for a tensor.

    Raises:
        Refusal: it claims more elements than its storage holds.
    """
    elements = math.prod(shape)
    if min((offset, *shape, *stride), default=0) < 0 or len(shape) != len(stride):
        raise Damaged("is damaged: a tensor has a negative size")
    last = sum((size - 1) * step for size, step in zip(shape, stride)) + offset
    if elements and max(elements, last + 1) > storage.elements:
        raise Damaged(f"is damaged: a tensor claims more elements than {storage.record} holds")
    return TensorInFile(tuple(shape), storage.record, storage.elements * storage.element_size)


def _encode(text: str, encoding: str) -> bytes:
    """How old pickles hold bytes."""
    if encoding != "latin1":
        raise Refusal(f"holds bytes encoded as {encoding!r}, which fairseq does not write")
    return text.encode(encoding)


_KNOWN: Dict[str, Any] = {
    "argparse.Namespace": argparse.Namespace,
    "collections.OrderedDict": collections.OrderedDict,
    "_codecs.encode": _encode,
    "torch.Size": tuple,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
    **{f"torch.{name}": size for name, size in STORAGES.items()},
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


class _Unpickler(pickle._Unpickler):
    """Reads a pickle with stand-ins.

    Python's own class rather than that in C, which makes room for whatever number a pickle gives
    its memo.
    """

    dispatch: ClassVar[Dict[int, Any]] = {
        key: do for key, do in pickle._Unpickler.dispatch.items() if key in _OPERATIONS
    }

    stack: List[Any]

    def __init__(self, file: IO[bytes], sizes: Dict[str, int]) -> None:
        super().__init__(file)
        self._sizes = sizes

    def find_class(self, module: str, name: str) -> Any:
        """A stand-in.

        Raises:
            Refusal: for a name that no checkpoint needs.
        """
        known = _KNOWN.get(f"{module}.{name}")
        if known is None:
            raise Refusal(f"holds code ({module}.{name}), which is never run")
        return known

    def persistent_load(self, pid: Any) -> _Storage:
        """The storage of a tensor.

        Raises:
            Refusal: its record is missing or of another size.
        """
        _, element_size, key, _, elements = pid
        record = f"data/{key}"
        if self._sizes.get(record) != elements * element_size:
            raise Damaged(f"is damaged: {record} is missing or of another size")
        return _Storage(record, elements, element_size)

    def _build(self) -> None:
        if not isinstance(
            self.stack[-2],
            (argparse.Namespace, collections.OrderedDict, NumpyType, NumpyArray),
        ):
            raise Damaged("is damaged: it sets the state of what has none")
        pickle._Unpickler.dispatch[pickle.BUILD[0]](self)  # type: ignore[arg-type]

    def _new_object(self) -> None:
        arguments, kind = self.stack.pop(), self.stack.pop()
        if kind is not argparse.Namespace or arguments:
            raise Damaged("is damaged: it makes what no checkpoint holds")
        self.stack.append(argparse.Namespace())

    dispatch[pickle.BUILD[0]] = _build
    dispatch[pickle.NEWOBJ[0]] = _new_object


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
        reason = str(error).partition("\n")[0]
        raise Damaged(f"is damaged ({type(error).__name__}: {reason})") from error


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
    with zipfile.ZipFile(file) as archive:
        records = archive.infolist()
        _check_records(records, total)
        for record in records:
            with archive.open(record) as stream:
                while stream.read(CHUNK):
                    pass  # the last of these raises where the checksum differs
    return {record.filename.partition("/")[2]: record.file_size for record in records}


def _check_records(records: List[zipfile.ZipInfo], total: int) -> None:
    names = [record.filename for record in records]
    inner = {name.partition("/")[2] for name in names}
    if "constants.pkl" in inner or any(name.startswith("code/") for name in inner):
        raise Refusal("is a TorchScript archive, which is a program and no checkpoint of fairseq")
    if len(set(names)) < len(names) or len({name.partition("/")[0] for name in names}) != 1:
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
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise Damaged(f"is damaged or was not written by torch.save ({reason})") from error
