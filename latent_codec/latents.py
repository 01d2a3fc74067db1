"""Posteriors of many images on disk, for training on: safetensors shards and an index.

A folder holds `latents-NAME-00.safetensors` ... with tensors `mean` and `logvar` (n, z, h, w), one shape per shard, and
`index.json`, which says where each image is. Values are raw (not scaled); logvar is the natural log of the variance.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors import safe_open
from torch.utils.data import Dataset

from latent_codec.bottlenecks import DiagonalGaussian
from latent_codec.codec import Codec
from latent_codec.config import from_json, to_json
from latent_codec.errors import UserError
from latent_codec.files import check_name, write_text
from latent_codec.images import Geometry
from latent_codec.modelfile import KEY, LatentStatistics, own_metadata, save_tensors
from latent_codec.noise import fold, normal, text_key

FORMAT_VERSION = 1
INDEX = "index.json"
StoredDtype = Literal["float16", "bfloat16", "float32"]


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


def header_of(codec: Codec, dtype: StoredDtype) -> Header:
    return Header(
        format_version=FORMAT_VERSION,
        model_id=codec.model_id,
        factor=codec.factor,
        pixel_range=codec.likelihood.data_range,
        scale_state="raw",
        second_moment="logvar",
        dtype=dtype,
        statistics=codec.statistics,
    )


class Row(NamedTuple):
    """One image's posterior as it will be stored."""

    entry: Entry  # its shard and row not known yet
    mean: torch.Tensor  # (z, h, w) of the stored type
    logvar: torch.Tensor


def row(path: str, posterior: DiagonalGaussian, index: int, geometry: Geometry, sha256: str, dtype: StoredDtype) -> Row:
    """Image `index` of a batch's posterior.

    Raises `UserError` if the stored type cannot hold it or the path is no plain relative one.
    """
    exact = posterior.mean[index].cpu(), posterior.logvar[index].cpu()  # (z, h, w)
    mean, logvar = (t.to(getattr(torch, dtype)) for t in exact)
    if not _finite(mean, logvar):
        if not _finite(*exact):
            raise UserError(f"{path}: the model's latents are not finite; try --dtype float32")
        raise UserError(f"{path}: latents exceed the range of {dtype}; give --store float32")
    label = path.split("/")[0] if "/" in path else None
    try:
        entry = Entry(path=path, shard=_UNKNOWN, row=0, geometry=geometry, sha256=sha256, label=label)
    except UserError as error:
        raise UserError(f"{path}: {error}; rename it") from error
    return Row(entry, mean, logvar)


def write_shards(folder: Path, header: Header, name: str, rows: Sequence[Row]) -> list[Entry]:
    """One shard for each shape of `rows`, called `latents-NAME-00.safetensors` and so on; raises `OSError`.

    Equal rows in equal order give equal files. Returns the entries, in the order of the shards.
    """
    by_shape: dict[tuple[int, ...], list[Row]] = {}
    for one in rows:
        by_shape.setdefault(tuple(one.mean.shape), []).append(one)
    written: list[Entry] = []
    for number, shape in enumerate(sorted(by_shape)):
        shard = f"latents-{name}-{number:02d}.safetensors"
        same = by_shape[shape]
        entries = [dataclasses.replace(r.entry, shard=shard, row=i) for i, r in enumerate(same)]
        tensors = {"mean": torch.stack([r.mean for r in same]), "logvar": torch.stack([r.logvar for r in same])}
        save_tensors(folder / shard, tensors, {KEY: index_json(header, entries)})
        written += entries
    return written


def write_index(folder: Path, header: Header, entries: Sequence[Entry]) -> None:
    write_text(folder / INDEX, index_json(header, sorted(entries, key=lambda e: e.path)))


def index_json(header: Header, entries: Sequence[Entry]) -> str:
    """Sorted JSON in ASCII: a name that is not valid UTF-8 survives as escaped surrogates."""
    found = to_json(header) | {"entries": [to_json(e) for e in entries]}
    return json.dumps(found, sort_keys=True, separators=(",", ":"), allow_nan=False)


_UNKNOWN = "unknown"  # an entry's shard until it is written


def _finite(*tensors: torch.Tensor) -> bool:
    return all(bool(torch.isfinite(t).all()) for t in tensors)


def stored_files(folder: Path) -> list[Path]:
    """The index and the shards of latents in a folder, those that are there."""
    return [*folder.glob(INDEX), *stored_shards(folder)]


def stored_shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("latents-*.safetensors"))


class LatentSample(NamedTuple):
    z: torch.Tensor  # (z, h, w) float32
    path: str
    label: str | None


class Latents(Dataset[LatentSample]):
    """The folder as a torch `Dataset` that draws z = mean + std * noise anew from (seed, epoch, path).

    `normalize` scales z by the model's statistics to mean 0 and standard deviation 1 per channel. `model_id`, where
    given, must be the model that made the latents. Raises `UserError` for a folder that is none of ours.
    """

    def __init__(self, folder: Path, *, seed: int = 0, normalize: bool = False, model_id: str | None = None) -> None:
        self.folder, self.seed, self.epoch = Path(folder), seed, 0
        self.header, self.entries = read_index(self.folder / INDEX)
        if model_id is not None:
            check_model(self.header, model_id, str(folder))
        self._scale: tuple[torch.Tensor, torch.Tensor] | None = None
        if normalize:
            if self.header.statistics is None:
                raise UserError(f"{folder}: the model had no latent statistics; export it with `latent-codec export`")
            mean, std = (
                torch.tensor(v)[:, None, None] for v in (self.header.statistics.mean, self.header.statistics.std)
            )
            self._scale = (mean, std)

    def set_epoch(self, epoch: int) -> None:
        """Draws of different epochs are independent."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.entries)

    def posterior(self, index: int) -> DiagonalGaussian:
        """The stored posterior of one image as a batch of one, float32.

        Raises `UserError` if the shard is missing or does not hold it.
        """
        entry, geometry = self.entries[index], self.entries[index].geometry
        try:
            with safe_open(self.folder / entry.shard, framework="pt") as file:
                mean, logvar = (file.get_slice(k)[entry.row : entry.row + 1].float() for k in ("mean", "logvar"))
        except Exception as error:  # safetensors raises several kinds for a damaged or missing shard
            raise UserError(f"{entry.path}: shard {entry.shard} cannot be read: {error}") from error
        sides = tuple(-(-side // self.header.factor) for side in (geometry.height, geometry.width))
        fits = mean.ndim == 4 and len(mean) == 1 and mean.shape == logvar.shape and mean.shape[2:] == sides
        if not fits or not _finite(mean, logvar):
            raise UserError(f"{entry.path}: row {entry.row} of shard {entry.shard} is damaged; encode the image again")
        return DiagonalGaussian(mean, logvar)  # (1, z, h/f, w/f)

    def __getitem__(self, index: int) -> LatentSample:
        entry, posterior = self.entries[index], self.posterior(index)
        key = fold(self.seed, self.epoch, text_key(entry.path))
        z = posterior.sample(normal(key[None], tuple(posterior.mean.shape[1:])))[0]
        if self._scale is not None:
            z = (z - self._scale[0]) / self._scale[1]
        return LatentSample(z, entry.path, entry.label)


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
    raise UserError(f"{path}: format version {version}; this program reads {FORMAT_VERSION}: update latent-codec")


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
            "give the right one with --model"
        )
