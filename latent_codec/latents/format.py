"""Store the posteriors of a folder of images as safetensors shards with an index.

A folder holds `latents-NAME.safetensors` files and `index.json`, which maps each image to a shard and a row. A shard
has tensors `mean.HxW` and `logvar.HxW`, (n, z, H, W), for each latent size HxW in it; with flips also `mean_flip.HxW`
and `logvar_flip.HxW`, the posteriors of the images mirrored left to right. Values are raw (not scaled by the
statistics); logvar is the natural logarithm of the variance.
"""

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from latent_codec.errors import UserError
from latent_codec.images.geometry import Geometry
from latent_codec.model.codec import Codec, suggest_model
from latent_codec.model.file import LatentStatistics
from latent_codec.model.posteriors import DiagonalGaussian
from latent_codec.storage.files import check_name, write_text
from latent_codec.storage.json_config import from_json, loads, to_json
from latent_codec.storage.tensors import KEY, own_metadata, save_tensors

FORMAT_VERSION = 3
INDEX = "index.json"
StoredDtype = Literal["float16", "bfloat16", "float32"]
Moment = Literal["mean", "logvar", "mean_flip", "logvar_flip"]

_UNPLACED = "unknown"  # shard of an entry that is not written yet


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentsHeader:
    """Describe what all latents of a folder have in common."""

    format_version: int
    model_id: str
    factor: int
    """Pixels per latent element along each side."""
    pixel_range: tuple[float, ...]
    """Lowest and highest value of the pixels that the encoder was given."""
    scale_state: Literal["raw"]
    second_moment: Literal["logvar"]
    dtype: StoredDtype
    statistics: LatentStatistics | None
    """The model's statistics, so that latents can be scaled without the model."""
    flips: bool
    """True if the posteriors of the mirrored images are stored as well."""
    channels: int | None = None
    """Number of the model's first channels that are stored, one of its prefixes; None: all."""

    def __post_init__(self) -> None:
        if self.factor < 1:
            raise ValueError(f"factor {self.factor} is below 1")
        if self.channels is not None and self.channels < 1:
            raise ValueError(f"channels {self.channels} is below 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentsEntry:
    """Locate one image's posterior and describe its source file."""

    path: str
    """Path relative to the encoded folder, with "/" between its parts."""
    shard: str
    row: int
    """Row in the shard's tensors for latents of this size."""
    geometry: Geometry
    sha256: str
    """SHA-256 of the source file."""
    label: str | None
    """Class of the image: the first folder of its path, None at the top level; from a tar file what that says."""
    key: str | None = None
    """WebDataset's key of the image, where it came in a tar file."""
    caption: str | None = None
    """Caption of the image, from the tar file's .txt."""

    def __post_init__(self) -> None:
        for name in (self.path, self.shard):
            check_name(name)
        if self.row < 0:
            raise ValueError(f"row {self.row} is negative")


class LatentsRow(NamedTuple):
    """Hold one image's posterior in the stored type, ready to be written. Tensors are (z, h, w)."""

    entry: LatentsEntry
    """The entry, whose shard and row are set when the shard is written."""
    mean: torch.Tensor
    logvar: torch.Tensor
    mean_flip: torch.Tensor | None = None
    logvar_flip: torch.Tensor | None = None


class LatentsIndex(NamedTuple):
    """Hold what index.json says."""

    header: LatentsHeader
    entries: list[LatentsEntry]


def latents_header(codec: Codec, dtype: StoredDtype, flips: bool = False, channels: int | None = None) -> LatentsHeader:
    """Return the header of latents that `codec` makes, of all channels or of a prefix."""
    statistics = codec.statistics
    return LatentsHeader(
        format_version=FORMAT_VERSION,
        model_id=codec.model_id,
        factor=codec.factor,
        pixel_range=codec.likelihood.data_range,
        scale_state="raw",
        second_moment="logvar",
        dtype=dtype,
        statistics=statistics if statistics is None or channels is None else statistics.prefix(channels),
        flips=flips,
        channels=channels,
    )


def unplaced_entry(path: str, geometry: Geometry, sha256: str) -> LatentsEntry:
    """Return the entry of an image that is in no shard yet; raises `UserError` unless `path` is plain and relative."""
    label = path.split("/")[0] if "/" in path else None
    try:
        return LatentsEntry(path=path, shard=_UNPLACED, row=0, geometry=geometry, sha256=sha256, label=label)
    except UserError as error:
        raise UserError(f"{path}: {error}; rename it") from error


def latents_row(
    entry: LatentsEntry,
    posterior: DiagonalGaussian,
    index: int,
    dtype: StoredDtype,
    mirrored: DiagonalGaussian | None = None,
) -> LatentsRow:
    """Convert image `index` of a batch's posterior to the stored type, and of the mirrored images' where it is given.
    Raises `UserError` if a value is not finite or exceeds the range of `dtype`."""
    posteriors = [posterior] if mirrored is None else [posterior, mirrored]
    exact = [t[index].cpu() for p in posteriors for t in (p.mean, p.logvar)]  # (z, h, w) each
    moments = [t.to(getattr(torch, dtype)) for t in exact]
    if not _all_finite(moments):
        if not _all_finite(exact):
            raise UserError(f"{entry.path}: the model's latents are not finite; try --dtype float32")
        raise UserError(f"{entry.path}: latents exceed the range of {dtype}; give --store float32")
    return LatentsRow(entry, *moments)


def write_shard(folder: Path, header: LatentsHeader, name: str, rows: Sequence[LatentsRow]) -> list[LatentsEntry]:
    """Write `latents-NAME.safetensors` with rows of any sizes and return their entries in the same order.
    Equal rows in equal order give equal bytes. Raises `OSError`."""
    shard = f"latents-{name}.safetensors"
    by_size: dict[tuple[int, int], list[LatentsRow]] = {}
    entries: list[LatentsEntry] = []
    for row in rows:
        same = by_size.setdefault((row.mean.shape[1], row.mean.shape[2]), [])
        entries.append(dataclasses.replace(row.entry, shard=shard, row=len(same)))
        same.append(row)
    moments = moment_names(flip=False) + (moment_names(flip=True) if header.flips else ())
    tensors = {
        tensor_name(moment, size): torch.stack([getattr(row, moment) for row in same])  # (n, z, h, w)
        for size, same in by_size.items()
        for moment in moments
    }
    save_tensors(folder / shard, tensors, {KEY: index_json(header, entries)})
    return entries


def moment_names(*, flip: bool) -> tuple[Moment, Moment]:
    """Return the names of mean and log-variance, of the mirrored images if `flip`."""
    return ("mean_flip", "logvar_flip") if flip else ("mean", "logvar")


def tensor_name(moment: Moment, size: tuple[int, int]) -> str:
    """Return the name of a shard's tensor for latents of `size` (height, width)."""
    return f"{moment}.{size[0]}x{size[1]}"


def latent_size(geometry: Geometry, factor: int) -> tuple[int, int]:
    """Return height and width of an image's latents."""
    return -(-geometry.height // factor), -(-geometry.width // factor)


def write_index(folder: Path, header: LatentsHeader, entries: Sequence[LatentsEntry]) -> None:
    """Write index.json atomically, with entries sorted by path."""
    write_text(folder / INDEX, index_json(header, sorted(entries, key=lambda e: e.path)))


def index_json(header: LatentsHeader, entries: Sequence[LatentsEntry]) -> str:
    """Return canonical JSON in ASCII; a name that is not valid UTF-8 survives as escaped surrogates."""
    found = to_json(header) | {"entries": [to_json(e) for e in entries]}
    return json.dumps(found, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _all_finite(tensors: Sequence[torch.Tensor]) -> bool:
    # The float64 sum of finite float32 values is finite; it takes a third of the time of `isfinite`.
    return all(math.isfinite(t.sum(dtype=torch.float64).item()) for t in tensors)


def stored_files(folder: Path) -> list[Path]:
    """List the index and the shards in a folder."""
    return [*folder.glob(INDEX), *stored_shards(folder)]


def stored_shards(folder: Path) -> list[Path]:
    """List the shards in a folder, sorted by name."""
    return sorted(folder.glob("latents-*.safetensors"))


def read_index(path: Path) -> LatentsIndex:
    """Read index.json, or the same facts from a shard's metadata; raises `UserError` if it is damaged or unsafe."""
    text = _index_text(path)
    try:
        found: dict[str, Any] = from_json(dict, loads(text), where="index")
        version = found.get("format_version")
        if version == FORMAT_VERSION:
            entries = from_json(tuple[LatentsEntry, ...], found.pop("entries", None), where="entries")
            header = from_json(LatentsHeader, found, where="header")
            if len({entry.path for entry in entries}) < len(entries):
                raise ValueError("two entries have the same path")
            return LatentsIndex(header, list(entries))
    except ValueError as error:
        raise UserError(f"{path}: damaged latents index: {error}") from error
    remedy = "encode the images again" if version in range(FORMAT_VERSION) else "update latent-codec"
    raise UserError(f"{path}: format version {version}; this program reads {FORMAT_VERSION}: {remedy}")


def _index_text(path: Path) -> str:
    if path.suffix == ".safetensors":
        return own_metadata(path)
    if not path.is_file():
        raise UserError(
            f"{path.parent}: no latents there (no {path.name}, no .lc files); make them with `latent-codec encode`"
        )
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: damaged latents index: {error}") from error


def check_model(header: LatentsHeader, model_id: str, where: str) -> None:
    """Raise `UserError` if another model than `model_id` made the latents."""
    if header.model_id != model_id:
        raise UserError(
            f"{where}: made by model {header.model_id[:12]}, but the model given is {model_id[:12]}; "
            f"{suggest_model(lambda codec: codec.model_id == header.model_id)}"
        )
