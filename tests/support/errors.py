"""Check that a call is refused with the reason."""

from collections.abc import Callable
from typing import Any

import pytest

from latent_codec.errors import UserError


def refused(reason: str, call: Callable[..., Any], *args: Any, **options: Any) -> str:
    """Check that the call raises a UserError whose sentence matches the pattern, and return the sentence."""
    with pytest.raises(UserError, match=reason) as caught:
        call(*args, **options)
    return str(caught.value)


def rejected(reason: str, call: Callable[..., Any], *args: Any, **options: Any) -> None:
    """Check that the call raises a ValueError whose sentence matches the pattern."""
    with pytest.raises(ValueError, match=reason):
        call(*args, **options)
