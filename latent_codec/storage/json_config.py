"""Convert configuration dataclasses to JSON and back."""

import dataclasses
import functools
import json
import sys
import types
import typing
from typing import Any, Literal, Union


def to_json(config: Any) -> Any:
    """Convert a dataclass to JSON values; a class with a `kind` writes it.

    An integer in a float field becomes a float, so that equal configurations give equal JSON and equal model ids. A
    field at its default is left out: older files lack it, and their ids stay. A field renamed since its first file
    keeps its JSON key, `dataclasses.field(metadata={"json": key})`.
    """
    return _to_json(config, Any)


def _to_json(value: Any, hint: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        hints = _type_hints(type(value))
        written = [f for f in dataclasses.fields(value) if getattr(value, f.name) != f.default]
        fields = {_key(f): _to_json(getattr(value, f.name), hints[f.name]) for f in written}
        return _kind(type(value)) | fields
    if isinstance(value, (tuple, list)):
        item = (*typing.get_args(hint), Any)[0]
        return [_to_json(v, item) for v in value]
    if isinstance(value, int) and not isinstance(value, bool) and float in (hint, *typing.get_args(hint)):
        return float(value)
    return value


def _key(field: "dataclasses.Field[Any]") -> str:
    return field.metadata.get("json", field.name)


def _kind(cls: Any) -> dict[str, str]:
    return {"kind": cls.kind} if hasattr(cls, "kind") else {}


def from_json(cls: Any, value: Any, *, where: str = "config") -> Any:
    """Convert JSON values to a dataclass; the inverse of `to_json`.

    Raises `ValueError` naming the field for an unknown field, a missing one without a default, an unknown kind, or a
    value of another type.
    """
    if dataclasses.is_dataclass(cls):
        return _dataclass_from_json(cls, value, where)
    origin = typing.get_origin(cls)
    if origin in (Union, types.UnionType):
        return _union_from_json(typing.get_args(cls), value, where)
    if origin is tuple:
        if not isinstance(value, list):
            raise ValueError(f"{where}: expected a list, found {value!r}")
        item = typing.get_args(cls)[0]
        return tuple(from_json(item, v, where=f"{where}[{i}]") for i, v in enumerate(value))
    if origin is Literal:
        if value not in typing.get_args(cls):
            raise ValueError(f"{where}: {value!r} is not one of {list(typing.get_args(cls))}")
        return value
    if cls is float and type(value) in (int, float):
        if not abs(value) <= sys.float_info.max:  # also true of NaN
            raise ValueError(f"{where}: expected a finite number, found {value!r}")
        return float(value)
    if not isinstance(value, cls) or (isinstance(value, bool) and cls is not bool):
        raise ValueError(f"{where}: expected {cls.__name__}, found {value!r}")
    return value


@functools.cache
def _type_hints(cls: Any) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _dataclass_from_json(cls: Any, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise ValueError(f"{where}: expected an object, found {value!r}")
    kind, hints = _kind(cls), _type_hints(cls)
    names = {_key(f): f.name for f in dataclasses.fields(cls)}
    needed = {_key(f) for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING}
    if unknown := sorted(set(value) - {*names, *kind}):
        raise ValueError(f"{where}: unknown fields {unknown}; this version knows {list(names)}")
    if missing := sorted({*needed, *kind} - set(value)):
        raise ValueError(f"{where}: missing fields {missing}")
    if kind and value["kind"] != kind["kind"]:
        raise ValueError(f"{where}: kind {value['kind']!r} is not {kind['kind']!r}")
    return cls(
        **{
            name: from_json(hints[name], value[key], where=f"{where}.{key}")
            for key, name in names.items()
            if key in value
        }
    )


def _union_from_json(members: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and type(None) in members:
        return None
    kinds = {kind: m for m in members for kind in _kind(m).values()}
    if not kinds:
        (member,) = [m for m in members if m is not type(None)]
        return from_json(member, value, where=where)
    if not isinstance(value, dict):
        raise ValueError(f"{where}: expected an object, found {value!r}")
    if (found := value.get("kind")) not in list(kinds):  # a list, because `found` may be unhashable
        raise ValueError(f"{where}: kind {found!r} is not one of {sorted(kinds)}")
    return from_json(kinds[found], value, where=where)


def loads(text: str | bytes) -> Any:
    """Parse JSON from a file; raises `ValueError` also for NaN, infinities and what is nested too deeply."""
    try:
        return json.loads(text, parse_constant=_refuse, parse_float=_finite)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _refuse(word: str) -> None:
    raise ValueError(f"{word} is no number of JSON's")


def _finite(digits: str) -> float:
    if not abs(value := float(digits)) <= sys.float_info.max:
        raise ValueError(f"{digits} is too large")
    return value


def dumps(value: Any) -> str:
    """Return canonical JSON with sorted keys and without spaces or NaN, so that equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=False)
