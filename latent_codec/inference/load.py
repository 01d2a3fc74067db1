"""Load a model onto its device."""

import os

from latent_codec.errors import UserError
from latent_codec.inference.options import ComputeOptions


def load(model: str, options: ComputeOptions):
    """The codec on its device, and the `Compute` that says how it runs; raises `UserError` for what cannot be."""
    import torch

    from latent_codec.inference.runner import Compute
    from latent_codec.inference.tiling import default_tile
    from latent_codec.model.codec import Codec

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
