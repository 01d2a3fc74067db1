"""Define the command `latent-codec trim`."""

import dataclasses
from functools import partial
from pathlib import Path
from typing import Annotated

import tyro

from latent_codec.commands.options import ResumeOptions
from latent_codec.folders.makers import makes_streams, runners_for
from latent_codec.inference.options import ComputeOptions
from latent_codec.program import say


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trim:
    """Make .lc files smaller by leaving out their last channels; for models with nested latents."""

    src: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="SRC")]
    """A folder or tar file of .lc files, or one of them."""
    dst: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DST")]
    """Folder for the trimmed files."""
    channels: int
    """Channels to keep, a prefix of the model's; a group of channels is kept or left out as a whole."""
    model: str | None = None
    """The model that made the files: a shipped model's name or a file; by default found by what the files say."""
    models: Path | None = None
    """A folder of model files to find it in, beside the shipped models."""
    follow_links: bool = False
    """Search linked folders too, each once."""
    resume: tyro.conf.OmitArgPrefixes[ResumeOptions] = dataclasses.field(default_factory=ResumeOptions)
    compute: tyro.conf.OmitArgPrefixes[ComputeOptions] = dataclasses.field(default_factory=ComputeOptions)

    def run(self) -> int:
        """Trim, print the summary and return the exit code."""
        from latent_codec.folders.read_lc import makers_of
        from latent_codec.folders.trim_lc import trim_lc
        from latent_codec.images.sources import ListOptions

        search = ListOptions(follow_links=self.follow_links)
        makers = partial(makers_of, self.src, search.without(self.dst))
        runners = runners_for(self.model, self.models, makers, makes_streams, self.compute)
        summary = trim_lc(runners, self.src, self.dst, self.channels, search=search, resume=self.resume.resume())
        say(summary)
        return 1 if summary.failures else 0
