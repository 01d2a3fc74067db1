"""Measure speed and quality: `python -m tools.benchmark encode|coding|quality|...`; timings are ratios in one run."""

from typing import Annotated, Any, Union

import tyro

from latent_codec.errors import UserError
from latent_codec.flags import FLAGS
from tools.benchmark import commands
from tools.benchmark.coding import Coding
from tools.benchmark.encoders import Encoders
from tools.benchmark.latents import LatentsSpeed
from tools.benchmark.quality import Quality
from tools.benchmark.training import TrainingSpeed


def main() -> None:
    """Run the command line."""
    kind = Union[
        Annotated[Encoders, tyro.conf.subcommand("encoders")],
        Annotated[commands.Encode, tyro.conf.subcommand("encode")],
        Annotated[commands.Decode, tyro.conf.subcommand("decode")],
        Annotated[commands.Loop, tyro.conf.subcommand("loop")],
        Annotated[commands.Memory, tyro.conf.subcommand("memory")],
        Annotated[Quality, tyro.conf.subcommand("quality")],
        Annotated[Coding, tyro.conf.subcommand("coding")],
        Annotated[LatentsSpeed, tyro.conf.subcommand("latents")],
        Annotated[TrainingSpeed, tyro.conf.subcommand("training")],
    ]
    command: Any = tyro.cli(kind, prog="tools.benchmark", description=__doc__, registry=FLAGS)  # pyright: ignore
    try:
        command.run()
    except UserError as error:
        raise SystemExit(f"tools.benchmark: {error}") from error


if __name__ == "__main__":
    main()
