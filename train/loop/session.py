"""Begin and end what every training run has: connected processes, a clock, and the lock of its folder."""

import contextlib
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, broadcast_object_list

from latent_codec.errors import UserError
from train.loop.interrupts import Interrupts
from train.loop.program import RunOptions

T = TypeVar("T")
_PATIENCE = timedelta(hours=6)  # other processes wait while the main one evaluates, saves, or freezes a prior


class Session(NamedTuple):
    """Hold what a run has from its beginning to its end."""

    accelerator: Accelerator
    interrupts: Interrupts
    held: contextlib.ExitStack
    """Is closed at the end: the lock of the run's folder."""


@contextlib.contextmanager
def begin(run: RunOptions) -> Iterator[Session]:
    """Connect the processes, start the clock of the time limit, and let go of the run's folder at the end."""
    handlers = [
        InitProcessGroupKwargs(timeout=_PATIENCE),
        DistributedDataParallelKwargs(broadcast_buffers=False),  # buffers are constants
    ]
    accelerator = Accelerator(
        log_with=list(run.log_with) or None, project_dir=str(run.out), kwargs_handlers=[*handlers]
    )
    interrupts = Interrupts(run.max_minutes)
    accelerator.wait_for_everyone()  # a process that fails before the others have connected would strand them
    with contextlib.ExitStack() as held:
        yield Session(accelerator, interrupts, held)


def once(accelerator: Accelerator, make: Callable[[], T]) -> T:
    """Return on every process what `make` returns on the main one; what it raises there is a `UserError` on others."""
    found: list[Any] = [None, ""]
    if accelerator.is_main_process:
        try:
            found[0] = make()
        except Exception as error:  # the others must hear of it, or they would wait
            broadcast_object_list([None, str(error) or repr(error)])
            raise
    broadcast_object_list(found)
    if found[1]:
        raise UserError(found[1])
    return found[0]
