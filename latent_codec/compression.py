"""Folders of images -> folders of latents, and back. One bad image never ends the work of the others."""

import dataclasses
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from tqdm import tqdm

from latent_codec.codec import Codec
from latent_codec.colour import parse_colour
from latent_codec.errors import UserError
from latent_codec.files import make_folder
from latent_codec.images import DEFAULT_MAX_PIXELS, Geometry, crop, pad, read_image, write_image
from latent_codec.inputs import Source, find_images
from latent_codec.latents import Entry, Latents, LatentsWriter, StoredDtype, stored_files
from latent_codec.noise import fold, normal, text_key

T = TypeVar("T")
R = TypeVar("R")


@dataclasses.dataclass
class Summary:
    """What became of the images: done + failed = found."""

    verb: str
    found: int = 0
    done: int = 0
    failures: dict[str, str] = dataclasses.field(default_factory=dict)
    bytes_in: int = 0
    bytes_out: int = 0
    seconds: float = 0.0

    def fail(self, name: str, reason: object) -> None:
        text = str(reason) if isinstance(reason, (UserError, str)) else f"{type(reason).__name__}: {reason}"
        self.failures[name] = text
        tqdm.write(text if text.startswith(name) else f"{name}: {text}", file=sys.stderr)

    def __str__(self) -> str:
        failed = f", {len(self.failures)} failed" if self.failures else ""
        return (
            f"{self.verb} {self.done} of {self.found} images{failed} in {self.seconds:.1f} s "
            f"({self.done / max(self.seconds, 1e-9):.1f} images/s); {self.bytes_in / 1e6:.2f} MB in, "
            f"{self.bytes_out / 1e6:.2f} MB out"
        )


class Compute(NamedTuple):
    """Where and how the networks run."""

    device: str
    dtype: Literal["float32", "bfloat16", "float16"]
    batch_size: int
    workers: int
    """Threads that read and write image files."""

    def autocast(self) -> torch.autocast:
        dtype = getattr(torch, self.dtype)
        return torch.autocast(self.device.split(":")[0], dtype=dtype, enabled=self.dtype != "float32")


class _Read(NamedTuple):
    source: Source
    data: bytes
    pixels: torch.Tensor  # (3, h, w) uint8, padded to multiples of the factor
    geometry: Geometry


def encode_folder(
    codec: Codec,
    where: str | Path,
    folder: Path,
    compute: Compute,
    *,
    store: StoredDtype = "float16",
    background: str = "#ffffff",
    max_pixels: int = DEFAULT_MAX_PIXELS,
    overwrite: bool = False,
    quiet: bool = False,
) -> Summary:
    """Store the posterior of every image found at `where` in `folder` (see `latent_codec.latents`).

    Raises `UserError` before any work if nothing is found, an option makes no sense, the model is none of RGB images,
    or `folder` cannot be written into or holds latents already (`overwrite` replaces them). Raises `OSError` if the
    disk refuses later; the latents stored before then are readable.
    """
    started = time.monotonic()
    _check_rgb(codec)
    parse_colour(background)  # refuses what is no colour once, not once for each image
    if max_pixels < 1:
        raise UserError(f"a limit of {max_pixels} pixels refuses every image; it must be at least 1")
    sources = find_images(where)
    if stored_files(folder) and not overwrite:
        raise UserError(f"{folder}: holds latents already; give another folder, or --overwrite to replace them")
    summary = Summary("encoded", found=len(sources))

    def read(source: Source) -> _Read:
        try:
            data = source.read_bytes()
        except OSError as error:
            raise UserError(f"{source.name}: cannot be read: {error.strerror or error}") from error
        image = read_image(data, max_pixels=max_pixels, background=background, name=source.name)
        return _Read(source, data, pad(image.pixels, codec.factor), image.geometry)

    bar = tqdm(total=len(sources), desc="encode", unit="image", disable=quiet or None)
    with LatentsWriter(folder, codec, store) as writer, bar:
        outcomes = _in_threads(read, sources, compute.workers)
        for batch in _batches(_successes(outcomes, summary, bar), compute.batch_size):
            with torch.inference_mode(), compute.autocast():
                posterior = codec.encode(torch.stack([r.pixels for r in batch]).to(compute.device))
            for row, item in enumerate(batch):
                try:
                    writer.add(item.source.name, posterior, row, item.geometry, item.data)
                except UserError as error:
                    summary.fail(item.source.name, error)
                else:
                    summary.done += 1
                    summary.bytes_in += len(item.data)
                bar.update()
    summary.bytes_out = sum(f.stat().st_size for f in stored_files(folder))
    summary.seconds = time.monotonic() - started
    return summary


def decode_folder(
    codec: Codec,
    where: Path,
    folder: Path,
    compute: Compute,
    *,
    image_format: Literal["png", "webp", "jpg"] = "png",
    sample: int | None = None,
    overwrite: bool = False,
    quiet: bool = False,
) -> Summary:
    """Decode a folder of latents; `a/b.jpg` becomes `folder/a/b.jpg.png`.

    The posterior's mode is decoded, or with `sample` a draw that depends on (sample, path) alone. Raises `UserError`
    before any work if the latents are another model's, if `folder` cannot be written into, or if outputs exist and
    `overwrite` is not set.
    """
    started = time.monotonic()
    _check_rgb(codec)
    latents = Latents(where, model_id=codec.model_id)
    outputs = {e.path: folder / f"{e.path}.{image_format}" for e in latents.entries}
    existing = [path for path in outputs.values() if _exists(path)]
    if existing and not overwrite:
        others = f" and {len(existing) - 1} more" if len(existing) > 1 else ""
        raise UserError(f"exists already: {existing[0]}{others}; give another folder, or --overwrite to replace them")
    make_folder(folder)
    summary = Summary("decoded", found=len(latents))

    def write(job: tuple[Entry, torch.Tensor]) -> int:
        entry, pixels = job
        path = outputs[entry.path]
        try:
            write_image(path, crop(pixels, entry.geometry), entry.geometry, image_format)
            return path.stat().st_size
        except OSError as error:
            raise UserError(f"{entry.path}: {path} cannot be written: {error.strerror or error}") from error

    bar = tqdm(total=len(latents), desc="decode", unit="image", disable=quiet or None)

    def decoded() -> Iterator[tuple[Entry, torch.Tensor]]:
        for batch in _batches(_stored(latents, codec, sample, summary, bar), compute.batch_size):
            with torch.inference_mode(), compute.autocast():
                pixels = codec.decode_uint8(torch.stack([z for _, z in batch]).to(compute.device)).cpu()
            yield from zip([entry for entry, _ in batch], pixels, strict=True)

    with bar:
        for job, future in _in_threads(write, decoded(), compute.workers):
            try:
                summary.bytes_out += future.result()
                summary.done += 1
            except Exception as error:
                summary.fail(job[0].path, error)
            bar.update()
    summary.bytes_in = sum(f.stat().st_size for f in stored_files(where))
    summary.seconds = time.monotonic() - started
    return summary


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name too long: writing it will fail, and that is counted
        return False


def _check_rgb(codec: Codec) -> None:
    if codec.config.image_channels != 3:
        raise UserError(f"a model of images with {codec.config.image_channels} channels; image files need one with 3")


def _stored(
    latents: Latents, codec: Codec, sample: int | None, summary: Summary, bar: Any
) -> Iterator[tuple[Entry, torch.Tensor]]:
    """Each entry's latent (z, h, w) to decode, shard by shard."""
    order = sorted(range(len(latents)), key=lambda i: (latents.entries[i].shard, latents.entries[i].row))
    for i in order:
        entry = latents.entries[i]
        try:
            posterior = latents.posterior(i)
            if posterior.mean.shape[1] != codec.config.latent_channels:
                raise UserError(f"{entry.path}: shard {entry.shard} holds {posterior.mean.shape[1]} latent channels")
        except UserError as error:
            summary.fail(entry.path, error)
            bar.update()
            continue
        if sample is None:
            yield entry, posterior.mode()[0]
        else:
            key = fold(sample, text_key(entry.path))
            yield entry, posterior.sample(normal(key[None], tuple(posterior.mean.shape[1:])))[0]


def _in_threads(work: Callable[[T], R], items: Iterable[T], workers: int) -> Iterator[tuple[T, "Future[R]"]]:
    """(item, finished future) in order, a bounded number ahead."""
    with ThreadPoolExecutor(workers) as pool:
        iterator = iter(items)
        waiting = [(item, pool.submit(work, item)) for item in islice(iterator, 2 * workers)]
        while waiting:
            item, future = waiting.pop(0)
            future.exception()  # wait; the caller asks for the result
            waiting += [(later, pool.submit(work, later)) for later in islice(iterator, 1)]
            yield item, future


def _successes(outcomes: Iterable[tuple[Source, "Future[_Read]"]], summary: Summary, bar: Any) -> Iterator[_Read]:
    for source, future in outcomes:
        try:
            image = future.result()
        except Exception as error:  # whatever a stranger's file sets off, the others go on
            summary.fail(source.name, error)
            bar.update()
        else:
            yield image


def _batches(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Lists of up to `size` items of equal shape: images are never padded to each other's size.

    At most 4 * size items wait for companions.
    """
    waiting: dict[tuple[int, ...], list[Any]] = {}
    for item in items:
        tensor = next(field for field in item if isinstance(field, torch.Tensor))
        group = waiting.setdefault(tuple(tensor.shape), [])
        group.append(item)
        if len(group) == size:
            yield waiting.pop(tuple(tensor.shape))
        elif sum(map(len, waiting.values())) >= 4 * size:
            yield waiting.pop(max(waiting, key=lambda s: len(waiting[s])))
    yield from waiting.values()
