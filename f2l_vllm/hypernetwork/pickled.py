"""Reads torch's zip format without executing anything the file contains.

A pickle is a program. Here it runs only after its opcodes were read and found harmless. It can only build numbers,
containers, tensors whose bytes we read ourselves, and inert records for a handful of known class names; no class that
the file names is imported. Any other name is refused before it is looked up. A pickle cannot change any object that it
can reach, except the records, which take a plain dict of attributes.

The unpickler is Python's own, not the one in C, because the interpreter watches its recursion and memory. Keys of dicts
must be texts or numbers, because hashing a tuple follows everything in it, in C, as deep and as often as it is nested.

torch's own restricted loader (`weights_only=True`, torch 2.13) cannot take this module's place: it executes nothing of
the 54 hostile files in the tests either, but four of them end or hang its process, and it accepts twelve.

Run as a program, this module examines a file: it reads the file without its tensors, with little memory and time, and
needs only the standard library.
"""

from __future__ import annotations

import io
import json
import pickle
import pickletools
import resource
import struct
import sys
import zipfile
from collections.abc import Callable, Iterable
from functools import cached_property, partial
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor

MAX_PICKLE_BYTES = 16 * 1024**2
MAX_OPCODES = 1_000_000  # the released checkpoints have some 20,000
MAX_VALUES = 1_000_000  # objects that share parts can unfold to far more values than the pickle holds
MAX_DEPTH = 64
MAX_PARTS = 100_000
EXAMINED_BYTES, EXAMINED_SECONDS = 1 << 30, 60  # address space and CPU time of the process that examines a file
REFUSED = 3

# torch's name of a storage type -> dtype, bytes per number.
_DTYPES = {
    "DoubleStorage": ("float64", 8),
    "FloatStorage": ("float32", 4),
    "HalfStorage": ("float16", 2),
    "BFloat16Storage": ("bfloat16", 2),
    "LongStorage": ("int64", 8),
    "IntStorage": ("int32", 4),
    "ShortStorage": ("int16", 2),
    "CharStorage": ("int8", 1),
    "ByteStorage": ("uint8", 1),
    "BoolStorage": ("bool", 1),
}
# Protocol 2, as torch.save writes it, without the opcodes other than GLOBAL that name objects.
_OPCODES = """
    PROTO STOP MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE EMPTY_LIST EMPTY_DICT
    EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 APPEND APPENDS SETITEM SETITEMS BINGET LONG_BINGET BINPUT LONG_BINPUT
    GLOBAL REDUCE NEWOBJ BUILD BINPERSID
"""


class Record(dict[str, Any]):
    """Stands for an object of a class that is never imported; holds only the pickled attributes."""

    def __init__(self) -> None:  # a dict would take pairs, and hash their keys
        super().__init__()

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
    def __init__(self, name: str, width: int) -> None:
        self.name = name
        self.width = width

    @property
    def dtype(self) -> torch.dtype:
        import torch

        found: torch.dtype = getattr(torch, self.name)
        return found


class _Storage(_Inert):
    """Bytes of tensors, read from the file when a tensor's numbers are needed."""

    def __init__(self, read: Callable[[], bytes], size: int, type_: _StorageType) -> None:
        self._read = read
        self.size = size
        self.type = type_

    @cached_property
    def data(self) -> bytes:
        data = self._read()
        if len(data) != self.size:
            raise pickle.UnpicklingError("a storage is cut short")
        return data


class PickledTensor(_Inert):
    """Describes a tensor, whose own state stays out of the pickle's reach."""

    def __init__(self, storage: _Storage, offset: int, shape: tuple[int, ...]) -> None:
        self._storage = storage
        self._offset = offset
        self._shape = shape

    @property
    def numbers(self) -> int:
        return prod(self._shape)

    @cached_property
    def tensor(self) -> Tensor:
        """Always the same tensor, however often the file names it."""
        import torch

        type_, count = self._storage.type, self.numbers
        if count == 0:
            return torch.empty(self._shape, dtype=type_.dtype)
        start, end = self._offset * type_.width, (self._offset + count) * type_.width
        data = bytearray(memoryview(self._storage.data)[start:end])
        return torch.frombuffer(data, dtype=type_.dtype).reshape(self._shape)

    def shape_only(self) -> Tensor:
        import torch

        return torch.empty(self._shape, dtype=self._storage.type.dtype, device="meta")


class _MakeDict(_Inert):
    def __call__(self) -> _StateDict:
        return _StateDict()


class _MakeSet(_Inert):
    """Sets become lists, because hashing would call methods of the members."""

    def __call__(self, items: Any = ()) -> list[Any]:
        if not isinstance(items, (list, tuple)):
            raise pickle.UnpicklingError("a set is described in an unknown way")
        return list(items)


class _MakeText(_Inert):
    """Enum members become their values."""

    def __call__(self, value: Any) -> str:
        if not isinstance(value, str):
            raise pickle.UnpicklingError("an enum value is not a text")
        return value


class _MakeTensor(_Inert):
    """Builds contiguous tensors, which together are no larger than the file."""

    def __init__(self, budget_bytes: int) -> None:
        self._budget_bytes = budget_bytes

    def __call__(
        self, storage: Any, offset: Any, size: Any, stride: Any, requires_grad: Any = False, hooks: Any = None
    ) -> PickledTensor:
        if not isinstance(storage, _Storage) or not isinstance(size, tuple) or not isinstance(stride, tuple):
            raise pickle.UnpicklingError("a tensor is described in an unknown way")
        if hooks or len(size) != len(stride) or any(type(n) is not int or n < 0 for n in (offset, *size, *stride)):
            raise pickle.UnpicklingError("a tensor is described in an unknown way")
        count = 1
        for length, step in zip(reversed(size), reversed(stride), strict=True):
            if length > 1 and step != count:
                raise pickle.UnpicklingError("a tensor is not stored contiguously")
            count *= length
        width = storage.type.width
        self._budget_bytes -= count * width
        if (offset + count) * width > storage.size or self._budget_bytes < 0:
            raise pickle.UnpicklingError("a tensor reaches beyond its storage")
        return PickledTensor(storage, offset, size)


class _MakeParameter(_Inert):
    def __call__(self, data: Any, requires_grad: Any = False, hooks: Any = None) -> PickledTensor:
        if not isinstance(data, PickledTensor) or hooks:
            raise pickle.UnpicklingError("a parameter is described in an unknown way")
        return data


_PythonUnpickler: Any = pickle._Unpickler  # the unpickler in C does not let its instructions be replaced


class _Unpickler(_PythonUnpickler):
    def __init__(
        self,
        archive: zipfile.ZipFile,
        records: Iterable[tuple[str, str]],
        enums: Iterable[tuple[str, str]],
        file_bytes: int,
    ) -> None:
        if len(archive.namelist()) > MAX_PARTS:
            raise pickle.UnpicklingError(f"it has more than {MAX_PARTS} parts")
        names = [name for name in archive.namelist() if name.endswith("/data.pkl") and name.count("/") == 1]
        if len(names) != 1:
            raise pickle.UnpicklingError("it is not in torch's zip format (no data.pkl)")
        self._archive = archive
        self._prefix = names[0].removesuffix("data.pkl")
        if self._prefix + "byteorder" in archive.namelist() and self._read("byteorder", limit=16) != b"little":
            raise pickle.UnpicklingError("its numbers are not little-endian")
        if sum(info.file_size for info in archive.infolist()) > file_bytes:
            raise pickle.UnpicklingError("its parts are compressed or overlap: together they are larger than the file")
        program = self._read("data.pkl", limit=MAX_PICKLE_BYTES)
        _check_opcodes(program)
        self._storages: dict[str, _Storage] = {}
        self._known: dict[tuple[str, str], Any] = {
            **{("torch", name): _StorageType(*dtype) for name, dtype in _DTYPES.items()},
            ("collections", "OrderedDict"): _MakeDict(),
            ("torch._utils", "_rebuild_tensor_v2"): _MakeTensor(file_bytes),
            ("torch._utils", "_rebuild_parameter"): _MakeParameter(),
            ("__builtin__", "set"): _MakeSet(),
            ("builtins", "set"): _MakeSet(),
            **{key: type(key[1], (Record,), {}) for key in records},
            **{key: _MakeText() for key in enums},
        }
        super().__init__(io.BytesIO(program))

    def _set_item(self) -> None:
        _check_keys(self.stack[-2:-1])
        self.load_setitem()

    def _set_items(self) -> None:
        _check_keys(self.stack[::2])
        self.load_setitems()

    dispatch = {  # noqa: RUF012
        **_PythonUnpickler.dispatch,
        pickle.SETITEM[0]: _set_item,
        pickle.SETITEMS[0]: _set_items,
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._known:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which such a checkpoint does not need")
        return self._known[module, name]

    def persistent_load(self, pid: Any) -> _Storage:
        valid = isinstance(pid, tuple) and len(pid) == 5 and pid[0] == "storage" and isinstance(pid[1], _StorageType)
        if not valid or not isinstance(pid[2], str) or type(pid[4]) is not int:
            raise pickle.UnpicklingError("it refers to a storage in an unknown way")
        type_, key, length = pid[1], pid[2], pid[4]
        if key not in self._storages:
            part, size = f"data/{key}", length * type_.width
            self._storages[key] = _Storage(partial(self._read, part, limit=size), self._check(part, size), type_)
        storage = self._storages[key]
        if storage.type is not type_ or storage.size != length * type_.width:
            raise pickle.UnpicklingError(f"storage {key} has another size than the {length} numbers it claims")
        return storage

    def _check(self, name: str, limit: int) -> int:
        """Check that a part of the archive may be read; returns its size."""
        info = self._archive.getinfo(self._prefix + name)
        if info.compress_type != zipfile.ZIP_STORED or info.file_size > limit:
            raise pickle.UnpicklingError(f"its part {name} is compressed or has another size than it claims")
        return info.file_size

    def _read(self, name: str, limit: int) -> bytes:
        self._check(name, limit)
        return self._archive.read(self._prefix + name)


def _check_opcodes(program: bytes) -> None:
    allowed = set(_OPCODES.split())
    for count, (opcode, argument, _) in enumerate(pickletools.genops(program)):
        if opcode.name not in allowed:
            raise pickle.UnpicklingError(f"it uses the pickle instruction {opcode.name}, which torch does not write")
        if opcode.name == "LONG_BINPUT" and int(argument or 0) > MAX_OPCODES:
            raise pickle.UnpicklingError("its memo is larger than the pickle")
        if count > MAX_OPCODES:
            raise pickle.UnpicklingError(f"its pickle has more than {MAX_OPCODES} instructions")


def _check_keys(keys: Iterable[Any]) -> None:
    for key in keys:
        if key is not None and not isinstance(key, (str, int, float)):
            raise pickle.UnpicklingError(f"it has a {type(key).__name__.strip('_')} for a key")


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


def read(
    path: Path,
    records: Iterable[tuple[str, str]],
    enums: Iterable[tuple[str, str]],
    unfold: Callable[[PickledTensor], Any],
) -> dict[str, Any]:
    """Read a file in this process; returns and raises like `unpickle.load`.

    Args:
        unfold: converts the dict's own tensors.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            content = _Unpickler(archive, records, enums, path.stat().st_size).load()
            if not isinstance(content, _StateDict | dict) or not all(isinstance(name, str) for name in content):
                raise pickle.UnpicklingError(f"it holds a {type(content).__name__} instead of a dict of tensors")
            values = _Values(unfold)
            return {name: values.top(value) for name, value in content.items()}
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path} is not a checkpoint in torch's zip format, or is cut short.") from error
    except _FAILURES as error:
        raise ValueError(f"{path} was refused, and nothing in it was executed: {error}.") from error


def _main() -> int:
    known = json.load(sys.stdin)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (EXAMINED_BYTES, EXAMINED_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (EXAMINED_SECONDS, EXAMINED_SECONDS))
    records, enums = ([tuple(one) for one in known[name]] for name in ("records", "enums"))
    try:
        read(Path(sys.argv[1]), records, enums, lambda tensor: None)
    except ValueError as error:
        sys.stdout.write(str(error))
        return REFUSED
    return 0


class _Values:
    """Turns what a pickle built into plain values, at most `MAX_VALUES`."""

    def __init__(self, unfold: Callable[[PickledTensor], Any]) -> None:
        self._unfold = unfold
        self._left = MAX_VALUES

    def top(self, value: Any) -> Any:
        """A value of the top-level dict; only its tensors are kept as tensors."""
        return self._unfold(value) if isinstance(value, PickledTensor) else self._plain(value, MAX_DEPTH)

    def _plain(self, value: Any, depth: int) -> Any:
        self._left -= value.numbers if isinstance(value, PickledTensor) else 1
        if self._left < 0:
            raise pickle.UnpicklingError("it holds more values than any checkpoint")
        if depth < 0:
            raise pickle.UnpicklingError(f"its values are nested more than {MAX_DEPTH} deep")
        if isinstance(value, PickledTensor):
            return [] if self._unfold(value) is None else value.tensor.tolist()
        if isinstance(value, dict):
            record = type(value)() if isinstance(value, Record) else {}
            record.update({name: self._plain(item, depth - 1) for name, item in value.items()})
            return record
        if isinstance(value, (list, tuple)):
            return type(value)(self._plain(item, depth - 1) for item in value)
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        raise pickle.UnpicklingError(f"it holds a {type(value).__name__.strip('_')} outside of a tensor")


if __name__ == "__main__":
    sys.exit(_main())
