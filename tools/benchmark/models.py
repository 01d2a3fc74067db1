"""Measure models side by side: their quality on one set, and the time of their encoders beside diffusers'."""

import dataclasses
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

from latent_codec.evaluation.evaluate import compare, evaluate, mean_defined
from latent_codec.images.sources import find_images
from latent_codec.inference.options import ComputeOptions
from latent_codec.inference.runner import Runner
from latent_codec.metrics.lpips import LPIPSOptions
from latent_codec.model.codec import Codec
from latent_codec.model.describe import count_flops
from tools.benchmark.commands import Contender, time_in_turn
from tools.benchmark.other_models import Taef2, diffusers_autoencoder, sd_codec
from tools.benchmark.record import machine, report


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quality:
    """Evaluate models side by side on one set with the metrics of `latent-codec evaluate`, optionally with TAEF2."""

    dir: tyro.conf.Positional[str]
    models: tyro.conf.Positional[tuple[str, ...]]
    """Names of shipped models or files; per-image records are kept of the first."""
    taef2: Path | None = None
    """Folder with encoder.safetensors and decoder.safetensors of TAEF2 (another project's tiny autoencoder)."""
    lpips_net: Literal["alex", "squeeze", "vgg"] | None = "alex"
    lpips_backbone: Path | None = None
    """Local safetensors file with the LPIPS network's ImageNet features; otherwise it is downloaded."""
    out: Path | None = None
    """JSON file for the results."""

    def run(self) -> None:
        """Measure all models and report the means."""
        lpips = None if self.lpips_net is None else LPIPSOptions(net=self.lpips_net, backbone=self.lpips_backbone)
        options = ComputeOptions(device="cpu", batch_size=1, workers=2)
        reports = {
            Path(model).stem: evaluate(Runner(Codec.load(model), options), self.dir, lpips=lpips)
            for model in self.models
        }
        results: dict[str, dict[str, Any]] = {
            name: report.summary | {key: report.about[key] for key in ("model_id", "latent_channels", "factor")}
            for name, report in reports.items()
        }
        if self.taef2 is not None:
            results["TAEF2"] = self._taef2(self.taef2, lpips) | {"latent_channels": 32, "factor": 8}
        first = next(iter(reports.values()))
        about = {"set": first.about["set"], "images": first.about["images"], "protocol": first.protocol}
        report(results, about | machine("cpu"), self.out, images=first.images)

    @torch.inference_mode()
    def _taef2(self, weights: Path, lpips: LPIPSOptions | None) -> dict[str, float | None]:
        model, network = Taef2.load(weights), None if lpips is None else lpips.load()
        images = (source.read().pixels[None] for source in find_images(self.dir))
        found = [compare(x, model.decode(model.encode(x)), network) for x in images]
        return {name: mean_defined([values[name] for values in found]) for name in found[0]}


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
