"""Improve a shipped model on one GPU, in one or more calls: `python -m train.recipe --data TARS --val TAR --out RUN`.

Trains the codec from a model, measures its quantiser, encodes the images, trains the context prior, writes
RUN/photo.safetensors, and compares it with the model it started from on validation photographs. Each call ends
within --minutes. Repeat the same command until all stages are done.
"""

import time

from latent_codec.program import parse
from train.loop.program import main_of
from train.recipe.config import Recipe, check


def main() -> None:
    """Run the command line, and exit with its code."""
    started = time.monotonic()  # before torch is imported

    def work() -> int:
        recipe = parse(Recipe, "train.recipe", __doc__)
        check(recipe)
        from train.recipe.stages import Clock, advance  # imports torch

        return advance(recipe, Clock(started, recipe.minutes))

    main_of("train.recipe", work)


if __name__ == "__main__":
    main()
