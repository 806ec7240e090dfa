"""Pickles of torch's checkpoints, read without running anything. No torch.

A pickle names functions and classes and has them called. Here every name is looked up in a table of
stand-ins, which keep what they are given and do nothing; a name that is not in the table ends it.
"""

from __future__ import annotations

import io
import pickle
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from shardopt.checkpoint.entries import ITEMSIZE, RESTORE
from shardopt.errors import CorruptError

Globals = Mapping[tuple[str, str], Any]

_METADATA = "torch.distributed.checkpoint.metadata"
_FILESYSTEM = "torch.distributed.checkpoint.filesystem"
_RECORDS = (
    (_METADATA, "Metadata"),
    (_METADATA, "MetadataIndex"),
    (_METADATA, "TensorStorageMetadata"),
    (_METADATA, "BytesStorageMetadata"),
    (_METADATA, "ChunkStorageMetadata"),
    (_METADATA, "TensorProperties"),
    (_METADATA, "StorageMeta"),
    (_FILESYSTEM, "_StorageInfo"),
    (_FILESYSTEM, "_StoragePrefix"),
)
_PATHS = ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")

# Bytes lie in these, in archives of dtypes that torch knew before 2.1; torch's names of both.
_STORAGES = {
    "DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16", "LongStorage": "int64", "IntStorage": "int32",
    "ShortStorage": "int16", "CharStorage": "int8", "ByteStorage": "uint8", "BoolStorage": "bool",
    "ComplexFloatStorage": "complex64", "ComplexDoubleStorage": "complex128",
}  # fmt: skip


class Record:
    """Stands for an object of any class: keeps its state.

    Attributes:
        state: what the object was pickled as: mostly its attributes by name.
    """

    state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


@dataclass(frozen=True)
class StoredTensor:
    """How a tensor lies in its storage; offset and strides in elements."""

    dtype: str
    record: str  # name of the storage in the archive
    offset: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    flags: tuple[str, ...]  # what is still to be done to the elements: "conj", "neg"


def unpickle(data: bytes, allowed: Globals, where: str) -> Any:
    """What a pickle holds, made of builtin values and stand-ins.

    Args:
        allowed: module and name -> stand-in.
        where: file and entry, for errors.

    Raises:
        CorruptError: it names anything else, or is none.
    """
    try:
        return _AllowListUnpickler(data, allowed, where).load()
    except CorruptError:
        raise
    except Exception as problem:  # a stand-in that is given nonsense raises anything
        raise CorruptError(
            f"{where}: expected a pickle that torch has written, got {type(problem).__name__}: "
            f"{problem}; {RESTORE}"
        ) from None


class _AllowListUnpickler(pickle.Unpickler):
    def __init__(self, data: bytes, allowed: Globals, where: str):
        super().__init__(io.BytesIO(data))
        self._allowed, self._where = allowed, where

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._allowed[module, name]
        except KeyError:
            raise CorruptError(
                f"{self._where}: expected sizes, dtypes and what "
                f"torch.distributed.checkpoint keeps of tensors, got the global {module}.{name}, "
                "which would run code; nothing was run: do not trust this checkpoint, or write it "
                "again without that object"
            ) from None

    def persistent_load(self, pid: Any) -> Any:
        return pid


def metadata_globals() -> dict[tuple[str, str], Any]:
    """For the file ``.metadata``: a class of ``Record`` for each class of torch's."""
    table: dict[tuple[str, str], Any] = {
        (module, name): type(name, (Record,), {}) for module, name in _RECORDS
    }
    table[_METADATA, "_MEM_FORMAT_ENCODING"] = _fresh(_the_first)
    table["torch.serialization", "_get_layout"] = _fresh(_the_first)
    for module in ("pathlib", "pathlib._local"):
        table.update({(module, name): _fresh(_joined) for name in _PATHS})
    table["builtins", "set"] = set
    return table | _common()


def tensor_globals() -> dict[tuple[str, str], Any]:
    """For the ``data.pkl`` of one tensor, which becomes a ``StoredTensor``."""
    storages: dict[tuple[str, str], Any] = {
        ("torch", name): dtype for name, dtype in _STORAGES.items()
    }
    return {
        **storages,
        ("torch.storage", "UntypedStorage"): "",
        ("torch._utils", "_rebuild_tensor_v2"): _fresh(_tensor_v2),
        ("torch._utils", "_rebuild_tensor_v3"): _fresh(_tensor_v3),
        **_common(),
    }


def _common() -> dict[tuple[str, str], Any]:
    table: dict[tuple[str, str], Any] = {("torch", name): name for name in ITEMSIZE}
    table["torch", "Size"] = tuple
    table["collections", "OrderedDict"] = OrderedDict
    return table


def _fresh(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of its own, since a pickle can set the attributes of what it is given."""
    return lambda *arguments: function(*arguments)


def _the_first(value: Any) -> Any:
    return value


def _joined(*parts: str) -> str:
    return "/".join(parts)


def _tensor_v2(
    storage: tuple[Any, ...],
    offset: int,
    sizes: tuple[int, ...],
    strides: tuple[int, ...],
    requires_grad: bool,
    hooks: Any,
    metadata: Mapping[str, bool] | None = None,
) -> StoredTensor:
    return _tensor_v3(storage, offset, sizes, strides, requires_grad, hooks, storage[1], metadata)


def _tensor_v3(
    storage: tuple[Any, ...],  # "storage", its dtype, its name, device, length
    offset: int,
    sizes: tuple[int, ...],
    strides: tuple[int, ...],
    requires_grad: bool,
    hooks: Any,
    dtype: str,
    metadata: Mapping[str, bool] | None = None,
) -> StoredTensor:
    flags = tuple(name for name, is_set in (metadata or {}).items() if is_set)
    if dtype not in ITEMSIZE:
        raise ValueError(f"dtype {dtype!r}")
    return StoredTensor(dtype, str(storage[2]), int(offset), ints(sizes), ints(strides), flags)


def ints(values: Any) -> tuple[int, ...]:
    """Sizes, offsets or strides. Raises ``TypeError`` or ``ValueError``."""
    numbers = tuple(values)
    if any(type(number) is not int or number < 0 for number in numbers):
        raise ValueError(f"expected integers of 0 or more, got {numbers}")
    return numbers
