"""Measure LPIPS, the distance between deep features fitted to people's judgements (Zhang et al. 2018)."""

import contextlib
import dataclasses
import importlib.metadata
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from latent_codec.errors import UserError
from latent_codec.precision import float32_island
from latent_codec.storage.tensors import read_state

Net = Literal["alex", "squeeze", "vgg"]


class Backbone(NamedTuple):
    """Describe a network whose features LPIPS compares."""

    torchvision: str
    """Name of the whole network in torchvision."""
    smallest_side: int
    """Pixels of the shortest side that its pooling layers leave something of."""


BACKBONES: dict[str, Backbone] = {
    "alex": Backbone("alexnet", 31),
    "squeeze": Backbone("squeezenet1_1", 17),
    "vgg": Backbone("vgg16", 16),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LPIPSOptions:
    """Choose the network of LPIPS and where its weights come from."""

    net: Net = "alex"
    backbone: Path | None = None
    """safetensors file of the network's ImageNet features; None lets torchvision download them."""

    def load(self, device: str | torch.device = "cpu") -> "LPIPS":
        """Return the module on a device; raises as `LPIPS` does."""
        return LPIPS(self.net, self.backbone).to(device)


class LPIPS(nn.Module):
    """Compute learned perceptual image patch similarity v0.1 (Zhang et al. 2018, eq. 1); 0 for equal images.

    `backbone` is a safetensors file of ImageNet features, keys `features.<i>.weight` and `.bias` in torchvision's
    numbering; None lets torchvision download them. Weights are frozen, float32 and always in evaluation mode, so the
    module can be part of a loss. Raises `UserError` if the backbone cannot be had or does not match `net`.
    """

    def __init__(self, net: Net, backbone: Path | None) -> None:
        super().__init__()
        if net not in BACKBONES:
            raise UserError(f"LPIPS net '{net}' is unknown; choose from {', '.join(BACKBONES)}")
        package = _package_model(net, download=backbone is None)
        if backbone is not None:
            _load_backbone(package.net, net, backbone)
        self.smallest_side = BACKBONES[net].smallest_side
        """Pixels of the shortest side that `forward` accepts."""
        self.protocol = f"LPIPS v0.1 ({net}), RGB in [-1, 1], lpips {importlib.metadata.version('lpips')}"
        """Settings and versions that reproduce a value, in words."""
        self.scaling = package.scaling_layer
        self.features = package.net
        self.heads = package.lins
        self.requires_grad_(False)
        self.train(False)

    @property
    def device(self) -> torch.device:
        """Return the device of the weights."""
        return next(self.parameters()).device

    def train(self, mode: bool = True) -> "LPIPS":
        """Keep the evaluation mode whatever `mode` is: the heads' dropout is for fitting them only."""
        return super().train(False)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Return distances (b,) float32 of x, y: (b, 3, h, w) in [-1, 1]; raises `UserError` below `smallest_side`."""
        if x.shape != y.shape or x.ndim != 4 or x.shape[1] != 3:
            raise ValueError(f"LPIPS compares two (b, 3, h, w) tensors, not {tuple(x.shape)} and {tuple(y.shape)}")
        if min(x.shape[2:]) < self.smallest_side:
            raise UserError(
                f"LPIPS with this net needs sides of {self.smallest_side} px or more, the images are "
                f"{x.shape[3]}x{x.shape[2]}: use larger images or leave LPIPS out"
            )
        with float32_island(x):
            features_x = self.features(self.scaling(x.float()))
            features_y = self.features(self.scaling(y.float()))
            distance = torch.zeros(len(x), device=x.device)
            for head, fx, fy in zip(self.heads, features_x, features_y, strict=True):
                difference = (_unit(fx) - _unit(fy)).square()  # (b, c, h_l, w_l)
                distance = distance + head(difference).mean((1, 2, 3))  # the head leaves one channel
            return distance


def _unit(features: torch.Tensor) -> torch.Tensor:
    """Scale each position's feature vector to length 1, (b, c, h, w).

    The clamp changes no value: without it backward gives NaN where every feature is 0, as the root's slope is infinite.
    """
    norm = features.square().sum(1, keepdim=True).clamp_min(1e-24).sqrt()
    return features / (norm + 1e-10)


def _package_model(net: str, *, download: bool) -> Any:
    """Return the package's model with its heads loaded and, unless `download`, a random backbone."""
    import lpips  # slow: it imports torchvision and scipy

    name = BACKBONES[net].torchvision
    try:
        with _quiet():
            return lpips.LPIPS(net=net, version="0.1", pnet_rand=not download, verbose=False)
    except (OSError, RuntimeError) as error:
        if not download:
            raise
        raise UserError(
            f"the ImageNet weights of LPIPS ({net}) cannot be downloaded ({error}): give --lpips-backbone FILE, a "
            f"safetensors file with the tensors of torchvision.models.{name}(weights='DEFAULT').state_dict() whose "
            "names start with 'features.', saved where there is a network"
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Send the package's output to stderr, hide its deprecation warnings and keep the global random state."""
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(sys.stderr),
        torch.device("cpu"),
        torch.random.fork_rng(devices=[]),
    ):
        warnings.simplefilter("ignore")
        yield


def _load_backbone(features: nn.Module, net: str, path: Path) -> None:
    """Load a backbone file strictly; the package's `slice<n>.<i>.x` is torchvision's `features.<i>.x`."""
    remedy = f"--lpips-backbone takes a safetensors file of torchvision's {BACKBONES[net].torchvision} features"
    own = features.state_dict()
    theirs = {key: "features." + key.split(".", 1)[1] for key in own}
    found = read_state(path, {theirs[key]: tensor for key, tensor in own.items()}, f"{remedy}, LPIPS net '{net}'")
    features.load_state_dict({key: found[theirs[key]] for key in own})
