"""What a model is worth on a set of images: distortion of the decoded mode against rate and bytes on disk."""

import json
import math
import platform
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from latent_codec.bitstream import container
from latent_codec.bitstream.container import SUFFIX
from latent_codec.bitstream.rate_control import Rate
from latent_codec.bitstream.stream_codec import StreamReader
from latent_codec.errors import UserError
from latent_codec.folders.encode_latents import encode_folder
from latent_codec.folders.encode_lc import encode_streams
from latent_codec.folders.jobs import OVERWRITE
from latent_codec.folders.summary import Summary
from latent_codec.images.geometry import Geometry, crop
from latent_codec.images.sources import find_images
from latent_codec.images.write import write_image
from latent_codec.inference.runner import Runner
from latent_codec.latents.dataset import Latents
from latent_codec.latents.format import stored_files
from latent_codec.metrics import distortion
from latent_codec.metrics.lpips import LPIPS, Net
from latent_codec.storage.files import make_folder, write_text
from latent_codec.version import __version__

RESULTS = "results.json"

_POSTERIORS, _STREAMS = "latents", "streams"  # folders of what was stored, by kind

PROTOCOL = distortion.PROTOCOL | {
    "kl_bpp": "KL of the stored posterior against N(0, I) in bits, over the image's own pixels (padding's bits count, "
    "its pixels do not)",
    "disk_bpp": "all bytes of the latents folder (mean and log-variance, index) in bits, over all pixels of the set",
    "decoded": "the posterior's mode as stored, rounded and clipped to uint8, against the image as read (upright sRGB)",
}
_OF_STREAMS = {
    "disk_bpp": "all bytes of the .lc files, at step 1 where they have one, in bits over all pixels of the set",
    "decoded": "the .lc file's latents, rounded and clipped to uint8, against the image as read (upright sRGB)",
}
"""Where there is no Gaussian posterior to store."""


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
    runner: Runner,
    where: str | Path,
    *,
    out: Path | None,
    lpips_net: Net | None,
    lpips_backbone: Path | None,
    quiet: bool = False,
) -> Report:
    """Encode the images at `where` to disk, decode what was stored, and compare.

    What is stored is the posterior, or where it is no Gaussian the `.lc` files. `out` keeps results.json, what was
    stored and the reconstructions (PNG); without it they go to a temporary folder. Images that cannot be read are
    reported and left out. Raises `UserError` if no image can be read, if LPIPS' weights cannot be had, if `out` holds
    latents that no evaluation put there, or if the model has neither a Gaussian posterior nor a prior.
    """
    codec = runner.codec
    gaussian = codec.config.bottleneck.kind == "gaussian"
    if out is not None:
        make_folder(out)
        for stored in (out / _POSTERIORS, out / _STREAMS):
            if (stored_files(stored) or any(stored.rglob(f"*{SUFFIX}"))) and not (out / RESULTS).exists():
                raise UserError(f"{stored}: latents without the {RESULTS} of an evaluation; give another --out")
    lpips = None if lpips_net is None else LPIPS(lpips_net, lpips_backbone).to(runner.options.device)
    with tempfile.TemporaryDirectory() as temporary:
        folder = (out or Path(temporary)) / (_POSTERIORS if gaussian else _STREAMS)
        stored = (_store_posteriors if gaussian else _store_streams)(runner, where, folder, quiet)
        if not stored.size:
            raise UserError(f"{where}: none of the {stored.encoded.found} images could be read")
        sources = {s.name: s for s in find_images(where)}
        records = []
        for one in tqdm(stored.images, "evaluate", stored.size, unit="image", disable=quiet or None):
            original = sources[one.path].read().pixels
            labels = codec.class_numbers([sources[one.path].label])
            decoded = crop(runner.decode_uint8([one.latents], labels), one.geometry)
            if out is not None:
                write_image(out / "decoded" / f"{one.path}.png", decoded[0], one.geometry, "png")
            pixels = one.geometry.width * one.geometry.height
            record: dict[str, Any] = {"path": one.path, "pixels": pixels}
            if one.kl is not None:
                record["kl_bpp"] = one.kl / math.log(2) / pixels
            records.append(record | compare(original[None], decoded, lpips, runner.options.device))
    names = ["psnr", "ssim", "ms_ssim", *(["lpips"] if lpips else []), *(["kl_bpp"] if gaussian else [])]
    summary = {name: mean_defined([r[name] for r in records]) for name in names}
    summary["disk_bpp"] = 8 * stored.bytes_out / sum(r["pixels"] for r in records)
    report = Report(
        summary=summary,
        images=records,
        protocol=(PROTOCOL if gaussian else distortion.PROTOCOL | _OF_STREAMS)
        | ({"lpips": lpips.protocol} if lpips else {}),
        about=describe(runner, where, len(records)),
        failures=stored.encoded.failures,
    )
    if out is not None:
        write_text(out / RESULTS, json.dumps(report.json(), indent=1, allow_nan=False))
    return report


class _One(NamedTuple):
    """One image as it was stored."""

    path: str
    geometry: Geometry
    latents: torch.Tensor  # (z, h/f, w/f)
    kl: float | None
    """Nats; None where there is no posterior to have one."""


class _Stored(NamedTuple):
    encoded: Summary
    size: int
    bytes_out: int
    images: Iterable[_One]


def _store_posteriors(runner: Runner, where: str | Path, folder: Path, quiet: bool) -> _Stored:
    encoded = encode_folder(runner, where, folder, resume=OVERWRITE, quiet=quiet)
    latents = Latents(folder, model_id=runner.codec.model_id)

    def images() -> Iterator[_One]:
        for i, entry in enumerate(latents.entries):
            posterior = latents.posterior(i)
            yield _One(entry.path, entry.geometry, posterior.mode()[0], posterior.kl().item())

    size = sum(f.stat().st_size for f in stored_files(folder))
    return _Stored(encoded, len(latents.entries), size, images())


def _store_streams(runner: Runner, where: str | Path, folder: Path, quiet: bool) -> _Stored:
    encoded = encode_streams(runner, where, folder, rate=Rate(), resume=OVERWRITE, quiet=quiet)
    files = [folder / f"{s.name}{SUFFIX}" for s in find_images(where) if s.name not in encoded.failures]
    reader = StreamReader(runner.codec, runner.options.device)

    def images() -> Iterator[_One]:
        for file in files:
            stream = container.read(file)
            reader.check(stream)
            (latents,) = reader.decompress([stream])
            if isinstance(latents, UserError):
                raise latents
            name = file.relative_to(folder).as_posix().removesuffix(SUFFIX)
            yield _One(name, stream.header.geometry, latents, None)

    return _Stored(encoded, len(files), sum(f.stat().st_size for f in files), images())


def compare(
    x: torch.Tensor, y: torch.Tensor, lpips: LPIPS | None, device: str | torch.device
) -> dict[str, float | None]:
    """Values of one pair (1, 3, h, w) uint8; None where a metric is not defined (small images, equal images)."""
    values = {"psnr": distortion.psnr(x, y), "ssim": distortion.ssim(x, y), "ms_ssim": distortion.ms_ssim(x, y)}
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


def describe(runner: Runner, where: str | Path, images: int) -> dict[str, Any]:
    codec, options = runner.codec, runner.options
    return {
        "set": Path(where).name or str(where),
        "images": images,
        "model_id": codec.model_id,
        "latent_channels": codec.config.latent_channels,
        "factor": codec.factor,
        "device": options.device,
        "dtype": options.dtype,
        "tile": options.tile,
        "versions": {
            "latent_codec": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "machine": platform.machine(),
        },
    }
