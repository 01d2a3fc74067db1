"""Begin and end every program of the project alike: its options in the help, and its exit code. Free of torch."""

import contextlib
import dataclasses
import io
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

import tyro
from tqdm import tqdm
from tyro.constructors import (
    ConstructorRegistry,
    PrimitiveConstructorSpec,
    PrimitiveTypeInfo,
    UnsupportedTypeAnnotationError,
)

from latent_codec.errors import UserError, printable

_NARROWEST = 40
"""Columns below which tyro's help is unreadable, or never ends."""

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


def parse(
    kind: Any, program: str, about: str | None, args: Sequence[str] | None = None, config: Sequence[Any] = ()
) -> Any:
    """Return `args`, by default those of the command line, as an object of `kind`; exit after --help or misuse."""
    if shutil.get_terminal_size().columns < _NARROWEST:
        os.environ["COLUMNS"] = str(_NARROWEST)
    return tyro.cli(kind, prog=program, description=about, args=args, config=config, registry=FLAGS)


def paragraph(lines: Iterable[object]) -> str:
    """Return lines as one text, each made `printable`: a name with a newline in it forges no line."""
    return "\n".join(map(printable, lines))


def say(text: object, *, error: bool = False) -> None:
    """Print lines to stdout, or to stderr for an error, above any progress bar; nothing else prints.

    Each line is made `printable`, but a line break stays one: make texts of several lines by `paragraph`.
    """
    stream = sys.stderr if error else sys.stdout
    with _output_errors(stream):
        tqdm.write(paragraph(str(text).split("\n")), file=stream)
        stream.flush()


CLOSED_PIPE = 141  # what a shell reports of a program that SIGPIPE ends


def exit_code(work: Callable[[], int | None]) -> int:
    """Return the exit code of `work`, 0 for None, or 141 if the reader of the output went away, as `head` does.

    Output that was closed from the start goes nowhere, and characters that its encoding lacks are written as escapes.
    Raises `UserError` if the output cannot be written, as on a full disk.
    """
    _open_streams()
    try:
        try:
            return work() or 0
        finally:
            with _output_errors(sys.stdout):
                sys.stdout.flush()
    except BrokenPipeError:
        _discard(sys.stdout, sys.stderr)
        return CLOSED_PIPE


def _open_streams() -> None:
    # A closed stream's number would go to the next file that is opened, and text for the stream into that file.
    while (null := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(null)
    for name in ("stdout", "stderr"):
        if (stream := getattr(sys, name)) is None:
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


@contextlib.contextmanager
def _output_errors(stream: TextIO) -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        _discard(stream)
        raise UserError(f"the output cannot be written: {error.strerror or error}") from error


def _discard(*streams: TextIO) -> None:
    """Let what Python has still to write when it ends go nowhere."""
    for stream in streams:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
