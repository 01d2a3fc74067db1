"""Define the flags that several commands share."""

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResumeOptions:
    """Choose what a repeated command makes again, and how processes share the work."""

    check: Literal["hash", "mtime"] = "hash"
    """Recognise outputs that are up to date by the hashes of output and source, or by sizes and times of change."""
    shard: str | None = None
    """Do only part i of n, given as i/n from 0/n to (n-1)/n; the n processes need not know of each other."""
    overwrite: bool = False
    """Make everything again, and replace files that were there before."""

    def resume(self):
        """Return the options as `Resume`; raises `UserError` for a share that makes no sense."""
        from latent_codec.folders.jobs import Resume
        from latent_codec.folders.resume.units import Share

        share = Share.of_launcher() if self.shard is None else Share.parse(self.shard)
        return Resume(check=self.check, overwrite=self.overwrite, share=share)
