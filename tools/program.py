"""Run the command line of a tool."""

from typing import Any, NoReturn

from latent_codec.program import parse
from train.loop.program import main_of


def main(program: str, kind: Any, about: str | None) -> NoReturn:
    """Parse the command line into one of `kind` and exit with what its `run` returns; None is success."""
    main_of(program, lambda: parse(kind, program, about).run())
