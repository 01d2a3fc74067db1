"""Define what the training configurations share, check their numbers, and flatten JSON for logs."""

import dataclasses
from typing import Any

from latent_codec.errors import UserError
from latent_codec.storage.json_config import dumps, from_json, to_json


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """Configure the optimizer steps, the averaged weights, and how often a run logs, evaluates and saves."""

    steps: int
    """Total optimizer steps. The learning rate's schedule ends with the last one."""
    batch_size: int
    """Images per optimizer step, over all processes and micro-batches."""
    accumulation: int
    """Micro-batches per optimizer step on each process."""
    learning_rate: float
    """Peak learning rate."""
    lr_warmup_steps: int
    """Steps over which the learning rate rises linearly from 0."""
    weight_decay: float
    """Decoupled weight decay of AdamW."""
    max_grad_norm: float | None
    """Scale gradients down to this norm. None leaves them as they are."""
    ema_decay: float
    """Decay of the averaged weights, which are evaluated and exported. 0 uses the raw weights."""
    compile: bool
    """Compile the training step with torch.compile."""
    seed: int
    """Seed of the initial weights and of everything drawn in training."""
    log_every: int
    """Steps between two lines of training losses in the log."""
    eval_every: int
    """Steps between two evaluations on the validation data."""
    save_every: int
    """Steps between two checkpoints."""
    keep_checkpoints: int
    """Number of latest checkpoints to keep."""
    max_skipped: int
    """Stop after this many consecutive steps whose loss or gradient is not finite."""


def check_numbers(config: LoopConfig) -> None:
    """Raise `UserError` if a count of a configuration is not positive or a number is not finite."""
    counts = "batch_size accumulation crop log_every eval_every eval_crop save_every keep_checkpoints max_skipped"
    check_least(config, 1, *(name for name in counts.split() if hasattr(config, name)))
    check_least(config, 0, "steps")
    try:
        from_json(type(config), to_json(config))
    except ValueError as error:  # JSON would take a float that is not finite, but could not be read back
        raise UserError(f"{error}; give another value") from error


def check_least(config: object, least: float, *names: str) -> None:
    """Raise `UserError` if one of the named fields is below `least`."""
    for name in names:
        if (value := getattr(config, name)) < least:
            raise UserError(f"{name} is {value}; it must be at least {least}")


def check_interval(name: str, interval: tuple[float, float]) -> None:
    """Raise `UserError` unless an interval of quantiser steps is positive and in order."""
    if not 0 < interval[0] <= interval[1]:
        raise UserError(f"{name} is {interval}; it must be two positive steps, the smaller one first")


def flat(value: Any, name: str = "") -> dict[str, str | int | float | bool]:
    """Flatten JSON values to one level of dotted names; lists and null become text."""
    if isinstance(value, dict):
        return {k: v for key, item in value.items() for k, v in flat(item, f"{name}.{key}" if name else key).items()}
    return {name: value if isinstance(value, str | int | float) else dumps(value)}
