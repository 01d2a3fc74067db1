"""Define how a model's networks run: device, precision, batch size, workers and tiles."""

import dataclasses
from typing import Literal

from latent_codec.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComputeOptions:
    """Choose where and how networks run."""

    device: str | None = None
    """cpu, cuda, cuda:1, mps ...; by default a GPU if there is one."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the networks; posteriors are float32 always."""
    batch_size: int = 8
    """Images of one shape that go through a network together."""
    workers: int | None = None
    """Images that are read, decoded and written at once; by default 4, on a GPU one per core, up to 16."""
    decode_in: Literal["threads", "processes"] | None = None
    """Decode image files in threads, the default, or in processes, the default with a GPU, which outruns threads."""
    compile: bool = False
    """Compile the networks with torch.compile: slow to start, then faster; results differ in their last bits."""
    tile: int | None = None
    """Side in pixels of the tiles that larger images are cut into, by default 1536; it changes only conv models."""

    def check(self) -> None:
        """Raise `UserError` if a count is below 1."""
        if self.batch_size < 1 or (self.workers is not None and self.workers < 1):
            raise UserError(f"--batch-size {self.batch_size} and --workers {self.workers} must both be at least 1")
