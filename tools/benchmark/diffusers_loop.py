"""Encode a folder by a plain loop: `python -m tools.benchmark.diffusers_loop SRC DST --weights MODEL_OF_SD_SHAPE`."""

import dataclasses
from pathlib import Path

import torch
import tyro
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.functional import to_tensor

from latent_codec.model.codec import Codec
from tools.benchmark.other_models import diffusers_autoencoder
from tools.program import main


class _Images(Dataset[tuple[str, torch.Tensor]]):
    def __init__(self, folder: Path) -> None:
        self.paths = sorted(folder.iterdir())

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[str, torch.Tensor]:
        return self.paths[index].name, to_tensor(Image.open(self.paths[index]).convert("RGB")) * 2 - 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loop:
    """Encode SRC into DST, to be timed beside `encode`."""

    src: tyro.conf.Positional[Path]
    dst: tyro.conf.Positional[Path]
    weights: Path
    batch_size: int = 4
    device: str = "cpu"
    workers: int = 2

    @torch.inference_mode()
    def run(self) -> None:
        """Write a latent for each image."""
        self.dst.mkdir(parents=True)
        vae = diffusers_autoencoder(Codec.load(self.weights)).to(self.device)
        for names, x in DataLoader(_Images(self.src), self.batch_size, num_workers=self.workers):
            latents = vae.encode(x.to(self.device)).latent_dist.sample().cpu()
            for name, z in zip(names, latents, strict=True):
                torch.save(z.clone(), self.dst / f"{name}.pt")


if __name__ == "__main__":
    main("tools.benchmark.diffusers_loop", Loop, __doc__)
