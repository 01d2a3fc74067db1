"""Posteriors of many images as they lie on disk: safetensors shards and an index.

A folder holds `latents-NAME.safetensors` ..., each with tensors `mean.HxW` and `logvar.HxW` (n, z, H, W) for each size
of latents in it, and `index.json`, which says where each image is. Values are raw (not scaled); logvar is the natural
log of the variance. With flips `mean_flip.HxW` and `logvar_flip.HxW` are there too: the posteriors of the images
mirrored left to right.
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
from latent_codec.model.bottlenecks import DiagonalGaussian
from latent_codec.model.codec import Codec, right_model
from latent_codec.model.file import LatentStatistics
from latent_codec.storage.files import check_name, write_text
from latent_codec.storage.json_config import from_json, to_json
from latent_codec.storage.tensors import KEY, own_metadata, save_tensors

FORMAT_VERSION = 3
INDEX = "index.json"
StoredDtype = Literal["float16", "bfloat16", "float32"]
Part = Literal["mean", "logvar", "mean_flip", "logvar_flip"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Header:
    """What all latents of a folder have in common."""

    format_version: int
    model_id: str
    factor: int
    """Pixels per latent element along one side."""
    pixel_range: tuple[float, ...]
    """Range of the pixels that the encoder saw."""
    scale_state: Literal["raw"]
    second_moment: Literal["logvar"]
    dtype: StoredDtype
    statistics: LatentStatistics | None
    """The model's, for scaling without the model at hand."""
    flips: bool
    """Whether the posteriors of the mirrored images are there as well."""

    def __post_init__(self) -> None:
        if self.factor < 1:
            raise ValueError(f"factor {self.factor} is below 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """Where one image's posterior is and how its file's pixels became the model's input."""

    path: str
    """Relative to the encoded folder, with "/" between its parts."""
    shard: str
    row: int
    """Of its shard's tensors for latents of its size."""
    geometry: Geometry
    sha256: str
    """Of the source file."""
    label: str | None
    """The first folder of the path, as in a folder of classes; None at the top level."""

    def __post_init__(self) -> None:
        for name in (self.path, self.shard):
            check_name(name)
        if self.row < 0:
            raise ValueError(f"row {self.row} is negative")


def header_of(codec: Codec, dtype: StoredDtype, flips: bool = False) -> Header:
    return Header(
        format_version=FORMAT_VERSION,
        model_id=codec.model_id,
        factor=codec.factor,
        pixel_range=codec.likelihood.data_range,
        scale_state="raw",
        second_moment="logvar",
        dtype=dtype,
        statistics=codec.statistics,
        flips=flips,
    )


class Row(NamedTuple):
    """One image's posterior as it will be stored."""

    entry: Entry  # its shard and row not known yet
    mean: torch.Tensor  # (z, h, w) of the stored type, as are the others
    logvar: torch.Tensor
    mean_flip: torch.Tensor | None = None
    logvar_flip: torch.Tensor | None = None


def row(
    path: str,
    posterior: DiagonalGaussian,
    index: int,
    geometry: Geometry,
    sha256: str,
    dtype: StoredDtype,
    mirrored: DiagonalGaussian | None = None,
) -> Row:
    """Image `index` of a batch's posterior, and of that of the mirrored images if they are to be stored.

    Raises `UserError` if the stored type cannot hold it or the path is no plain relative one.
    """
    found = [posterior] if mirrored is None else [posterior, mirrored]
    exact = [t[index].cpu() for p in found for t in (p.mean, p.logvar)]  # (z, h, w) each
    moments = [t.to(getattr(torch, dtype)) for t in exact]
    if not _finite(*moments):
        if not _finite(*exact):
            raise UserError(f"{path}: the model's latents are not finite; try --dtype float32")
        raise UserError(f"{path}: latents exceed the range of {dtype}; give --store float32")
    label = path.split("/")[0] if "/" in path else None
    try:
        entry = Entry(path=path, shard=_UNKNOWN, row=0, geometry=geometry, sha256=sha256, label=label)
    except UserError as error:
        raise UserError(f"{path}: {error}; rename it") from error
    return Row(entry, *moments)


def write_shard(folder: Path, header: Header, name: str, rows: Sequence[Row]) -> list[Entry]:
    """`latents-NAME.safetensors` with all rows, whatever their sizes, as the header says; raises `OSError`.

    Equal rows in equal order give equal files. Returns the entries, in the order of the rows.
    """
    shard = f"latents-{name}.safetensors"
    by_size: dict[tuple[int, int], list[Row]] = {}
    entries: list[Entry] = []
    for one in rows:
        same = by_size.setdefault((one.mean.shape[1], one.mean.shape[2]), [])
        entries.append(dataclasses.replace(one.entry, shard=shard, row=len(same)))
        same.append(one)
    tensors: dict[str, torch.Tensor] = {}
    for size, same in by_size.items():
        for part in parts(flip=False) + (parts(flip=True) if header.flips else ()):
            tensors[tensor_name(part, size)] = torch.stack([getattr(r, part) for r in same])  # (n, z, h, w)
    save_tensors(folder / shard, tensors, {KEY: index_json(header, entries)})
    return entries


def parts(*, flip: bool) -> tuple[Part, Part]:
    """Names of the mean and the log-variance of images, or of the mirrored ones."""
    return ("mean_flip", "logvar_flip") if flip else ("mean", "logvar")


def tensor_name(part: Part, size: tuple[int, int]) -> str:
    """Of a shard's tensor for latents of this (height, width)."""
    return f"{part}.{size[0]}x{size[1]}"


def latent_size(geometry: Geometry, factor: int) -> tuple[int, int]:
    """Height and width of the latents of an image of this geometry."""
    return -(-geometry.height // factor), -(-geometry.width // factor)


def write_index(folder: Path, header: Header, entries: Sequence[Entry]) -> None:
    write_text(folder / INDEX, index_json(header, sorted(entries, key=lambda e: e.path)))


def index_json(header: Header, entries: Sequence[Entry]) -> str:
    """Sorted JSON in ASCII: a name that is not valid UTF-8 survives as escaped surrogates."""
    found = to_json(header) | {"entries": [to_json(e) for e in entries]}
    return json.dumps(found, sort_keys=True, separators=(",", ":"), allow_nan=False)


_UNKNOWN = "unknown"  # an entry's shard until it is written


def _finite(*tensors: torch.Tensor) -> bool:
    """By their sums, which float64 holds of any finite float32: a third of the time of looking at each element."""
    return all(math.isfinite(t.sum(dtype=torch.float64).item()) for t in tensors)


def stored_files(folder: Path) -> list[Path]:
    """The index and the shards of latents in a folder, those that are there."""
    return [*folder.glob(INDEX), *stored_shards(folder)]


def stored_shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("latents-*.safetensors"))


class Index(NamedTuple):
    header: Header
    entries: list[Entry]


def read_index(path: Path) -> Index:
    """Read index.json, or the same facts from one shard's metadata; raises `UserError` if it is damaged or unsafe."""
    text = _index_text(path)
    try:
        found: dict[str, Any] = from_json(dict, json.loads(text), where="index")
        version = found.get("format_version")
        if version == FORMAT_VERSION:
            entries = from_json(tuple[Entry, ...], found.pop("entries", None), where="entries")
            header = from_json(Header, found, where="header")
            if len({entry.path for entry in entries}) < len(entries):
                raise ValueError("two entries have the same path")
            return Index(header, list(entries))
    except (ValueError, RecursionError) as error:
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


def check_model(header: Header, model_id: str, where: str) -> None:
    """Raise `UserError` if the latents are another model's."""
    if header.model_id != model_id:
        raise UserError(
            f"{where}: made by model {header.model_id[:12]}, but the model given is {model_id[:12]}; "
            f"{right_model(lambda codec: codec.model_id == header.model_id)}"
        )
