"""Define the exceptions for mistakes of a user: a command line prints their sentence and no traceback."""


class UserError(ValueError):
    """Report a user's mistake in one sentence that names the value, the limit and the remedy."""


class FatalError(UserError):
    """End the whole command over many images, because the other images would fail in the same way."""
