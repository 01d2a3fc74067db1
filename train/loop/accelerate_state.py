"""Run training programs one after another in a process, each with its own Accelerate."""

import contextlib
import os
from collections.abc import Iterator
from typing import Literal

from accelerate.state import AcceleratorState


@contextlib.contextmanager
def accelerate_as(precision: Literal["no", "bf16"], *, cpu: bool = False) -> Iterator[None]:
    """Set the mixed precision of the programs within, as `accelerate launch` would; `cpu` keeps them off a GPU.

    Accelerate reads its settings once in a process, so its state is reset before and after.
    """
    wanted = {"ACCELERATE_MIXED_PRECISION": precision} | ({"ACCELERATE_USE_CPU": "true"} if cpu else {})
    before = {name: os.environ.get(name) for name in wanted}
    AcceleratorState._reset_state(reset_partial_state=True)
    os.environ.update(wanted)
    try:
        yield
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
