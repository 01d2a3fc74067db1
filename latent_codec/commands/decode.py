"""Define the command `latent-codec decode`."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeVar

import tyro

from latent_codec.commands.options import ResumeOptions
from latent_codec.errors import UserError
from latent_codec.inference.load import load
from latent_codec.inference.makers import load_makers
from latent_codec.inference.options import ComputeOptions
from latent_codec.program import say

if TYPE_CHECKING:
    from latent_codec.inference.runner import Runner
    from latent_codec.model.codec import Codec
    from latent_codec.prior.priors import PriorKind

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decode:
    """Decode .lc files or latents to images; names are kept whole: a.jpg.lc becomes a.jpg.png."""

    src: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="SRC")]
    """Output of `encode`: a folder, a tar file, or one .lc file."""
    dst: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DST")]
    """Folder for the images."""
    model: str | None = None
    """The model that encoded them: a shipped model's name or a file; by default found by what the files say."""
    models: Path | None = None
    """A folder of model files to find it in, beside the shipped models."""
    image_format: Literal["png", "webp", "jpg"] = "png"
    """Format of the images."""
    tar: bool = False
    """Put the images into tar shards of about 128 images each, as WebDataset reads them."""
    sample: int | None = None
    """Latents: decode a draw from the posterior with this seed, by default its mode; .lc files hold their own draw."""
    max_pixels: int = 2**27
    """Refuse .lc files of larger images before anything is allocated for them."""
    follow_links: bool = False
    """Search linked folders too, each once."""
    resume: tyro.conf.OmitArgPrefixes[ResumeOptions] = dataclasses.field(default_factory=ResumeOptions)
    compute: tyro.conf.OmitArgPrefixes[ComputeOptions] = dataclasses.field(default_factory=ComputeOptions)

    def run(self) -> int:
        """Decode, print the summary and return the exit code."""
        from latent_codec.folders.decode_images import DecodeOptions
        from latent_codec.folders.decode_latents import decode_latents
        from latent_codec.folders.decode_lc import decode_lc, is_lc, makers_of
        from latent_codec.images.sources import ListOptions
        from latent_codec.latents.format import INDEX, read_index

        options = DecodeOptions(
            image_format=self.image_format,
            sample=self.sample,
            max_pixels=self.max_pixels,
            tar=self.tar,
            search=ListOptions(follow_links=self.follow_links),
        )
        resume = self.resume.resume()
        if is_lc(self.src):
            runners = self._runners(lambda: makers_of(self.src, options.search.without(self.dst)), _makes_streams)
            summary = decode_lc(runners, self.src, self.dst, options, resume=resume)
        else:
            (runner,) = self._runners(lambda: {read_index(self.src / INDEX)[0].model_id}, _has_id)
            summary = decode_latents(runner, self.src, self.dst, options, resume=resume)
        say(summary)
        return 1 if summary.failures else 0

    def _runners(self, wanted: "Callable[[], set[T]]", made_by: "Callable[[Codec, T], bool]") -> "list[Runner]":
        if self.model is not None:
            if self.models is not None:
                raise UserError(f"--model {self.model} says which model it is; leave out --models {self.models}")
            return [load(self.model, self.compute)]
        return load_makers(wanted(), made_by, self.models, self.compute)


def _makes_streams(codec: "Codec", maker: "tuple[PriorKind, bytes]") -> bool:
    from latent_codec.bitstream.stream_codec import is_maker

    return is_maker(codec, *maker)


def _has_id(codec: "Codec", model_id: str) -> bool:
    return codec.model_id == model_id
