"""Check the numbers of a configuration, and flatten it for logs."""

from typing import Any, Protocol

from latent_codec.errors import UserError
from latent_codec.storage.json_config import dumps, from_json, to_json

_COUNTS = (
    "batch_size",
    "accumulation",
    "crop",
    "log_every",
    "eval_every",
    "eval_crop",
    "save_every",
    "keep_checkpoints",
    "max_skipped",
)


class HasSteps(Protocol):
    @property
    def steps(self) -> int: ...


def _check_numbers(config: HasSteps) -> None:
    """Raise `UserError` if a count of a configuration is not positive or a number is not finite."""
    for name in _COUNTS:
        if getattr(config, name, 1) < 1:
            raise UserError(f"{name} is {getattr(config, name)}; it must be at least 1")
    if config.steps < 0:
        raise UserError(f"steps is {config.steps}; it must be at least 0")
    try:
        from_json(type(config), to_json(config))
    except ValueError as error:  # a float that is not finite would be written, but not read again
        raise UserError(f"{error}; give another value") from error


def flat(value: Any, name: str = "") -> dict[str, str | int | float | bool]:
    """JSON values as one level of dotted names; lists and null become text."""
    if isinstance(value, dict):
        return {k: v for key, item in value.items() for k, v in flat(item, f"{name}.{key}" if name else key).items()}
    return {name: value if isinstance(value, str | int | float) else dumps(value)}
