"""Flags that several commands share: where and how networks run, and what of a folder is done again."""

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResumeOptions:
    check: Literal["hash", "mtime"] = "hash"
    """What tells a repeated command that an output is done: the bytes of it and its source, or sizes and times."""
    shard: str | None = None
    """i/n, from 0/n: do this part of the work only; n processes need not know of each other."""
    overwrite: bool = False
    """Make everything again, and replace files that were there before."""

    def options(self):
        from latent_codec.folders.jobs import Resume
        from latent_codec.folders.resume.units import Share

        share = Share.of_launcher() if self.shard is None else Share.parse(self.shard)
        return Resume(self.check, self.overwrite, share)
