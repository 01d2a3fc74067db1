"""The command line. Nothing here imports torch until a command runs, so that --help answers at once."""

import gc
import sys
from typing import Annotated, Union

import tyro

from latent_codec.commands.convert import Convert
from latent_codec.commands.decode import Decode
from latent_codec.commands.encode import Encode
from latent_codec.commands.evaluate import Evaluate
from latent_codec.commands.models import Export, Import, Info
from latent_codec.commands.sample import Sample
from latent_codec.errors import UserError

Command = Union[
    Annotated[Encode, tyro.conf.subcommand("encode")],
    Annotated[Decode, tyro.conf.subcommand("decode")],
    Annotated[Info, tyro.conf.subcommand("info")],
    Annotated[Evaluate, tyro.conf.subcommand("evaluate")],
    Annotated[Export, tyro.conf.subcommand("export")],
    Annotated[Import, tyro.conf.subcommand("import")],
    Annotated[Sample, tyro.conf.subcommand("sample")],
    Annotated[Convert, tyro.conf.subcommand("convert")],
]


def main(args: list[str] | None = None) -> None:
    """Entry point; exits with 0, 1 (some images failed), 2 (usage or a user's mistake) or 130 (Ctrl-C)."""
    from latent_codec.version import __version__

    if (args if args is not None else sys.argv[1:]) == ["--version"]:
        print(f"latent-codec {__version__}")
        return
    command: Command = tyro.cli(Command, prog="latent-codec", args=args, description=_DESCRIPTION)  # pyright: ignore
    _import_torch()
    try:
        code = command.run()
    except (UserError, OSError) as error:  # an OSError is a full disk, a missing permission and the like
        print(f"latent-codec: {' '.join(str(error).splitlines())}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("latent-codec: interrupted", file=sys.stderr)
        code = 130
    sys.exit(code)


_DESCRIPTION = "Image VAEs: compress images to stochastic latents, decode them, measure and export models."


def _import_torch() -> None:
    """What every command needs; its objects, which stay, are kept from the garbage collector, then and later."""
    if "torch" not in sys.modules:
        gc.disable()
        import torch  # noqa: F401

        gc.freeze()
        gc.enable()


if __name__ == "__main__":
    main()
