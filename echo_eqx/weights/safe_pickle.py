"""A pickle reader that cannot run code.

Python's `pickle` runs whatever a file names, and even with an allowlist it calls the allowed
classes. This reader interprets the opcodes itself and builds only numbers, strings, containers,
arrays and inert records. A file that names an unknown class is refused. Array bytes are views of
the file, so memory is needed only for the arrays that are read.

The format: https://github.com/python/cpython/blob/3.12/Lib/pickletools.py
"""

import math
import mmap
import pickletools
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from echo_eqx.errors import EchoError

Buffer = bytes | memoryview


@dataclass
class Record:
    """A stand-in for an object: the name of its class, its arguments and its state."""

    name: str
    args: tuple = ()
    state: Any = None


@dataclass(frozen=True)
class Global:
    """A class or function by name. It is never looked up."""

    name: str


PARSE_ERRORS = (
    AttributeError,
    IndexError,
    KeyError,
    MemoryError,
    OverflowError,
    RecursionError,
    TypeError,
    ValueError,
    struct.error,
)
"""What Python raises on malformed data."""

Builder = Callable[[tuple], Any]
"""What replaces a known class or function when it is called."""


_MARK = object()
_MAX_KEY = 256
_MAX_STEPS = 1_000_000
"""Opcodes of a pickle: each takes up to a hundred times its own byte. The largest published
checkpoint has some 100,000."""
_OPS = {ord(op.code): op for op in pickletools.opcodes}
_LENGTH_FORMATS = {
    pickletools.TAKEN_FROM_ARGUMENT1: "<B",
    pickletools.TAKEN_FROM_ARGUMENT4: "<i",
    pickletools.TAKEN_FROM_ARGUMENT4U: "<I",
    pickletools.TAKEN_FROM_ARGUMENT8U: "<Q",
}


def load(
    data: bytes | mmap.mmap,
    name: str,
    known: dict[str, Builder],
    persistent: Callable[[Any], Any] | None = None,
) -> Any:
    """The value in a pickle.

    **Arguments**: `data` the pickle; `name` of the file, for errors; `known` classes as
    `"module.name"` with what they build; `persistent` turns persistent ids into values.

    **Raises**: `EchoError` that names the file and the class, opcode or damage.
    """
    try:
        return _Machine(memoryview(data), known, persistent).run()
    except EchoError as error:
        raise EchoError(f"{name}: {error}") from None
    except PARSE_ERRORS as error:
        raise EchoError(
            f"{name}: the pickle is damaged or truncated ({type(error).__name__}: {error})"
        ) from None


class _Machine:
    def __init__(self, data: memoryview, known: dict[str, Builder], persistent):
        self.data = data
        self.known = known
        self.persistent = persistent
        self.stack: list[Any] = []
        self.copied = 0
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        position, end = 0, len(self.data)
        steps = 0
        while position < end:
            steps += 1
            if steps > _MAX_STEPS:
                raise EchoError(f"it has more than {_MAX_STEPS} values; expected a model")
            op = _OPS.get(self.data[position])
            if op is None:
                raise EchoError(
                    f"expected a pickle, got byte {self.data[position]:#x} at {position}, which is "
                    "not an opcode"
                )
            argument, position = self._argument(op, position + 1)
            if op.name == "STOP":
                (value,) = self.stack
                return value
            self._step(op.name, argument)
        raise EchoError("the pickle is truncated: it has no end")

    def _argument(self, op, position: int) -> tuple[Any, int]:
        """The raw argument of an opcode, as bytes, and where the next opcode begins."""
        if op.arg is None:
            return b"", position
        if op.arg.n >= 0:
            end = position + op.arg.n
        elif op.arg.n == pickletools.UP_TO_NEWLINE:
            end = self._newline(position)
            if op.name in ("GLOBAL", "INST"):
                end = self._newline(end)
        else:
            form = _LENGTH_FORMATS[op.arg.n]
            (length,) = struct.unpack_from(form, self.data, position)
            position += struct.calcsize(form)
            end = position + length
        if not position <= end <= len(self.data):
            raise EchoError(
                f"the pickle is truncated: {op.name} needs {end - position} bytes, "
                f"{len(self.data) - position} are left"
            )
        return self.data[position:end], end

    def _newline(self, position: int) -> int:
        line = bytes(self.data[position : position + 1000])
        return position + line.index(b"\n") + 1

    def _step(self, op: str, argument: Buffer) -> None:
        stack = self.stack
        match op:
            case "PROTO" | "FRAME":
                pass
            case "NONE":
                stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(op == "NEWTRUE")
            case "BININT":
                stack.append(int.from_bytes(argument, "little", signed=True))
            case "BININT1" | "BININT2":
                stack.append(int.from_bytes(argument, "little"))
            case "LONG1" | "LONG4":
                if len(argument) > 16:
                    raise EchoError(f"expected an integer of at most 16 bytes, got {len(argument)}")
                stack.append(int.from_bytes(argument, "little", signed=True))
            case "BINFLOAT":
                stack.append(struct.unpack(">d", argument)[0])
            case "SHORT_BINUNICODE" | "BINUNICODE" | "BINUNICODE8":
                stack.append(str(argument, "utf-8", "surrogatepass"))
            case "SHORT_BINBYTES" | "BINBYTES" | "BINBYTES8" | "BYTEARRAY8":
                stack.append(argument)
            case "SHORT_BINSTRING" | "BINSTRING":
                stack.append(str(argument, "latin-1"))
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = int(op[-1])
                if len(stack) < count:
                    raise IndexError("empty stack")
                stack[-count:] = [tuple(stack[-count:])]
            case "TUPLE":
                stack.append(tuple(self._pop_to_mark()))
            case "EMPTY_LIST":
                stack.append([])
            case "APPEND":
                value = stack.pop()
                _expect(stack[-1], list).append(value)
            case "APPENDS":
                values = self._pop_to_mark()
                _expect(stack[-1], list).extend(values)
            case "EMPTY_DICT":
                stack.append({})
            case "SETITEM":
                pair = stack[-2:]
                del stack[-2:]
                self._set_items(pair)
            case "SETITEMS":
                self._set_items(self._pop_to_mark())
            case "MARK":
                stack.append(_MARK)
            case "DUP":
                stack.append(stack[-1])
            case "MEMOIZE":
                self.memo[len(self.memo)] = stack[-1]
            case "BINPUT" | "LONG_BINPUT":
                self.memo[int.from_bytes(argument, "little")] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(self.memo[int.from_bytes(argument, "little")])
            case "GLOBAL":
                module, name = bytes(argument).decode("utf-8").split("\n")[:2]
                stack.append(self._global(module, name))
            case "STACK_GLOBAL":
                name, module = _expect(stack.pop(), str), _expect(stack.pop(), str)
                stack.append(self._global(module, name))
            case "REDUCE" | "NEWOBJ":
                args, target = _expect(stack.pop(), tuple), _expect(stack.pop(), Global)
                value = self.known[target.name](args)
                if isinstance(value, bytes):
                    # A file may contain a string once and have it encoded a million times.
                    self.copied += len(value)
                    if self.copied > len(self.data):
                        raise EchoError("its arrays are larger than the file")
                stack.append(value)
            case "BUILD":
                state = stack.pop()
                stack[-1] = self._build(stack[-1], state)
            case "BINPERSID":
                if self.persistent is None:
                    raise EchoError("the pickle refers to data outside of it")
                stack.append(self.persistent(stack.pop()))
            case _:
                raise EchoError(f"opcode {op} is refused: only plain data and arrays are read")

    def _pop_to_mark(self) -> list:
        """Pop the values above the last mark, and the mark."""
        values = []
        while (value := self.stack.pop()) is not _MARK:
            values.append(value)
        return values[::-1]

    def _set_items(self, items: list) -> None:
        target = _expect(self.stack[-1], dict)
        for key, value in zip(items[0::2], items[1::2], strict=True):
            target[_checked_key(key)] = value

    def _global(self, module: str, name: str) -> Global:
        full = f"{module}.{name}"
        if full not in self.known:
            raise EchoError(
                f"it names {full[:200]!r}, which is refused: only arrays, containers and the "
                "records of known trainers are read"
            )
        return Global(full)

    def _build(self, target: Any, state: Any) -> Any:
        if isinstance(target, Record):
            target.state = state
            if target.name == "ndarray":
                # The memo may refer to the record, so it is turned into the array in place.
                _, shape, dtype, fortran, data = state
                target.args = (array_from_bytes(data, dtype_of(dtype), shape, fortran),)
            return target
        if isinstance(target, dict):
            return target  # OrderedDict attributes such as torch's `_metadata`
        raise EchoError(f"state for a {type(target).__name__} is refused")


def _checked_key(key: Any) -> Any:
    # A tuple that holds one tuple twice, forty levels deep, is small but takes years to hash or
    # print. So nothing else is a key, and error messages print no value of unknown type.
    if not isinstance(key, str) or len(key) > _MAX_KEY:
        raise EchoError("expected short strings as dict keys, got another key")
    return key


def _expect(value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"expected a {kind.__name__}, got a {type(value).__name__}")
    return value


# --- NumPy arrays -------------------------------------------------------------------------------

_DTYPES = {
    **{code: np.dtype(code) for code in ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8")},
    **{code: np.dtype(code) for code in ("f2", "f4", "f8")},
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}


def dtype_of(value: Any) -> np.dtype:
    """The dtype that a record describes; only plain numeric dtypes are allowed."""
    if not (isinstance(value, Record) and value.name == "dtype"):
        raise EchoError("an array has no dtype")
    dtype = _DTYPES[value.args[0]]
    order = _expect(value.state[1], str) if value.state else "="
    return dtype.newbyteorder(order) if order in "<>" else dtype


def is_shape(value: Any) -> bool:
    """Whether `value` is a tuple of at most 16 sizes."""
    return (
        isinstance(value, tuple)
        and len(value) <= 16
        and all(isinstance(n, int) and n >= 0 for n in value)
    )


def array_from_bytes(data: Any, dtype: np.dtype, shape: Any, fortran: Any) -> np.ndarray:
    """An array over `data`, whose length must match shape and dtype."""
    if not isinstance(data, bytes | memoryview):
        raise EchoError("an array has no bytes")
    if not is_shape(shape):
        raise EchoError("expected the shape of an array to be a short tuple of sizes")
    if math.prod(shape) * dtype.itemsize != len(data):
        raise EchoError(f"an array of shape {shape} and type {dtype} has {len(data)} bytes of data")
    flat = np.frombuffer(data, dtype)
    return flat.reshape(shape, order="F" if fortran else "C")


def _dtype(args: tuple) -> Record:
    code = args[0]
    code = code.name.rsplit(".", 1)[1] if isinstance(code, Global) else _expect(code, str)
    if code not in _DTYPES:
        raise EchoError(f"an array of type {code[:50]!r} is refused: only numbers are read")
    return Record("dtype", (code,))


def _frombuffer(args: tuple) -> Record:
    data, dtype, shape, order, *axes = args
    array = array_from_bytes(data, dtype_of(dtype), shape, order == "F")
    if axes:  # NumPy 2 writes an array of another memory layout as the layout and its axes
        if not is_shape(axes[0]):
            raise EchoError("expected the axes of an array to be a short tuple")
        array = array.transpose(axes[0])
    return Record("ndarray", (array,))


def _scalar(args: tuple) -> Any:
    dtype, data = args
    return array_from_bytes(data, dtype_of(dtype), (), False)[()].item()


def _encode(args: tuple) -> bytes:
    text, encoding = args
    if encoding != "latin1":
        raise EchoError("bytes in an encoding other than latin1 are refused")
    return _expect(text, str).encode("latin-1")


def ordered_dict(args: tuple) -> dict:
    """`collections.OrderedDict()`, which is pickled empty and then filled."""
    if args:
        raise EchoError("an OrderedDict with arguments is refused")
    return {}


def only_global(name: str) -> Builder:
    """For a class that may be named but not called."""

    def refuse(args: tuple) -> Any:
        raise EchoError(f"a call of {name} is refused")

    return refuse


NUMPY: dict[str, Builder] = {
    "numpy.ndarray": only_global("numpy.ndarray"),
    "numpy.dtype": _dtype,
    "ml_dtypes.bfloat16": only_global("ml_dtypes.bfloat16"),
    "_codecs.encode": _encode,
    **{
        f"numpy.{core}.{module}.{name}": build
        for core in ("core", "_core")  # NumPy 1 and NumPy 2
        for module, name, build in (
            ("multiarray", "_reconstruct", lambda args: Record("ndarray")),
            ("multiarray", "scalar", _scalar),
            ("numeric", "_frombuffer", _frombuffer),
        )
    },
}
"""NumPy's arrays, scalars and types, as NumPy 1 and 2 write them."""
