"""Measure, then claim: `python -m tools.benchmark encode|peers ...`. Timings are ratios within one run."""

import dataclasses
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Union

import torch
import tyro
from diffusers import AutoencoderKL

from latent_codec import metrics
from latent_codec.codec import Codec
from latent_codec.config import CodecConfig, ConvConfig, DiagonalGaussianConfig, GaussianConfig
from latent_codec.files import write_text
from latent_codec.info import count_flops
from latent_codec.inputs import find_images
from latent_codec.perceptual import LPIPS
from tools.peers import Taef2

SD = ConvConfig(
    widths=(128, 256, 512, 512),
    layers_per_block=2,
    groups=32,
    mid_attention=True,
    quant_conv=True,
    post_quant_conv=True,
)
"""Stable Diffusion's AutoencoderKL."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Encode:
    """Time encoders: a lite model, the SD-shaped conv, and diffusers' AutoencoderKL with the same weights."""

    model: str = "photo"
    size: int = 256
    """Side of the square images, in pixels."""
    batch: int = 1
    rounds: int = 5
    """Each encoder is timed once per round, in turn, so that noise hits all alike."""
    device: str = "cpu"
    out: Path | None = None
    """JSON file for the results."""

    @torch.inference_mode()
    def run(self) -> None:
        lite = Codec.load(self.model).to(self.device).to(memory_format=torch.channels_last)
        config = CodecConfig(
            image_channels=3,
            latent_channels=4,
            backbone=SD,
            bottleneck=DiagonalGaussianConfig(logvar_min=-30.0, logvar_max=20.0),
            likelihood=GaussianConfig(scale="fixed", sigma=0.1),
        )
        conv = Codec(config).eval().to(self.device)
        peer = AutoencoderKL(
            block_out_channels=SD.widths,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=SD.layers_per_block,
            latent_channels=4,
        )
        peer.load_state_dict(conv.backbone.state_dict())
        peer = peer.eval().to(self.device)
        x = torch.rand(self.batch, 3, self.size, self.size, device=self.device) * 2 - 1
        difference = (conv.encode(x).mean - peer.encode(x).latent_dist.mean).abs().max().item()
        contenders: dict[str, Callable[[], Any]] = {
            "lite": lambda: lite.encode(x),
            "conv (SD shape)": lambda: conv.encode(x),
            "diffusers AutoencoderKL": lambda: peer.encode(x),
        }
        seconds = self._time(contenders)
        base = seconds["diffusers AutoencoderKL"]
        results = {name: {"seconds": s, "times_as_fast_as_diffusers": base / s} for name, s in seconds.items()}
        about = {"size": self.size, "batch": self.batch, "rounds": self.rounds, "difference": difference}
        about |= {"gflop_lite": count_flops(lite.config, self.size).encoder / 1e9}
        about |= {"gflop_conv": count_flops(config, self.size).encoder / 1e9}
        _report(results, about | _machine(self.device), self.out)

    def _time(self, contenders: dict[str, Callable[[], Any]]) -> dict[str, float]:
        """Median seconds per image of each, after one unmeasured call."""
        taken: dict[str, list[float]] = {name: [] for name in contenders}
        for round_ in range(self.rounds + 1):
            for name, call in contenders.items():
                started = time.perf_counter()
                call()
                if self.device.startswith("cuda"):
                    torch.cuda.synchronize()
                if round_:
                    taken[name].append((time.perf_counter() - started) / self.batch)
        return {name: statistics.median(values) for name, values in taken.items()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Peers:
    """Measure TAEF2 (another project's tiny autoencoder) on a folder of images, with evaluate's metrics."""

    weights: tyro.conf.Positional[Path]
    """Folder with encoder.safetensors and decoder.safetensors."""
    dir: tyro.conf.Positional[str]
    lpips_backbone: Path | None = None
    out: Path | None = None

    @torch.inference_mode()
    def run(self) -> None:
        peer, lpips = Taef2.load(self.weights), LPIPS("alex", self.lpips_backbone)
        rows: dict[str, list[torch.Tensor]] = {"psnr": [], "ssim": [], "ms_ssim": [], "lpips": []}
        for source in find_images(self.dir):
            x = source.read().pixels[None]
            y = peer.decode(peer.encode(x))
            for name in ("psnr", "ssim", "ms_ssim"):
                rows[name].append(getattr(metrics, name)(x, y))
            rows["lpips"].append(lpips(x.float() / 127.5 - 1, y.float() / 127.5 - 1))
        results = {"TAEF2": {name: metrics.mean(torch.cat(values)).value for name, values in rows.items()}}
        about = {"set": Path(self.dir).name, "images": len(rows["psnr"]), "latent_channels": 32, "factor": 8}
        _report(results, about | metrics.PROTOCOL | {"lpips": lpips.protocol} | _machine("cpu"), self.out)


def _machine(device: str) -> dict[str, Any]:
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else platform.machine()
    return {"device": name, "threads": torch.get_num_threads(), "torch": torch.__version__}


def _report(results: dict[str, dict[str, float]], about: dict[str, Any], out: Path | None) -> None:
    text = json.dumps({"results": results, "about": about}, indent=1)
    print(text)
    if out is not None:
        write_text(out, text + "\n")


def main() -> None:
    kind = Union[Annotated[Encode, tyro.conf.subcommand("encode")], Annotated[Peers, tyro.conf.subcommand("peers")]]
    command: Encode | Peers = tyro.cli(kind, prog="tools.benchmark", description=__doc__)  # pyright: ignore
    command.run()


if __name__ == "__main__":
    main()
