"""Name the code that made a file."""

import contextlib
import subprocess
from pathlib import Path


def git_commit() -> str | None:
    """Return the checkout's commit, with "+" if files have changed since, or None outside a checkout."""
    folder = str(Path(__file__).parent)
    command = ["git", "-C", folder, "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"]
    with contextlib.suppress(OSError):
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        return result.stdout.strip() or None
    return None
