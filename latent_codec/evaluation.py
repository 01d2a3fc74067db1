"""What a model is worth on a set of images: distortion of the decoded mode against rate and bytes on disk."""

import json
import math
import platform
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from latent_codec import __version__, metrics
from latent_codec.codec import Codec
from latent_codec.compression import encode_folder
from latent_codec.compute import Compute, Networks
from latent_codec.errors import UserError
from latent_codec.files import make_folder, write_text
from latent_codec.images import crop, write_image
from latent_codec.inputs import find_images
from latent_codec.latents import Latents, stored_files
from latent_codec.perceptual import LPIPS, Net
from latent_codec.pipeline import OVERWRITE

RESULTS = "results.json"

PROTOCOL = metrics.PROTOCOL | {
    "kl_bpp": "KL of the stored posterior against N(0, I) in bits, over the image's own pixels (padding's bits count, "
    "its pixels do not)",
    "disk_bpp": "all bytes of the latents folder (mean and log-variance, index) in bits, over all pixels of the set",
    "decoded": "the posterior's mode as stored, rounded and clipped to uint8, against the image as read (upright sRGB)",
}


class Report(NamedTuple):
    """`summary` holds means over images; `images` one record each; `protocol` says how each number is made."""

    summary: dict[str, float | None]
    images: list[dict[str, Any]]
    protocol: dict[str, str]
    about: dict[str, Any]
    failures: dict[str, str]

    def json(self) -> dict[str, Any]:
        return self._asdict()

    def table(self) -> str:
        """For people: the means, each with its protocol."""
        rows = [f"{self.about['set']}: {self.about['images']} images, model {self.about['model_id'][:12]}"]
        for name, value in self.summary.items():
            shown = "-" if value is None else f"{value:.4f}"
            rows.append(f"  {name:9} {shown:>9}  {self.protocol.get(name, '')}")
        return "\n".join(rows)


def evaluate(
    codec: Codec,
    where: str | Path,
    compute: Compute,
    *,
    out: Path | None,
    lpips_net: Net | None,
    lpips_backbone: Path | None,
    quiet: bool = False,
) -> Report:
    """Encode the images at `where` to disk, decode what was stored, and compare.

    `out` keeps results.json, the latents and the reconstructions (PNG); without it they go to a temporary folder.
    Images that cannot be read are reported and left out. Raises `UserError` if no image can be read, if LPIPS' weights
    cannot be had, or if `out` holds latents that no evaluation put there.
    """
    if out is not None:
        make_folder(out)
        if stored_files(out / "latents") and not (out / RESULTS).exists():
            raise UserError(f"{out / 'latents'}: latents without the {RESULTS} of an evaluation; give another --out")
    networks = Networks(codec, compute)
    lpips = None if lpips_net is None else LPIPS(lpips_net, lpips_backbone).to(compute.device)
    with tempfile.TemporaryDirectory() as temporary:
        folder = (out or Path(temporary)) / "latents"
        encoded = encode_folder(codec, where, folder, compute, resume=OVERWRITE, quiet=quiet)
        latents = Latents(folder, model_id=codec.model_id)
        if not latents.entries:
            raise UserError(f"{where}: none of the {encoded.found} images could be read")
        sources = {s.name: s for s in find_images(where)}
        records = []
        for i, entry in enumerate(tqdm(latents.entries, "evaluate", unit="image", disable=quiet or None)):
            original = sources[entry.path].read().pixels
            posterior = latents.posterior(i)
            labels = codec.class_numbers([entry.label])
            decoded = crop(networks.decode_uint8([posterior.mode()[0]], labels), entry.geometry)
            if out is not None:
                write_image(out / "decoded" / f"{entry.path}.png", decoded[0], entry.geometry, "png")
            pixels = entry.geometry.width * entry.geometry.height
            record = {"path": entry.path, "pixels": pixels, "kl_bpp": posterior.kl().item() / math.log(2) / pixels}
            records.append(record | compare(original[None], decoded, lpips, compute.device))
        disk = sum(f.stat().st_size for f in stored_files(folder))
    names = ["psnr", "ssim", "ms_ssim", *(["lpips"] if lpips else []), "kl_bpp"]
    summary = {name: mean_defined([r[name] for r in records]) for name in names}
    summary["disk_bpp"] = 8 * disk / sum(r["pixels"] for r in records)
    report = Report(
        summary=summary,
        images=records,
        protocol=PROTOCOL | ({"lpips": lpips.protocol} if lpips else {}),
        about=describe(codec, where, len(records), compute),
        failures=encoded.failures,
    )
    if out is not None:
        write_text(out / RESULTS, json.dumps(report.json(), indent=1, allow_nan=False))
    return report


def compare(
    x: torch.Tensor, y: torch.Tensor, lpips: LPIPS | None, device: str | torch.device
) -> dict[str, float | None]:
    """Values of one pair (1, 3, h, w) uint8; None where a metric is not defined (small images, equal images)."""
    values = {"psnr": metrics.psnr(x, y), "ssim": metrics.ssim(x, y), "ms_ssim": metrics.ms_ssim(x, y)}
    if lpips is not None and min(x.shape[2:]) >= lpips.smallest_side:
        signed = (t.to(device).float() / 127.5 - 1 for t in (x, y))
        with torch.inference_mode():
            values["lpips"] = lpips(*signed)
    elif lpips is not None:
        values["lpips"] = torch.tensor(math.nan)
    return {name: value.item() if math.isfinite(value.item()) else None for name, value in values.items()}


def mean_defined(values: list[float | None]) -> float | None:
    """Over the images for which the metric is defined; None if there is none."""
    defined = [v for v in values if v is not None]
    return sum(defined) / len(defined) if defined else None


def describe(codec: Codec, where: str | Path, images: int, compute: Compute) -> dict[str, Any]:
    return {
        "set": Path(where).name or str(where),
        "images": images,
        "model_id": codec.model_id,
        "latent_channels": codec.config.latent_channels,
        "factor": codec.factor,
        "device": compute.device,
        "dtype": compute.dtype,
        "tile": compute.tile,
        "versions": {
            "latent_codec": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "machine": platform.machine(),
        },
    }
