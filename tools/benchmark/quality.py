"""Measure the quality of models on a folder of images."""

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
from tools.benchmark.other_models import Taef2
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
