"""Reads torch's zip format without executing anything the file contains.

A pickle is a program. Here it runs only after its opcodes were read and found harmless, and it can only build numbers,
containers, tensors whose bytes we read ourselves, and inert records for a handful of known class names; no class of
the file's is imported. Any other name is refused before it is looked up. Every object a pickle can get hold of refuses
to be changed by it, except the records, which take a plain dict of attributes.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import struct
import zipfile
from collections.abc import Callable, Iterable
from functools import cached_property, partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

MAX_PICKLE_BYTES = 16 * 1024**2
MAX_VALUES = 1_000_000  # objects that share parts can unfold to far more than the pickle holds

_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
# Protocol 2, as torch.save writes it. Left out: everything that names objects otherwise than GLOBAL does.
_OPCODES = """
    PROTO STOP MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE EMPTY_LIST EMPTY_DICT
    EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 APPEND APPENDS SETITEM SETITEMS BINGET LONG_BINGET BINPUT LONG_BINPUT
    GLOBAL REDUCE NEWOBJ BUILD BINPERSID
"""


class Record(dict[str, Any]):
    """Stands for an object of a class that is never imported: only the attributes it was pickled with."""

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
            raise pickle.UnpicklingError(f"a {type(self).__name__} was pickled in an unknown way")
        self.update(state)


class _StateDict(dict[str, Any]):
    """The top-level dict; `torch.save` attaches version metadata to it, which is not needed."""

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, dict) or set(state) - {"_metadata"}:
            raise pickle.UnpicklingError("the state dict carries unknown attributes")


class _Inert:
    """An object that BUILD cannot change."""

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("it tries to change an object that has no state")


class _StorageType(_Inert):
    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype


class _Storage(_Inert):
    """Bytes of tensors, read from the file when a tensor's numbers are wanted."""

    def __init__(self, read: Callable[[], bytes], size: int, dtype: torch.dtype) -> None:
        self._read = read
        self.size = size
        self.dtype = dtype

    @cached_property
    def data(self) -> bytes:
        data = self._read()
        if len(data) != self.size:
            raise pickle.UnpicklingError("a storage is cut short")
        return data


class _PickledTensor(_Inert):
    """Describes a tensor, whose own state stays out of the pickle's reach."""

    def __init__(self, storage: _Storage, offset: int, shape: tuple[int, ...]) -> None:
        self._storage = storage
        self._offset = offset
        self._shape = shape

    def tensor(self) -> Tensor:
        dtype, count = self._storage.dtype, prod(self._shape)
        if count == 0:
            return torch.empty(self._shape, dtype=dtype)
        start, end = self._offset * dtype.itemsize, (self._offset + count) * dtype.itemsize
        data = bytearray(memoryview(self._storage.data)[start:end])
        return torch.frombuffer(data, dtype=dtype).reshape(self._shape)

    def shape_only(self) -> Tensor:
        return torch.empty(self._shape, dtype=self._storage.dtype, device="meta")


class _MakeDict(_Inert):
    def __call__(self) -> _StateDict:
        return _StateDict()


class _MakeSet(_Inert):
    """Sets come back as lists, because hashing calls into what is hashed."""

    def __call__(self, items: Any = ()) -> list[Any]:
        if not isinstance(items, (list, tuple)):
            raise pickle.UnpicklingError("a set is described in an unknown way")
        return list(items)


class _MakeText(_Inert):
    """Enum members come back as their value."""

    def __call__(self, value: Any) -> str:
        if not isinstance(value, str):
            raise pickle.UnpicklingError("an enum value is not a text")
        return value


class _MakeTensor(_Inert):
    """Builds contiguous tensors, all together no larger than the file."""

    def __init__(self, budget_bytes: int) -> None:
        self._budget_bytes = budget_bytes

    def __call__(
        self, storage: Any, offset: Any, size: Any, stride: Any, requires_grad: Any = False, hooks: Any = None
    ) -> _PickledTensor:
        if not isinstance(storage, _Storage) or not isinstance(size, tuple) or not isinstance(stride, tuple):
            raise pickle.UnpicklingError("a tensor is described in an unknown way")
        if hooks or len(size) != len(stride) or any(type(n) is not int or n < 0 for n in (offset, *size, *stride)):
            raise pickle.UnpicklingError("a tensor is described in an unknown way")
        count = 1
        for length, step in zip(reversed(size), reversed(stride), strict=True):
            if length > 1 and step != count:
                raise pickle.UnpicklingError("a tensor is not stored contiguously")
            count *= length
        width = storage.dtype.itemsize
        self._budget_bytes -= count * width
        if (offset + count) * width > storage.size or self._budget_bytes < 0:
            raise pickle.UnpicklingError("a tensor reaches beyond its storage")
        return _PickledTensor(storage, offset, size)


class _MakeParameter(_Inert):
    def __call__(self, data: Any, requires_grad: Any = False, hooks: Any = None) -> _PickledTensor:
        if not isinstance(data, _PickledTensor) or hooks:
            raise pickle.UnpicklingError("a parameter is described in an unknown way")
        return data


class _Unpickler(pickle.Unpickler):
    def __init__(
        self, archive: zipfile.ZipFile, records: Iterable[tuple[str, str]], enums: Iterable[tuple[str, str]]
    ) -> None:
        names = [name for name in archive.namelist() if name.endswith("/data.pkl") and name.count("/") == 1]
        if len(names) != 1:
            raise pickle.UnpicklingError("it is not in torch's zip format (no data.pkl)")
        self._archive = archive
        self._prefix = names[0].removesuffix("data.pkl")
        if self._prefix + "byteorder" in archive.namelist() and self._read("byteorder", limit=16) != b"little":
            raise pickle.UnpicklingError("its numbers are not little-endian")
        program = self._read("data.pkl", limit=MAX_PICKLE_BYTES)
        _check_opcodes(program)
        self._storages: dict[str, _Storage] = {}
        self._known: dict[tuple[str, str], Any] = {
            **{("torch", name): _StorageType(dtype) for name, dtype in _DTYPES.items()},
            ("collections", "OrderedDict"): _MakeDict(),
            ("torch._utils", "_rebuild_tensor_v2"): _MakeTensor(sum(info.file_size for info in archive.infolist())),
            ("torch._utils", "_rebuild_parameter"): _MakeParameter(),
            ("__builtin__", "set"): _MakeSet(),
            ("builtins", "set"): _MakeSet(),
            **{key: type(key[1], (Record,), {}) for key in records},
            **{key: _MakeText() for key in enums},
        }
        super().__init__(io.BytesIO(program))

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._known:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which such a checkpoint does not need")
        return self._known[module, name]

    def persistent_load(self, pid: Any) -> _Storage:
        valid = isinstance(pid, tuple) and len(pid) == 5 and pid[0] == "storage" and isinstance(pid[1], _StorageType)
        if not valid or not isinstance(pid[2], str) or type(pid[4]) is not int:
            raise pickle.UnpicklingError("it refers to a storage in an unknown way")
        dtype, key, length = pid[1].dtype, pid[2], pid[4]
        if key not in self._storages:
            part, size = f"data/{key}", length * dtype.itemsize
            self._storages[key] = _Storage(partial(self._read, part, limit=size), self._check(part, size), dtype)
        storage = self._storages[key]
        if storage.dtype != dtype or storage.size != length * dtype.itemsize:
            raise pickle.UnpicklingError(f"storage {key} has another size than the {length} numbers it claims")
        return storage

    def _check(self, name: str, limit: int) -> int:
        """Size of a part of the archive that may be read."""
        info = self._archive.getinfo(self._prefix + name)
        if info.compress_type != zipfile.ZIP_STORED or info.file_size > limit:
            raise pickle.UnpicklingError(f"its part {name} is compressed or has another size than it claims")
        return info.file_size

    def _read(self, name: str, limit: int) -> bytes:
        self._check(name, limit)
        return self._archive.read(self._prefix + name)


def _check_opcodes(program: bytes) -> None:
    allowed = set(_OPCODES.split())
    for opcode, argument, _ in pickletools.genops(program):
        if opcode.name not in allowed:
            raise pickle.UnpicklingError(f"it uses the pickle instruction {opcode.name}, which torch does not write")
        # The memo is an array as long as its largest index, so an index may not exceed what the program could fill.
        if opcode.name == "LONG_BINPUT" and int(argument or 0) > len(program):
            raise pickle.UnpicklingError("its memo is larger than the pickle")


# The ways in which a damaged or hostile file makes zipfile, pickletools or the unpickler fail.
_FAILURES = (
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    struct.error,
    ArithmeticError,
    AttributeError,
    EOFError,
    ImportError,
    LookupError,
    MemoryError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
)


def load(
    path: Path, records: Iterable[tuple[str, str]], enums: Iterable[tuple[str, str]], weights: bool = True
) -> dict[str, Any]:
    """Load a flat dict saved with `torch.save`.

    Args:
        records: (module, class) names whose objects become `Record`s.
        enums: (module, class) names of text enums, whose members become `str`.
        weights: False leaves the dict's own tensors unread; they come back on the meta device.

    Returns:
        name -> tensor, number, text, container or Record; inside containers and records tensors become lists.

    Raises:
        ValueError: not such a file, damaged, or asking for anything else; nothing in it was executed.
        FileNotFoundError: no such file.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            content = _Unpickler(archive, records, enums).load()
            if not isinstance(content, _StateDict | dict) or not all(isinstance(name, str) for name in content):
                raise pickle.UnpicklingError(f"it holds a {type(content).__name__} instead of a dict of tensors")
            budget = [MAX_VALUES]
            return {name: _unfold(value, budget, weights) for name, value in content.items()}
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path} is not a checkpoint in torch's zip format, or is cut short.") from error
    except _FAILURES as error:
        raise ValueError(f"{path} was refused, and nothing in it was executed: {error}.") from error


def _unfold(value: Any, budget: list[int], weights: bool) -> Any:
    if isinstance(value, _PickledTensor):
        return value.tensor() if weights else value.shape_only()
    return _plain(value, budget)


def _plain(value: Any, budget: list[int]) -> Any:
    """A copy that holds only plain values; `budget` is how many there may still be."""
    budget[0] -= 1
    if budget[0] < 0:
        raise pickle.UnpicklingError("it holds more values than any checkpoint")
    if isinstance(value, _PickledTensor):
        return value.tensor().tolist()
    if isinstance(value, Record):
        return type(value)({name: _plain(item, budget) for name, item in value.items()})
    if isinstance(value, dict):
        return {name: _plain(item, budget) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_plain(item, budget) for item in value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise pickle.UnpicklingError(f"it holds a {type(value).__name__.strip('_')} outside of a tensor")
