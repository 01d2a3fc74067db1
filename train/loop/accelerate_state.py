"""Run training programs one after another in a process, each with its own Accelerate."""

import contextlib
from collections.abc import Iterator
from typing import Literal

from accelerate.state import AcceleratorState
from accelerate.utils import patch_environment


@contextlib.contextmanager
def accelerate_as(precision: Literal["no", "bf16"], *, cpu: bool = False) -> Iterator[None]:
    """Set the mixed precision of the programs within, as `accelerate launch` would; `cpu` keeps them off a GPU.
    Accelerate reads its settings once in a process, so its state is reset before and after."""
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        with patch_environment(accelerate_mixed_precision=precision, **({"accelerate_use_cpu": True} if cpu else {})):
            yield
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
