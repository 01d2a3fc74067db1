"""Split a batch until it fits into memory."""

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
from tqdm import tqdm

from latent_codec.errors import UserError

T = TypeVar("T")
R = TypeVar("R")


class Halving:
    """Calls on lists, which are halved, and halved again, until what is done at once fits into memory."""

    def __init__(self) -> None:
        self._most = math.inf
        """Elements that may be in one call, once it is known."""

    def __call__(
        self, call: Callable[[list[T]], Sequence[R]], items: list[T], elements: int
    ) -> Iterator[tuple[T, R | UserError]]:
        """(item, its result, or why there is none) of items that have so many elements each."""
        if not items:
            return
        results = None
        if len(items) == 1 or len(items) * elements <= self._most:
            try:
                results = call(items)
            except (MemoryError, RuntimeError) as error:
                if not _is_out_of_memory(error):
                    raise
        # The exception, whose traceback holds on to tensors, is gone by now.
        if results is not None:
            yield from zip(items, results, strict=True)
        elif len(items) == 1:
            yield (
                items[0],
                UserError("memory ran out; give a smaller --tile, a smaller --batch-size or --dtype bfloat16"),
            )
        else:
            half = len(items) // 2
            if self._most > half * elements:
                self._most = half * elements
                tqdm.write(f"memory ran out for {len(items)} images at once; going on with {half}", file=sys.stderr)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            yield from self(call, items[:half], elements)
            yield from self(call, items[half:], elements)


def _is_out_of_memory(error: Exception) -> bool:
    """A GPU's allocator has a type of its own; the CPU's says it in words."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error)
