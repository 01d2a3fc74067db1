"""Run the command line `latent-codec`. Nothing here imports torch until a command runs: --help answers at once."""

import dataclasses
import gc
import os
import shlex
import sys

from latent_codec.commands.convert import Convert
from latent_codec.commands.decode import Decode
from latent_codec.commands.encode import Encode
from latent_codec.commands.evaluate import Evaluate
from latent_codec.commands.models import Export, Import, Info
from latent_codec.commands.sample import Sample
from latent_codec.commands.trim import Trim
from latent_codec.errors import UserError, printable
from latent_codec.program import exit_code, parse, say
from latent_codec.version import __version__

Command = Encode | Decode | Trim | Info | Evaluate | Export | Import | Sample | Convert

_PROGRAM = "latent-codec"
_DESCRIPTION = "Image VAEs: compress images to stochastic latents, decode them, measure and export models."


def main(args: list[str] | None = None) -> None:
    """Run a command and exit with 0, 1 (some images failed), 2 (user's mistake), 130 (Ctrl-C) or 141 (closed pipe)."""
    try:
        sys.exit(exit_code(lambda: _run(sys.argv[1:] if args is None else args)))
    except (UserError, OSError) as error:  # an OSError is a full disk, a missing permission and the like
        say(f"{_PROGRAM}: {printable(_sentence(error))}", error=True)
        sys.exit(2)
    except KeyboardInterrupt:
        say(f"{_PROGRAM}: interrupted", error=True)
        sys.exit(130)


def _sentence(error: Exception) -> str:
    """Return an error's text; that of the system in a user's words."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{os.fsdecode(error.filename)}: {error.strerror}; solve that and repeat the same command"
    return str(error)


def run_command(command: str) -> None:
    """Run one command with this process' arguments, as `python -m tools.COMMAND` does."""
    main([command, *sys.argv[1:]])


def _run(args: list[str]) -> int:
    if args == ["--version"]:
        say(f"{_PROGRAM} {__version__}")
        return 0
    command: Command = parse(Command, _PROGRAM, _DESCRIPTION, args)
    if isinstance(command, Evaluate):
        command = dataclasses.replace(command, command_line=shlex.join([_PROGRAM, *args]))
    _import_torch()
    return command.run()


def _import_torch() -> None:
    # Every command needs it. Its objects stay, so they are kept from the garbage collector, then and later.
    if "torch" not in sys.modules:
        gc.disable()
        import torch  # noqa: F401

        gc.freeze()
        gc.enable()


if __name__ == "__main__":
    main()
