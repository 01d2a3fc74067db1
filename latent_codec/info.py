"""Describe a file in words: a model, a diffusion model, a `.lc` file or a folder of them, latents or one shard."""

from pathlib import Path

from safetensors import SafetensorError

from latent_codec.bitstream import container
from latent_codec.bitstream.container import SUFFIX, Stream
from latent_codec.bitstream.stream_codec import is_maker
from latent_codec.errors import UserError
from latent_codec.folders.read_lc import list_lc
from latent_codec.images.sources import ListOptions, Source
from latent_codec.latents.format import INDEX, moment_names, read_index
from latent_codec.model.codec import Codec
from latent_codec.model.describe import describe_model
from latent_codec.model.shipped import resolve, shipped_names
from latent_codec.prior.quantizer import STEP_ONE
from latent_codec.program import paragraph
from latent_codec.storage.tensors import FORMAT_VERSION, open_tensors, read_header

_FLIPS = ", and the same of the images mirrored left to right"


def describe(where: str, model: str | None = None, damaged: list[str] | None = None) -> str:
    """Describe a file; `.lc` files are compared with `model`, by default with the shipped ones.

    Damaged files of a folder are left out, and a sentence about each is appended to `damaged`. Raises `UserError` for
    what cannot be described.
    """
    path, damaged = Path(where), [] if damaged is None else damaged
    streams: list[Source] = []
    if path.is_dir() or path.suffix == ".tar":
        streams, _, unreadable = list_lc(path, ListOptions())
        damaged += unreadable.values()
        if unreadable and not streams and not (path / INDEX).is_file():
            raise UserError(f"{damaged[0]}; nothing else is there")
    if streams or path.suffix == SUFFIX:
        return _describe_streams(streams, model, damaged) if streams else _describe_stream(path, model)
    if model is not None:
        raise UserError(f"{where}: only {SUFFIX} files are compared with a --model")
    if path.is_dir():
        return _describe_latents(path / INDEX, damaged)
    if path.name == INDEX:
        return _describe_latents(path, damaged)
    path = resolve(where)
    if _is_shard(path):
        return _describe_latents(path, damaged)
    if "transformer" in read_header(path):
        return _describe_diffusion(path)
    return describe_model(Codec.load(path).contents(), path)


def _is_shard(path: Path) -> bool:
    try:
        with open_tensors(path) as file:
            found = {name.partition(".")[0] for name in file.keys()}  # noqa: SIM118
            plain = set(moment_names(flip=False))
            return found in (plain, plain | set(moment_names(flip=True)))
    except (SafetensorError, OSError):
        return False


def _describe_diffusion(path: Path) -> str:
    from latent_codec.diffusion.model import Diffusion  # needs an extra

    model = Diffusion.load(path)
    classes = ", ".join(model.latents.classes) or "none: an unconditional model"
    lines = [
        f"diffusion   {path.name}, {path.stat().st_size / 1e6:.2f} MB, format {FORMAT_VERSION}",
        f"id          {model.model_id}",
        f"network     {model.config}, {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters",
        f"latents     {' x '.join(map(str, model.shape))} of model {model.latents.codec_id}",
        f"classes     {classes}",
    ]
    return paragraph(lines)


def _read_stream(name: str, path: Path, offset: int = 0, size: int | None = None) -> Stream:
    try:  # no pixels are decoded, so there is no limit
        return container.unpack(container.read_bytes(path, offset, size), max_pixels=2**64)
    except OSError as error:
        raise UserError(f"{name}: cannot be read: {error.strerror or error}") from error
    except UserError as error:
        raise UserError(f"{name}: {error}") from error


def _describe_stream(path: Path, model: str | None) -> str:
    stream = _read_stream(str(path), path)
    geometry, size = stream.geometry, container.OVERHEAD + len(stream.payload)
    image = [f"{geometry.width}x{geometry.height}", {"L": "grey", "RGB": "colour"}[geometry.mode]]
    if geometry.orientation != 1:
        image.append(f"turned upright from EXIF orientation {geometry.orientation}")
    if geometry.background is not None:
        image.append(f"transparency laid on {geometry.background}")
    codec, called = _model_of(stream, model)
    drawn = "the mean, rounded" if stream.seed is None else f"a draw, dithered with seed {stream.seed}"
    latents = f"{drawn}, step {stream.step / STEP_ONE:.4g}"
    latents += "" if stream.groups is None else f", the first {stream.groups} groups of channels"
    if codec is not None and codec.config.codes is not None:
        latents = f"indices of a codebook of {codec.config.codes}"
    return paragraph(
        [
            f"stream      {path.name}, {size} bytes, format {stream.version}",
            f"image       {', '.join(image)}",
            f"model       {called}",
            f"prior       {stream.prior}",
            f"latents     {latents}",
            f"payload     {len(stream.payload)} bytes, {container.OVERHEAD} more of header and checksums",
            f"on disk     {8 * size / (geometry.width * geometry.height):.3f} bits per pixel",
        ]
    )


def _describe_streams(sources: list[Source], model: str | None, damaged: list[str]) -> str:
    found: list[Stream] = []
    for source in sources:
        try:
            found.append(_read_stream(source.name, source.path, source.offset, source.size))
        except UserError as error:
            damaged.append(str(error))
    if not found:
        raise UserError(f"all {len(damaged)} files are damaged, as the first: {damaged[0]}")
    size = sum(container.OVERHEAD + len(s.payload) for s in found)
    pixels = sum(s.geometry.width * s.geometry.height for s in found)
    kinds = {s.stream_id: s for s in found}
    steps = sorted({s.step / STEP_ONE for s in found})
    dithered = sum(s.seed is not None for s in found)
    return paragraph(
        [
            f"streams     {len(found)} images, {size / 1e6:.2f} MB{_and_damaged(damaged)}",
            *(f"model       {_model_of(s, model)[1]}, {s.prior} prior" for s in kinds.values()),
            f"latents     {len(found) - dithered} rounded, {dithered} dithered, step {steps[0]:.4g} to {steps[-1]:.4g}",
            f"on disk     {8 * size / pixels:.3f} bits per pixel",
        ]
    )


def _and_damaged(damaged: list[str]) -> str:
    return f"; {len(damaged)} damaged" if damaged else ""


def _model_of(stream: Stream, model: str | None) -> tuple[Codec | None, str]:
    """Return the given model, or a shipped one, if it made the stream, and what to print about it."""
    text, names = f"stream id {stream.stream_id.hex()}", shipped_names() if model is None else [model]
    for name in names:
        codec = Codec.load(name)
        if is_maker(codec, stream.prior, stream.stream_id):
            return codec, f"{name} ({text})"
    return None, f"not {' or '.join(names)} ({text})" if names else text


def _describe_latents(path: Path, damaged: list[str]) -> str:
    header, entries = read_index(path)
    if not entries:
        raise UserError(f"{path}: an index without entries")
    pixels = sum(e.geometry.width * e.geometry.height for e in entries)
    # A shard's entries describe it under its first name; it may have another one now.
    shards = {path.parent / e.shard for e in entries} if path.name == INDEX else {path}
    if missing := sorted(shard.name for shard in shards if not shard.is_file()):
        raise UserError(f"{path}: {len(missing)} of its {len(shards)} shards are missing: {', '.join(missing[:5])}")
    for shard in sorted(shards):
        try:
            with open_tensors(shard):
                pass
        except (SafetensorError, OSError) as error:
            damaged.append(f"{shard}: damaged: {error}")
    size = sum(shard.stat().st_size for shard in shards)
    return paragraph(
        [
            f"latents     {len(entries)} images in {len(shards)} shards, {size / 1e6:.2f} MB{_and_damaged(damaged)}",
            f"model       {header.model_id}{'' if header.channels is None else f', first {header.channels} channels'}",
            f"stored as   mean and {header.second_moment} in {header.dtype}, {header.scale_state}, 1/{header.factor} "
            f"of each side, from pixels in {list(header.pixel_range)}{_FLIPS if header.flips else ''}",
            f"on disk     {8 * size / pixels:.3f} bits per pixel",
            f"statistics  {'over ' + header.statistics.source if header.statistics else 'none'}",
        ]
    )
