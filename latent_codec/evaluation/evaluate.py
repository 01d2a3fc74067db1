"""Measure a model on images: distortion of what was stored, and its rate and bytes on disk."""

import dataclasses
import json
import math
import platform
import tempfile
from collections.abc import Callable, Sequence, Set
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from latent_codec.bitstream import container
from latent_codec.bitstream.container import SUFFIX
from latent_codec.bitstream.stream_codec import StreamReader
from latent_codec.errors import FatalError, UserError
from latent_codec.folders.encode_latents import LatentsOptions, encode_latents
from latent_codec.folders.encode_lc import EncodeOptions, encode_lc
from latent_codec.folders.jobs import OVERWRITE
from latent_codec.folders.summary import Summary
from latent_codec.images.geometry import Geometry, crop
from latent_codec.images.sources import ListOptions, Source, list_images
from latent_codec.images.write import write_image
from latent_codec.inference.runner import Runner
from latent_codec.latents.dataset import Latents
from latent_codec.latents.format import stored_files
from latent_codec.metrics import distortion
from latent_codec.metrics.lpips import LPIPS, LPIPSOptions
from latent_codec.model.checks import check_prefix
from latent_codec.program import say
from latent_codec.storage.files import make_folder, write_text
from latent_codec.storage.json_config import from_json, loads
from latent_codec.storage.removal import check_replaceable
from latent_codec.version import __version__

RESULTS = "results.json"

_POSTERIORS, _STREAMS, _DECODED = _WRITTEN = ("latents", "streams", "decoded")
"""Folders of what is stored, by kind, and of the reconstructions."""

PROTOCOL = distortion.PROTOCOL | {
    "kl_bpp": "KL of the stored posterior against N(0, I) in bits, over the image's own pixels (padding's bits count, "
    "its pixels do not)",
    "disk_bpp": "all bytes of the latents folder (mean and log-variance, index) in bits, over all pixels of the set",
    "decoded": "the posterior's mode as stored, rounded and clipped to uint8, against the image as read (upright sRGB)",
}
"""Definitions of the numbers of a model with a Gaussian posterior."""

_STREAM_PROTOCOL = distortion.PROTOCOL | {
    "disk_bpp": "all bytes of the .lc files, at step 1 where they have one, in bits over all pixels of the set",
    "decoded": "the .lc file's latents, rounded and clipped to uint8, against the image as read (upright sRGB)",
}


class EvaluationReport(NamedTuple):
    """Hold what `evaluate` measured, as results.json has it."""

    summary: dict[str, float | None]
    """Means over images, by name."""
    images: list[dict[str, Any]]
    """One record per image."""
    protocol: dict[str, str]
    """Definition of each number."""
    about: dict[str, Any]
    """Set, model, device and versions."""
    failures: dict[str, str]
    """Reason for each image that could not be read or decoded."""
    left_out: dict[str, int]
    """Number of files that were found and not taken, by reason."""

    def table(self) -> str:
        """Return the means as lines of text, each with its definition."""
        rows = [f"{self.about['set']}: {self.about['images']} images, model {self.about['model_id'][:12]}"]
        for name, value in self.summary.items():
            shown = "-" if value is None else f"{value:.4f}"
            rows.append(f"  {name:9} {shown:>9}  {self.protocol.get(name, '')}")
        left_out = ", ".join(f"{count} {reason}" for reason, count in sorted(self.left_out.items()))
        return "\n".join([*rows, *([f"left out: {left_out}"] if left_out else [])])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Selection:
    """Choose what is evaluated of a model and a folder."""

    channels: int | None = None
    """Measure the latents of the first channels, a prefix of the model's; None measures all."""
    search: ListOptions = ListOptions()


def evaluate(
    runner: Runner,
    where: str | Path,
    *,
    out: Path | None = None,
    lpips: LPIPSOptions | None = None,
    select: Selection = Selection(),
    quiet: bool = False,
) -> EvaluationReport:
    """Encode the images at `where` to disk, decode what was stored, and compare.

    The posterior is stored, of all channels or of a prefix, or the `.lc` files where it is not Gaussian. `out` keeps
    results.json, what was stored and the reconstructions (PNG). Images that cannot be read or decoded are reported and
    left out. Raises `UserError` if none can be, if LPIPS' weights, a prior or the prefix is missing, or if `out` holds
    latents that no evaluation put there.
    """
    if (channels := select.channels) is not None:
        check_prefix(runner.codec, channels)
    if out is not None:
        _check_out(out)
    gaussian = runner.codec.config.bottleneck.kind == "gaussian"
    network = None if lpips is None else lpips.load(runner.options.device)
    with tempfile.TemporaryDirectory() as temporary:
        folder = (out or Path(temporary)) / (_POSTERIORS if gaussian else _STREAMS)
        search = select.search
        search = search if out is None else search.without(out, *(out / name for name in _WRITTEN))
        store = partial(_store_posteriors, channels=channels) if gaussian else _store_streams
        encoded, files, images = store(runner, where, folder, search, quiet)
        if not images:
            raise UserError(f"{where}: none of the {encoded.found} images could be read")
        bytes_out = sum(file.stat().st_size for file in files)
        sources = {source.name: source for source in list_images(where, search).sources}
        stored = (read() for read in tqdm(images, "evaluate", unit="image", disable=quiet or None))
        measured = [(i.path, i.geometry, _measure_image(runner, i, sources, out, network)) for i in stored]
    records = [found for _, _, found in measured if isinstance(found, dict)]
    failures = encoded.failures | {path: found for path, _, found in measured if isinstance(found, str)}
    if not records:
        raise UserError(f"{where}: none of the {encoded.found} images could be decoded")
    names = ["psnr", "ssim", "ms_ssim", *(["lpips"] if network else []), *(["kl_bpp"] if gaussian else [])]
    summary = {name: mean_defined([record[name] for record in records]) for name in names}
    summary["disk_bpp"] = 8 * bytes_out / sum(size.width * size.height for _, size, _ in measured)
    protocol = (PROTOCOL if gaussian else _STREAM_PROTOCOL) | ({"lpips": network.protocol} if network else {})
    about = describe_evaluation(runner, where, len(records)) | ({} if channels is None else {"channels": channels})
    report = EvaluationReport(summary, records, protocol, about, failures, encoded.left_out.counts)
    if out is not None:
        write_text(out / RESULTS, json.dumps(report._asdict(), indent=1, allow_nan=False))
    return report


def _check_out(out: Path) -> None:
    make_folder(out)
    check_results(out / RESULTS, {"about", "protocol"})
    for stored in (out / _POSTERIORS, out / _STREAMS):
        if (stored_files(stored) or any(stored.rglob(f"*{SUFFIX}"))) and not (out / RESULTS).exists():
            raise UserError(f"{stored}: holds latents without the {RESULTS} of an evaluation; give another --out")
    if any((out / _DECODED).glob("*")) and not (out / RESULTS).exists():
        raise UserError(f"{out / _DECODED}: holds files without the {RESULTS} of an evaluation; give another --out")


def check_results(path: Path, fields: Set[str], *shown: Path) -> None:
    """Raise `UserError` unless results may be written to a JSON file and to pages that show them.

    Only a file with these fields is replaced, and only pages beside such a file.
    """

    def are_ours(_: Path) -> bool:
        try:
            return fields <= from_json(dict, loads(path.read_bytes())).keys()
        except (OSError, ValueError):
            return False

    for place in (path, *shown):
        check_replaceable(place, are_ours, "a file of results")


class _StoredImage(NamedTuple):
    path: str
    geometry: Geometry
    latents: torch.Tensor  # (z, h/f, w/f)
    kl: float | None  # nats; None without a Gaussian posterior


_Stored = tuple[Summary, list[Path], Sequence[Callable[[], _StoredImage]]]
"""Summary, the files, and how to read each image."""


def _store_posteriors(
    runner: Runner, where: str | Path, folder: Path, search: ListOptions, quiet: bool, *, channels: int | None
) -> _Stored:
    options = LatentsOptions(channels=channels, search=search)
    encoded = encode_latents(runner, where, folder, options, resume=OVERWRITE, quiet=quiet)
    latents = Latents(folder, model_id=runner.model_id)

    def read(i: int) -> _StoredImage:
        entry, posterior = latents.entries[i], latents.posterior(i)
        return _StoredImage(entry.path, entry.geometry, posterior.mode()[0], posterior.kl().item())

    return encoded, stored_files(folder), [partial(read, i) for i in range(len(latents.entries))]


def _store_streams(runner: Runner, where: str | Path, folder: Path, search: ListOptions, quiet: bool) -> _Stored:
    encoded = encode_lc(runner, where, folder, EncodeOptions(search=search), resume=OVERWRITE, quiet=quiet)
    names = (source.name for source in list_images(where, search).sources)
    files = [folder / f"{name}{SUFFIX}" for name in names if name not in encoded.failures]
    reader = StreamReader(runner.codec, runner.options.device)

    def read(file: Path) -> _StoredImage:
        stream = container.read(file)
        reader.check(stream)
        (latents,) = reader.decompress([stream])
        if isinstance(latents, UserError):
            raise latents
        return _StoredImage(file.relative_to(folder).as_posix().removesuffix(SUFFIX), stream.geometry, latents, None)

    return encoded, files, [partial(read, file) for file in files]


def _measure_image(
    runner: Runner, image: _StoredImage, sources: dict[str, Source], out: Path | None, lpips: LPIPS | None
) -> dict[str, Any] | str:
    """Return an image's record, or the reason why it has none, which is said too."""
    source = sources[image.path]
    original, labels = source.read().pixels, runner.codec.class_numbers([source.label])
    try:
        decoded = crop(runner.decode_uint8([image.latents], labels), image.geometry)
    except FatalError:
        raise
    except UserError as error:
        say(f"{image.path}: {error}", error=True)
        return str(error)
    if out is not None:
        write_image(out / _DECODED / f"{image.path}.png", decoded[0], image.geometry, "png")
    pixels = image.geometry.width * image.geometry.height
    record: dict[str, Any] = {"path": image.path, "pixels": pixels}
    if image.kl is not None:
        record["kl_bpp"] = image.kl / math.log(2) / pixels
    return record | compare(original[None], decoded, lpips)


def compare(x: torch.Tensor, y: torch.Tensor, lpips: LPIPS | None) -> dict[str, float | None]:
    """Return every metric of one pair (1, 3, h, w) uint8; None where it is undefined (small images, equal images)."""
    values = {"psnr": distortion.psnr(x, y), "ssim": distortion.ssim(x, y), "ms_ssim": distortion.ms_ssim(x, y)}
    if lpips is not None and min(x.shape[2:]) >= lpips.smallest_side:
        signed = (t.to(lpips.device).float() / 127.5 - 1 for t in (x, y))
        with torch.inference_mode():
            values["lpips"] = lpips(*signed)
    elif lpips is not None:
        values["lpips"] = torch.tensor(math.nan)
    return {name: value.item() if math.isfinite(value.item()) else None for name, value in values.items()}


def mean_defined(values: list[float | None]) -> float | None:
    """Return the mean over the images for which a metric is defined; None if there is none."""
    defined = [value for value in values if value is not None]
    return sum(defined) / len(defined) if defined else None


def describe_evaluation(runner: Runner, where: str | Path, images: int) -> dict[str, Any]:
    """Return set, model, device and versions as JSON values."""
    codec, options = runner.codec, runner.options
    return {
        "set": Path(where).name or str(where),
        "images": images,
        "model_id": runner.model_id,
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
