"""Flags that several commands share: where and how networks run, and what of a folder is done again."""

import dataclasses
import os
from typing import Literal

from latent_codec.errors import UserError


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


def load(model: str, options: ComputeOptions):
    """The codec on its device, and the `Compute` that says how it runs; raises `UserError` for what cannot be."""
    import torch

    from latent_codec.codec import Codec
    from latent_codec.compute import Compute
    from latent_codec.tiling import default_tile

    if options.batch_size < 1 or (options.workers is not None and options.workers < 1):
        raise UserError(f"--batch-size {options.batch_size} and --workers {options.workers} must both be at least 1")
    device = options.device or ("cpu" if not torch.cuda.is_available() else _own_gpu(torch.cuda.device_count()))
    try:
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError, ImportError) as error:
        raise UserError(f"--device {device} is not usable: {str(error).splitlines()[0]}") from error
    codec = Codec.load(model, device).to(memory_format=torch.channels_last)
    tile = default_tile(codec) if options.tile is None else options.tile
    on_cpu = device.startswith("cpu")
    workers = options.workers or (4 if on_cpu else max(1, min(16, _own_cores())))
    decode_in = options.decode_in or ("threads" if on_cpu else "processes")
    return codec, Compute(device, options.dtype, options.batch_size, workers, tile, decode_in, options.compile)


def _own_cores() -> int:
    """Of the machine's cores those for this process, which shares them with the others of its launcher."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    processes = os.environ.get("LOCAL_WORLD_SIZE", "1")
    return cores // max(1, int(processes) if processes.isdecimal() else 1)


def _own_gpu(count: int) -> str:
    """Of several processes that a launcher started on one machine each has another."""
    rank = os.environ.get("LOCAL_RANK", "")
    return f"cuda:{int(rank) % count}" if rank.isdecimal() else "cuda"
