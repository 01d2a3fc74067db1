"""Define how networks run: device, precision, batch size, workers and tiles."""

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComputeOptions:
    device: str | None = None
    """cpu, cuda, cuda:1, mps ...; by default a GPU if there is one."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the networks; posteriors are float32 always."""
    batch_size: int = 8
    workers: int | None = None
    """Images that are read, decoded and written at once, by default 4, with a GPU one a core up to 16."""
    decode_in: Literal["threads", "processes"] | None = None
    """Where images are decoded, by default in threads, with a GPU, which outruns threads, in processes."""
    compile: bool = False
    """Have torch compile the networks: slow to start, then faster; results differ in their last bits."""
    tile: int | None = None
    """Side in pixels of the tiles that larger images are cut into, by default 1536; only results of conv change."""
