"""Begin and end every program of the project alike: its options in the help, and its exit code. Free of torch."""

import dataclasses
import os
import sys
from collections.abc import Callable

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


CLOSED_PIPE = 141  # what a shell reports of a program that SIGPIPE ends


def exit_code(work: Callable[[], int | None]) -> int:
    """Return the exit code of `work`, 0 for None, or 141 if the reader of the output went away, as `head` does."""
    try:
        try:
            return work() or 0
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        for stream in (sys.stdout, sys.stderr):  # what Python has still to write when it ends goes nowhere
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return CLOSED_PIPE
