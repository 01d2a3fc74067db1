"""Measure speed and quality: `python -m tools.benchmark encode|coding|quality|...`; timings are ratios in one run."""

from typing import Annotated

from tyro.conf import subcommand

from tools.benchmark.coding import Coding
from tools.benchmark.commands import Decode, Encode, Loop, Memory
from tools.benchmark.latents import LatentsSpeed
from tools.benchmark.models import Encoders, Quality
from tools.benchmark.training import TrainingSpeed
from tools.program import main

Latents, Training = Annotated[LatentsSpeed, subcommand("latents")], Annotated[TrainingSpeed, subcommand("training")]

if __name__ == "__main__":
    main("tools.benchmark", Encoders | Encode | Decode | Loop | Memory | Quality | Coding | Latents | Training, __doc__)
