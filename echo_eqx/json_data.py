"""Parsing JSON that may be damaged or hostile, and converting dataclasses to and from JSON."""

import dataclasses
import json
import math
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

from echo_eqx.errors import EchoError

T = TypeVar("T")
MAX_JSON_BYTES = 2**26
_MAX_CONTAINERS = 2_000_000
_MAX_NUMBER = 2**53
_MAX_LIST = 2**16


def parse_json(data: bytes) -> Any:
    """The value in an untrusted JSON file.

    NaN, infinities, duplicate names in an object, and JSON that would take far more memory than its
    bytes are refused.

    **Raises**: only `ValueError`, with the reason.
    """
    if len(data) > MAX_JSON_BYTES or data.count(b"[") + data.count(b"{") > _MAX_CONTAINERS:
        raise ValueError(
            f"expected JSON of at most {MAX_JSON_BYTES} bytes and {_MAX_CONTAINERS} arrays and "
            "objects, got more"
        )
    try:
        return json.loads(
            data,
            object_pairs_hook=_unique,
            parse_float=_finite,
            parse_constant=_refuse_constant,
        )
    except RecursionError:
        raise ValueError("its JSON is nested too deeply") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("its JSON has a duplicate name in an object")
    return found


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"its JSON has the number {text[:20]}, which is too large")
    return value


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"its JSON has the value {text}, which is not a number")


# --- Dataclasses --------------------------------------------------------------------------------


def to_json(config: Any) -> dict[str, Any]:
    """A dataclass as plain JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


def from_json(kind: type[T], data: Any, *, base: T | None = None, where: str = "") -> T:
    """Inverse of `to_json`. Fields left out are those of `base`, or else have their defaults.

    **Raises**: `EchoError` naming the field (below `where`) that is unknown, missing or of the
    wrong type.
    """
    if not isinstance(data, Mapping):
        raise EchoError(f"{where and f'{where}: '}expected an object, got {_shown(data)}")
    prefix = where and f"{where}."
    hints = typing.get_type_hints(kind)
    if unknown := sorted(set(data) - set(hints)):
        raise EchoError(f"unknown field {prefix}{unknown[0][:50]}")
    values = {
        name: _read(hints[name], data[name], getattr(base, name, None), prefix + name)
        for name in hints
        if name in data
    }
    if base is not None:
        return dataclasses.replace(base, **values)  # type: ignore[type-var]
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        default = field.default if field.default_factory is dataclasses.MISSING else None
        if field.name not in values and default is dataclasses.MISSING:
            raise EchoError(f"field {prefix}{field.name} is missing")
    return kind(**values)


def _read(hint: Any, value: Any, base: Any, where: str) -> Any:
    if isinstance(hint, types.UnionType):  # X | None
        if value is None:
            return None
        (hint,) = (option for option in typing.get_args(hint) if option is not types.NoneType)
    if dataclasses.is_dataclass(hint):
        return from_json(hint, value, base=base, where=where)  # type: ignore[arg-type]
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    number = number and abs(value) < _MAX_NUMBER  # false for infinities and NaN
    if origin is tuple:
        if isinstance(value, list | tuple) and len(value) <= _MAX_LIST:
            return tuple(
                _read(args[0], item, None, f"{where}[{i}]") for i, item in enumerate(value)
            )
    elif origin is Literal:
        if isinstance(value, str) and value in args:
            return value
    elif hint is float:
        if number:
            return float(value)
    elif hint is Path:
        if isinstance(value, str):
            return Path(value)
    elif type(value) is hint and (hint is not int or number):
        return value
    expected = f"one of {', '.join(args)}" if origin is Literal else _NAMES.get(hint, "a list")
    raise EchoError(f"{where}: expected {expected}, got {_shown(value)}")


_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "a string"}
_NAMES[Path] = "a path"


def _shown(value: Any) -> str:
    """Only plain values are printed; in a malicious file, printing others could take forever."""
    plain = isinstance(value, bool | float | str) or value is None
    plain = plain or (isinstance(value, int) and abs(value) < 2**64)
    return repr(value)[:50] if plain else f"a {type(value).__name__}"
