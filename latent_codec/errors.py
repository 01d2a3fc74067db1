"""Define the exceptions for mistakes of a user: a command line prints their sentence and no traceback."""

import unicodedata

_UNPRINTABLE = {"Cc", "Cf", "Cs", "Zl", "Zp"}
"""Unicode's categories of control and format characters, halves of surrogate pairs, and line separators."""


def printable(text: object) -> str:
    """Return text as one line that cannot steer a terminal: control and format characters become escapes like \\x1b.

    Names and metadata from files go through this before they are printed.
    """
    return "".join(c if unicodedata.category(c) not in _UNPRINTABLE else ascii(c)[1:-1] for c in str(text))


class UserError(ValueError):
    """Report a user's mistake in one sentence that names the value, the limit and the remedy.

    Its text is `printable`, whatever names it quotes.
    """

    def __str__(self) -> str:
        return printable(super().__str__())


class FatalError(UserError):
    """End the whole command over many images, because the other images would fail in the same way."""
