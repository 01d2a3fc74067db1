"""Write MNIST as folders of images, and recognise generated digits with a small classifier.

python -m tools.mnist.digits write RAW DST [--split train|test]
python -m tools.mnist.digits classify RAW DST.safetensors
python -m tools.mnist.digits score CLASSIFIER.safetensors SAMPLES
"""

import dataclasses
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import tyro
from PIL import Image
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from latent_codec.errors import UserError
from latent_codec.images.read import read_image
from latent_codec.images.sources import find_images
from latent_codec.noise import fold, permutation
from latent_codec.program import say
from latent_codec.storage.files import atomic_path, make_folder
from latent_codec.storage.tensors import read_state, save_tensors
from tools.program import main

Split = Literal["train", "test"]
_NAMES: dict[Split, str] = {"train": "train", "test": "t10k"}
_SIDE = 32
"""Side of the written images: 28 and a black border of 2, so that models can halve it five times."""
_BORDER = 2


class Digits(NamedTuple):
    """Hold MNIST's images of one split."""

    images: torch.Tensor  # (n, 32, 32) uint8, white on black
    labels: torch.Tensor  # (n,) int64
    names: list[str]  # "7/train-00042"


def read_digits(raw: Path, split: Split) -> Digits:
    """Read a split from a folder of MNIST's IDX files; raises `UserError` if one is missing or damaged."""
    name = f"{_NAMES[split]}-images-idx3-ubyte"
    path = raw / name if (raw / name).is_file() else raw / f"{name}.gz"
    sources = find_images(path)
    if any(source.label is None for source in sources):
        raise UserError(f"{path}: no labels beside it; give MNIST's raw folder, with all four files")
    images = F.pad(torch.stack([source.read().pixels[0] for source in sources]), [_BORDER] * 4)
    labels = torch.tensor([int(source.label or 0) for source in sources])
    return Digits(images, labels, [source.name for source in sources])


class Classifier(nn.Module):
    """Classify digits (b, 1, 32, 32) in [0, 1] to logits (b, 10), by two convolutions and two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 16, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(2),  # (b, 16, 16, 16)
            nn.Conv2d(16, 32, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(2),  # (b, 32, 8, 8)
            nn.Flatten(),
            nn.Linear(32 * 8 * 8, 128),
            nn.ReLU(),
            nn.Linear(128, 10),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)

    @torch.no_grad()
    def recognise(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return the digits (b,) int64 in grey pixels (b, 32, 32) uint8."""
        return torch.cat([self(part[:, None].float() / 255).argmax(1) for part in pixels.split(500)])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Write:
    """Write each digit as a PNG of 32x32 into the folder of its class, DST/7/train-00042.png."""

    raw: tyro.conf.Positional[Path]
    """Folder of MNIST's four IDX files, gzipped or not."""
    dst: tyro.conf.Positional[Path]
    """Folder for the images."""
    split: Split = "train"
    """Split to write."""

    def run(self) -> None:
        digits = read_digits(self.raw, self.split)
        pairs = zip(digits.images.numpy(), digits.names, strict=True)
        for image, name in tqdm(pairs, "writing", len(digits.names), disable=None):
            path = self.dst / f"{name}.png"
            make_folder(path.parent)
            with atomic_path(path) as temporary:
                Image.fromarray(image).save(temporary, format="PNG")
        say(f"wrote {len(digits.names)} digits to {self.dst}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Classify:
    """Train the classifier on the training split, and measure it on the test split."""

    raw: tyro.conf.Positional[Path]
    """Folder of MNIST's four IDX files, gzipped or not."""
    dst: tyro.conf.Positional[Path]
    """Safetensors file for the classifier."""
    epochs: int = 3
    """Passes over the training split."""
    seed: int = 0
    """Seed of the initial weights and of the order of images."""

    def run(self) -> None:
        digits = read_digits(self.raw, "train")
        x, y = digits.images, digits.labels
        torch.manual_seed(self.seed)  # initial weights; the order of images is a hash
        net = Classifier()
        orders = [permutation(len(x), fold(self.seed, epoch)).split(128) for epoch in range(self.epochs)]
        batches = [batch for order in orders for batch in order]
        optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(batches))
        for batch in tqdm(batches, "training", disable=None):
            loss = F.cross_entropy(net(x[batch][:, None].float() / 255), y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        save_tensors(self.dst, net.state_dict(), {"format": "pt"})
        digits = read_digits(self.raw, "test")
        right = net.recognise(digits.images) == digits.labels
        say(f"wrote {self.dst}: recognises {right.float().mean().item():.2%} of {len(right)} test digits")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Score:
    """Print the share of images in SAMPLES/0 ... SAMPLES/9 that the classifier recognises as their folder's digit."""

    classifier: tyro.conf.Positional[Path]
    """File that `classify` wrote."""
    samples: tyro.conf.Positional[Path]
    """Folder of folders 0 ... 9 of images."""

    def run(self) -> None:
        net = Classifier()
        net.load_state_dict(read_state(self.classifier, net.state_dict(), "give the file that `classify` wrote"))
        right: list[torch.Tensor] = []
        for label in [str(digit) for digit in range(10) if (self.samples / str(digit)).is_dir()]:
            sources = find_images(self.samples / label)
            pixels = torch.stack([_grey(source.read_bytes(), source.name) for source in sources])
            right.append(net.recognise(pixels) == int(label))
            say(f"{label}: {right[-1].float().mean().item():.1%} of {len(sources)}")
        if not right:
            raise UserError(f"{self.samples}: no folder 0 ... 9 in it")
        say(f"all: {torch.cat(right).float().mean().item():.2%} of {len(torch.cat(right))}")


def _grey(data: bytes, name: str) -> torch.Tensor:
    pixels = read_image(data, name=name).pixels  # (3, h, w)
    if pixels.shape[1:] != (_SIDE, _SIDE):
        raise UserError(f"{name}: {pixels.shape[2]}x{pixels.shape[1]} pixels; the classifier takes {_SIDE}x{_SIDE}")
    return pixels.float().mean(0).round().to(torch.uint8)


if __name__ == "__main__":
    main("tools.mnist.digits", Write | Classify | Score, __doc__)
