"""Begin and end a training program: its command line, its options, and its exit code. Free of torch."""

import dataclasses
import logging
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NoReturn, TypeVar

import tyro

from latent_codec.errors import UserError, printable
from latent_codec.program import exit_code, parse, say

Config = TypeVar("Config")
Run = TypeVar("Run")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Hold the options of every training program."""

    out: Path
    """The run's folder, for checkpoints, log.jsonl and results. An existing run is resumed."""
    max_minutes: float | None = None
    """End with a checkpoint after this many minutes; the same command resumes."""
    log_with: tuple[str, ...] = ()
    """Accelerate trackers besides log.jsonl: tensorboard, wandb ..."""


def main_of(program: str, work: Callable[[], int]) -> NoReturn:
    """Exit with the code that `work` returns, with 1 and one sentence for a user's mistake, or with 141.

    141 says that the reader of the output went away, as `head` does.
    """
    logging.basicConfig(level=logging.WARNING, handlers=[_Handler()])
    try:
        sys.exit(exit_code(work))
    except KeyboardInterrupt:
        say(f"{program}: interrupted", error=True)
        sys.exit(130)
    except (UserError, ValueError, OSError) as error:  # an OSError is a full disk, a missing permission and the like
        raise SystemExit(f"{program}: {printable(error)}") from error


class _Handler(logging.Handler):
    """Prints warnings above the progress bar, each as one line."""

    def emit(self, record: logging.LogRecord) -> None:
        say(printable(record.getMessage()), error=True)


def run_of_preset(
    program: str, about: str | None, presets: Mapping[str, Callable[[], Config]], run: Callable[..., Run]
) -> Run:
    """Parse the command line: a preset's name, then flags that change fields of the `run` made from it."""
    runs = {name: run(config=preset()) for name, preset in presets.items()}
    lines = {name: (preset.__doc__ or "").partition("\n")[0] for name, preset in presets.items()}
    kind = tyro.extras.subcommand_type_from_defaults(runs, lines)
    return parse(kind, program, about, config=(tyro.conf.AvoidSubcommands,))
