"""Begin and end a training program: its command line, its options, and its exit code."""

import dataclasses
import logging
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, TypeVar

import tyro

from latent_codec.errors import UserError

if TYPE_CHECKING:
    from accelerate import Accelerator

    from train.loop.interrupts import Interrupts

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
    """Exit with the code that `work` returns, or with 1 and one sentence if the user made a mistake."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        code = work()
    except (UserError, ValueError) as error:
        raise SystemExit(f"{program}: {error}") from error
    sys.exit(code)


def run_of_preset(
    program: str, about: str | None, presets: Mapping[str, Callable[[], Config]], run: Callable[[Config], Run]
) -> Run:
    """Parse the command line: a preset's name, then flags that change fields of the `run` made from it."""
    runs = {name: run(preset()) for name, preset in presets.items()}
    lines = {name: (preset.__doc__ or "").splitlines()[0] for name, preset in presets.items()}
    kind = tyro.extras.subcommand_type_from_defaults(runs, lines)
    return tyro.cli(kind, prog=program, description=about, config=(tyro.conf.AvoidSubcommands,))


def begin(run: RunOptions) -> "tuple[Accelerator, Interrupts]":
    """Connect the processes and start the clock of the time limit."""
    from accelerate import Accelerator  # slow to import, as torch is

    from train.loop.interrupts import Interrupts

    accelerator = Accelerator(log_with=list(run.log_with) or None, project_dir=str(run.out))
    interrupts = Interrupts(run.max_minutes)
    accelerator.wait_for_everyone()  # a process that fails before the others have connected would strand them
    return accelerator, interrupts
