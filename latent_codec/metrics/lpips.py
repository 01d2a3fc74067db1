"""LPIPS: the distance between deep features that people's judgements were fitted to (Zhang et al. 2018)."""

import contextlib
import importlib.metadata
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from latent_codec.errors import UserError
from latent_codec.precision import float32_island
from latent_codec.storage.tensors import check_state

Net = Literal["alex", "squeeze", "vgg"]


class _Backbone(NamedTuple):
    torchvision: str  # torchvision's name of the whole network
    smallest_side: int  # px; below it a pooling layer has nothing left


_BACKBONES: dict[str, _Backbone] = {
    "alex": _Backbone("alexnet", 31),
    "squeeze": _Backbone("squeezenet1_1", 17),
    "vgg": _Backbone("vgg16", 16),
}


class LPIPS(nn.Module):
    """Learned perceptual image patch similarity v0.1 (Zhang et al. 2018, eq. 1), 0 for equal images, lower is closer.

    The linear heads come with the `lpips` package. `backbone` is a safetensors file of ImageNet features, keys
    `features.<i>.weight` and `.bias` in torchvision's numbering; None lets torchvision download them. Weights are
    frozen, float32 and always in evaluation mode, so the module can be part of a loss. Raises `UserError` if the
    backbone cannot be had or does not match `net`.
    """

    def __init__(self, net: Net, backbone: Path | None) -> None:
        super().__init__()
        if net not in _BACKBONES:
            raise UserError(f"LPIPS net '{net}' is unknown; choose from {', '.join(_BACKBONES)}")
        package = _package_model(net, download=backbone is None)
        if backbone is not None:
            _load_backbone(package.net, net, backbone)
        self.smallest_side = _BACKBONES[net].smallest_side
        """Pixels; `forward` refuses images with a shorter side."""
        self.protocol = f"LPIPS v0.1 ({net}), RGB in [-1, 1], lpips {importlib.metadata.version('lpips')}"
        """What a reader needs to reproduce a value."""
        self.scaling = package.scaling_layer
        self.features = package.net
        self.heads = package.lins
        self.requires_grad_(False)
        self.train(False)

    def train(self, mode: bool = True) -> "LPIPS":
        """Stays in evaluation mode whatever `mode` says: the heads' dropout is for fitting them only."""
        return super().train(False)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Distance of each pair, (b,) float32 whatever autocast does around it, differentiable in x and y.

        x, y: (b, 3, h, w) float in [-1, 1]. Raises `UserError` for sides below `smallest_side`.
        """
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

    As the package does, but for the clamp, which changes no value: the square root's slope at 0 is infinite, so where
    every feature is 0 backward would produce NaN, and only the ReLU just before would happen to drop it.
    """
    norm = features.square().sum(1, keepdim=True).clamp_min(1e-24).sqrt()
    return features / (norm + 1e-10)


def _package_model(net: str, *, download: bool) -> Any:
    """The package's own model, its heads loaded; its backbone random unless `download`."""
    import lpips  # here, because it pulls in torchvision and scipy

    name = _BACKBONES[net].torchvision
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
    """Keep standard output for results, hide the package's deprecations, leave the global random state alone."""
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(sys.stderr),
        torch.device("cpu"),
        torch.random.fork_rng(devices=[]),
    ):
        warnings.simplefilter("ignore")
        yield


def _load_backbone(features: nn.Module, net: str, path: Path) -> None:
    """Load a backbone file strictly: the package's `slice<n>.<i>.x` is torchvision's `features.<i>.x`."""
    name = _BACKBONES[net].torchvision
    remedy = f"--lpips-backbone takes a safetensors file of torchvision's {name} features"
    if not path.is_file():
        raise UserError(f"{path}: no such file; {remedy}")
    try:
        found = load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a safetensors file ({error}); {remedy}") from error
    own = features.state_dict()
    theirs = {key: "features." + key.split(".", 1)[1] for key in own}
    try:
        check_state({theirs[key]: tensor for key, tensor in own.items()}, found, str(path))
    except UserError as error:
        raise UserError(f"{error}; {remedy}, LPIPS net '{net}'") from error
    for key, tensor in found.items():
        if not bool(torch.isfinite(tensor).all()):
            raise UserError(f"{path}: tensor {key} holds values that are not finite; get the file again")
    features.load_state_dict({key: found[theirs[key]] for key in own})
