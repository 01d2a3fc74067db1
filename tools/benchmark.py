"""Measure, then claim: `python -m tools.benchmark encode|coding|quality|...`. Timings are ratios within one run."""

import dataclasses
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, Union

import torch
import tyro

from latent_codec.bitstream.refinement import USUAL_ROUNDS
from latent_codec.errors import UserError
from latent_codec.evaluation.evaluate import evaluate
from latent_codec.images.sources import find_images
from latent_codec.inference.runner import Compute
from latent_codec.metrics import distortion
from latent_codec.metrics.lpips import LPIPS
from latent_codec.model.codec import Codec
from latent_codec.model.describe import count_flops
from latent_codec.model.likelihoods import to_signed
from tools import throughput
from tools.coding import LARGEST_OVERHEAD, Seconds, Sizes, measure_sizes, time_coding
from tools.latents_speed import LatentsSpeed
from tools.peers import Taef2, diffusers_peer, sd_codec
from tools.report import machine, report
from tools.training_speed import TrainingSpeed


@dataclasses.dataclass(frozen=True, kw_only=True)
class Encoders:
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
        conv = sd_codec().eval().to(self.device)
        peer = diffusers_peer(conv).to(self.device)
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
        about |= {"gflop_conv": count_flops(conv.config, self.size).encoder / 1e9}
        report(results, about | machine(self.device), self.out)

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
        compute = Compute(device="cpu", dtype="float32", batch_size=1, workers=2)
        lpips: dict[str, Any] = {"lpips_net": self.lpips_net, "lpips_backbone": self.lpips_backbone}
        reports = {
            Path(model).stem: evaluate(Codec.load(model), self.dir, compute, out=None, **lpips) for model in self.models
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Coding:
    """Time the entropy coding of images beside the networks, and hold files against the prior's code length."""

    dir: tyro.conf.Positional[str]
    model: str = "photo"
    steps: tuple[float, ...] = (1.0, 1.4, 2.0)
    """Of files; times are taken at the first."""
    rounds: int = 5
    """Each part is timed once per round and image, in turn."""
    threads: int | None = None
    """Of the networks; the entropy coder itself has one. By default torch's choice."""
    device: str = "cpu"
    out: Path | None = None
    """JSON file for the results."""

    def run(self) -> None:
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        codec = Codec.load(self.model, self.device).to(memory_format=torch.channels_last)
        images = [source.read() for source in find_images(self.dir)]
        seconds = time_coding(codec, images, self.steps[0], self.rounds, self.device)
        sizes = measure_sizes(codec, images, self.steps, self.device)
        results = {"seconds_per_image": seconds._asdict() | {k: v._asdict() for k, v in seconds.priors.items()}}
        del results["seconds_per_image"]["priors"]
        results |= {kind: _coding_ratios(seconds, kind) for kind in seconds.priors}
        plain = seconds.encoder + seconds.scale + sum(list(seconds.priors.values())[-1][:2])
        results["refine"] = {"rounds": USUAL_ROUNDS, "times_as_long_to_encode": 1 + seconds.refine / plain}
        results["files"] = {"sizes": [s._asdict() for s in sizes], "context_saves": _savings(sizes)}
        results["files"] |= {"worst_excess_bytes": max(s.worst_excess for s in sizes), "allowed": LARGEST_OVERHEAD}
        about = {"model_id": codec.model_id, "set": Path(self.dir).name, "images": len(images), "rounds": self.rounds}
        about |= {"step_of_times": self.steps[0], "threads_of_the_coder": 1}
        report(results, about | machine(self.device), self.out)


def _coding_ratios(seconds: Seconds, kind: str) -> dict[str, float]:
    """One prior's times as ratios: to the encoder network, and as shares of coding in all of encode and decode."""
    own = seconds.priors[kind]
    encode, decode = own.encode_network + own.encode_coder, own.decode
    coding, uncoding = encode + seconds.scale, decode + seconds.dequantize
    return {
        "encode_prior_over_encoder_network": encode / seconds.encoder,
        "decode_prior_over_encoder_network": decode / seconds.encoder,
        "share_of_encode": coding / (coding + seconds.encoder),
        "share_of_decode": uncoding / (uncoding + seconds.decoder),
        "coder_alone_encode_msymbols_per_second": seconds.symbols / own.encode_coder / 1e6,
        "coder_alone_decode_msymbols_per_second": seconds.symbols / own.decode_coder / 1e6,
    }


def _savings(sizes: list[Sizes]) -> dict[str, float]:
    """By step, the share of the factorised prior's mean bits per pixel that the context prior saves."""
    bpp = {(s.prior, s.step): s.bpp for s in sizes}
    steps = [s.step for s in sizes if s.prior == "context"]
    return {f"step {step:g}": 1 - bpp["context", step] / bpp["factorized", step] for step in steps}


def main() -> None:
    kind = Union[
        Annotated[Encoders, tyro.conf.subcommand("encoders")],
        Annotated[throughput.Encode, tyro.conf.subcommand("encode")],
        Annotated[throughput.Decode, tyro.conf.subcommand("decode")],
        Annotated[throughput.Loop, tyro.conf.subcommand("loop")],
        Annotated[throughput.Memory, tyro.conf.subcommand("memory")],
        Annotated[Quality, tyro.conf.subcommand("quality")],
        Annotated[Coding, tyro.conf.subcommand("coding")],
        Annotated[LatentsSpeed, tyro.conf.subcommand("latents")],
        Annotated[TrainingSpeed, tyro.conf.subcommand("training")],
    ]
    command: Any = tyro.cli(kind, prog="tools.benchmark", description=__doc__)  # pyright: ignore
    try:
        command.run()
    except UserError as error:
        raise SystemExit(f"tools.benchmark: {error}") from error


if __name__ == "__main__":
    main()
