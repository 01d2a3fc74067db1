"""The exceptions that stand for a user's mistake: command lines print their sentence and no traceback."""


class UserError(ValueError):
    """One clear sentence that names the value, the limit and the remedy."""


class FatalError(UserError):
    """One that ends the work of a command over many images: the others would fare no better."""
