"""Programs that run one after another in a process, each with an Accelerate of its own."""

import contextlib
import os
from collections.abc import Iterator
from typing import Literal

from accelerate.state import AcceleratorState


@contextlib.contextmanager
def accelerate_as(precision: Literal["no", "bf16"], *, cpu: bool = False) -> Iterator[None]:
    """What the programs within run in, as if `accelerate launch` said so: a process sets it up once by itself.

    `cpu` keeps them off a GPU that is there.
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
