"""The one exception that stands for a user's mistake: command lines print its sentence and no traceback."""


class UserError(ValueError):
    """One clear sentence that names the value, the limit and the remedy."""
