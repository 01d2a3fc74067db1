"""Time the encoder networks beside diffusers' AutoencoderKL."""

import dataclasses
from pathlib import Path

import torch

from latent_codec.model.codec import Codec
from latent_codec.model.describe import count_flops
from tools.benchmark.commands import Contender, time_in_turn
from tools.benchmark.other_models import diffusers_autoencoder, sd_codec
from tools.benchmark.record import machine, report


@dataclasses.dataclass(frozen=True, kw_only=True)
class Encoders:
    """Time encoders: a lite model, the SD-shaped conv, and diffusers' AutoencoderKL with the same weights."""

    model: str = "photo"
    size: int = 256
    """Side of the square images, in pixels."""
    batch: int = 1
    rounds: int = 5
    """Rounds, in each of which each encoder is timed once; the median counts."""
    device: str = "cpu"
    out: Path | None = None
    """JSON file for the results."""

    @torch.inference_mode()
    def run(self) -> None:
        """Time the encoders in turn, after one round that does not count, and report seconds per image."""
        lite = Codec.load(self.model).to(self.device).to(memory_format=torch.channels_last)
        conv = sd_codec().eval().to(self.device)
        other = diffusers_autoencoder(conv).to(self.device)
        x = torch.rand(self.batch, 3, self.size, self.size, device=self.device) * 2 - 1
        difference = (conv.encode(x).mean - other.encode(x).latent_dist.mean).abs().max().item()
        contenders: dict[str, Contender] = {
            "lite": lambda _: lite.encode(x),
            "conv (SD shape)": lambda _: conv.encode(x),
            "diffusers AutoencoderKL": lambda _: other.encode(x),
        }
        time_in_turn(contenders, 1)
        seconds, _ = time_in_turn(contenders, self.rounds)
        base = seconds["diffusers AutoencoderKL"]
        results = {
            name: {"seconds": s / self.batch, "times_as_fast_as_diffusers": base / s} for name, s in seconds.items()
        }
        about = {"size": self.size, "batch": self.batch, "rounds": self.rounds, "difference": difference}
        about |= {"gflop_lite": count_flops(lite.config, self.size).encoder / 1e9}
        about |= {"gflop_conv": count_flops(conv.config, self.size).encoder / 1e9}
        report(results, about | machine(self.device), self.out)
