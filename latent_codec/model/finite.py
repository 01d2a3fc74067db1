"""Refuse numbers that are not finite, where a network's output becomes an image or a file."""

import math

import torch

from latent_codec.errors import UserError


def check_finite(x: torch.Tensor, what: str) -> None:
    """Raise `UserError` unless all numbers are finite, as they are not where float16's range ends.

    `what` begins the sentence. A compiled graph cannot ask.
    """
    if torch.compiler.is_compiling() or math.isfinite(x.detach().sum().item()):  # much cheaper than `isfinite`
        return
    if not bool(x.isfinite().all()):
        raise UserError(f"{what} not finite; try --dtype float32 or bfloat16, whose numbers do not end at 65504")
