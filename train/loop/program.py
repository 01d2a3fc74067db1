"""How a training program begins and ends: its command line, and what a mistake or a signal makes of the exit code."""

import logging
import sys
from collections.abc import Callable, Mapping
from typing import NoReturn, TypeVar

import tyro

from latent_codec.errors import UserError

Config = TypeVar("Config")
Run = TypeVar("Run")


def main_of(program: str, work: Callable[[], int]) -> NoReturn:
    """Exit with what `work` returns, or with 1 and one sentence for a user's mistake."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        code = work()
    except (UserError, ValueError) as error:
        raise SystemExit(f"{program}: {error}") from error
    sys.exit(code)


def run_of_preset(
    program: str, about: str | None, presets: Mapping[str, Callable[[], Config]], run: Callable[[Config], Run]
) -> Run:
    """What the command line asks for: a preset by name, made a `run`, with the fields that flags give."""
    runs = {name: run(preset()) for name, preset in presets.items()}
    lines = {name: (preset.__doc__ or "").splitlines()[0] for name, preset in presets.items()}
    kind = tyro.extras.subcommand_type_from_defaults(runs, lines)
    return tyro.cli(kind, prog=program, description=about, config=(tyro.conf.AvoidSubcommands,))
