"""Measure the quality of models on a folder of images."""

import dataclasses
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

from latent_codec.evaluation.evaluate import evaluate
from latent_codec.images.sources import find_images
from latent_codec.inference.options import ComputeOptions
from latent_codec.inference.runner import Runner
from latent_codec.metrics import distortion
from latent_codec.metrics.lpips import LPIPS
from latent_codec.model.codec import Codec
from latent_codec.model.likelihoods import to_signed
from tools.benchmark.peers import Taef2
from tools.benchmark.record import machine, report


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quality:
    """Evaluate models side by side on one set with `latent-codec evaluate`'s metrics, TAEF2 beside them if asked."""

    dir: tyro.conf.Positional[str]
    models: tyro.conf.Positional[tuple[str, ...]]
    """Shipped models' names or files; per-image records are kept of the first."""
    taef2: Path | None = None
    """Folder with TAEF2's encoder.safetensors and decoder.safetensors (another project's tiny autoencoder)."""
    lpips_net: Literal["alex", "squeeze", "vgg"] | None = "alex"
    lpips_backbone: Path | None = None
    out: Path | None = None
    """JSON file for the results."""

    def run(self) -> None:
        compute = ComputeOptions(batch_size=1, workers=2)
        lpips: dict[str, Any] = {"lpips_net": self.lpips_net, "lpips_backbone": self.lpips_backbone}
        reports = {
            Path(model).stem: evaluate(Runner(Codec.load(model), compute), self.dir, out=None, **lpips)
            for model in self.models
        }
        results: dict[str, dict[str, Any]] = {
            name: report.summary | {key: report.about[key] for key in ("model_id", "latent_channels", "factor")}
            for name, report in reports.items()
        }
        if self.taef2 is not None:
            results["TAEF2"] = self._taef2(self.taef2) | {"latent_channels": 32, "factor": 8}
        first = next(iter(reports.values()))
        about = {"set": first.about["set"], "images": first.about["images"], "protocol": first.protocol}
        report(results, about | machine("cpu"), self.out, command=self._command(), images=first.images)

    def _command(self) -> list[str]:
        """What makes the same results again, whoever asked for them."""
        command = ["quality", self.dir, *self.models]
        for flag, value in (
            ("--taef2", self.taef2),
            ("--lpips-net", self.lpips_net or "None"),
            ("--lpips-backbone", self.lpips_backbone),
            ("--out", self.out),
        ):
            command += [] if value is None else [flag, str(value)]
        return command

    @torch.inference_mode()
    def _taef2(self, weights: Path) -> dict[str, float]:
        peer = Taef2.load(weights)
        lpips = None if self.lpips_net is None else LPIPS(self.lpips_net, self.lpips_backbone)
        names = ["psnr", "ssim", "ms_ssim", *(["lpips"] if lpips else [])]
        rows: dict[str, list[torch.Tensor]] = {name: [] for name in names}
        for source in find_images(self.dir):
            x = source.read().pixels[None]
            y = peer.decode(peer.encode(x))
            for name in ("psnr", "ssim", "ms_ssim"):
                rows[name].append(getattr(distortion, name)(x, y))
            if lpips is not None:
                rows["lpips"].append(lpips(to_signed(x), to_signed(y)))
        return {name: distortion.mean(torch.cat(values)).value for name, values in rows.items()}
