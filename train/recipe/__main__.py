"""Move a shipped model forward on one GPU, a call at a time: `python -m train.recipe --data TARS --val TAR --out RUN`.

Trains the codec from a model, measures its quantiser, encodes the images, trains the context prior, writes
RUN/photo.safetensors and a figure on validation photographs beside the model it started from. A call ends within
--minutes; the same command goes on, until all is done.
"""

import time

import tyro

from train.loop.program import main_of
from train.recipe.config import Recipe, check


def main() -> None:
    started = time.monotonic()  # before torch is imported

    def work() -> int:
        recipe = tyro.cli(Recipe, prog="train.recipe", description=__doc__)
        check(recipe)
        from train.recipe.stages import advance  # imports torch

        return advance(recipe, started)

    main_of("train.recipe", work)


if __name__ == "__main__":
    main()
