"""Show options that may be left out plainly in the help of every program."""

import dataclasses

import tyro
from tyro.constructors import (
    ConstructorRegistry,
    PrimitiveConstructorSpec,
    PrimitiveTypeInfo,
    UnsupportedTypeAnnotationError,
)

FLAGS = ConstructorRegistry()


@FLAGS.primitive_rule
def optional(kind: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | UnsupportedTypeAnnotationError | None:
    """Show `FLOAT` for a `float | None`, where tyro shows `{None}|FLOAT`; the word None is understood as before."""
    if type(None) not in getattr(kind.type, "__args__", ()) or tyro.conf.DisallowNone in kind.markers:
        return None
    spec = ConstructorRegistry.get_primitive_spec(
        dataclasses.replace(kind, markers=kind.markers | {tyro.conf.DisallowNone})
    )
    if isinstance(spec, UnsupportedTypeAnnotationError):
        return spec
    parse = spec.instance_from_str
    return dataclasses.replace(spec, instance_from_str=lambda args: None if args == ["None"] else parse(args))
