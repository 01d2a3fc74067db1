"""Split batches until they fit into memory, or until the item that is refused is alone."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch

from latent_codec.errors import FatalError, UserError
from latent_codec.program import say

T = TypeVar("T")
R = TypeVar("R")


class OutOfMemoryBackoff:
    """Call a function on lists, and on their halves and quarters where memory runs out, remembering what fits."""

    def __init__(self) -> None:
        self._limit = math.inf
        """Elements that one call may have at most."""

    def map(
        self, call: Callable[[list[T]], Sequence[R]], items: list[T], elements: int
    ) -> Iterator[tuple[T, R | UserError]]:
        """Yield each item with its result, or with the reason why it has none; an item has `elements` elements.

        A `UserError` is that of one item, which fails alone; a `FatalError` is raised.
        """
        if not items:
            return
        results, refusal = None, None
        if len(items) == 1 or len(items) * elements <= self._limit:
            try:
                results = call(items)
            except FatalError:
                raise
            except UserError as error:
                refusal = UserError(*error.args)
            except (MemoryError, RuntimeError) as error:
                if not _is_out_of_memory(error):
                    raise
        # The exception, whose traceback holds on to tensors, is gone by now.
        if results is not None:
            yield from zip(items, results, strict=True)
        elif len(items) == 1:
            reason = "memory ran out; give a smaller --tile, a smaller --batch-size or --dtype bfloat16"
            yield items[0], refusal or UserError(reason)
        else:
            half = len(items) // 2
            if refusal is None and self._limit > half * elements:
                self._limit = half * elements
                say(f"memory ran out for {len(items)} images at once; going on with {half}", error=True)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            yield from self.map(call, items[:half], elements)
            yield from self.map(call, items[half:], elements)

    def call(self, function: Callable[[], R]) -> R:
        """Return what `function` does for one item; raises `UserError` if memory runs out."""
        ((_, result),) = self.map(lambda _: [function()], [None], 0)
        if isinstance(result, UserError):
            raise result
        return result


def _is_out_of_memory(error: Exception) -> bool:
    # A GPU's allocator has a type of its own; the CPU's says it in words.
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error)
