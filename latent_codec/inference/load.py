"""Load a model onto the device that it runs on."""

import dataclasses
import os
from typing import TYPE_CHECKING

from latent_codec.errors import UserError
from latent_codec.inference.options import ComputeOptions

if TYPE_CHECKING:
    from latent_codec.inference.runner import Runner
    from latent_codec.model.codec import Codec


def load(model: str, options: ComputeOptions) -> "Runner":
    """Load a model file or a shipped model and return its `Runner`, on a GPU by default: under a launcher on its own.

    Raises `UserError` for a model that cannot be loaded, a device that does not work, and options that make no sense.
    """
    import torch

    from latent_codec.inference.runner import Runner
    from latent_codec.model.codec import Codec

    options.check()
    device = options.device or (_own_gpu(torch.cuda.device_count()) if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError, ImportError) as error:
        raise UserError(f"--device {device} is not usable: {str(error).splitlines()[0]}") from error
    codec = Codec.load(model, device)
    return Runner(in_fastest_layout(codec), dataclasses.replace(options, device=device))


def in_fastest_layout(codec: "Codec") -> "Codec":
    """Lay out the weights as the codec's own device is fastest with, and return the codec."""
    import torch

    if codec.backbone.contiguous_on_cpu and next(codec.parameters()).device.type == "cpu":
        return codec.to(memory_format=torch.contiguous_format)
    return codec.to(memory_format=torch.channels_last)


def _own_gpu(count: int) -> str:
    """Return the GPU for this process' rank among those that a launcher started on this machine."""
    rank = os.environ.get("LOCAL_RANK", "")
    return f"cuda:{int(rank) % count}" if rank.isdecimal() else "cuda"
