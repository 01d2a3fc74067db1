"""Time how fast a training loop reads stored latents, beside the usual file for each image."""

import dataclasses
import tempfile
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from latent_codec.images.geometry import Geometry
from latent_codec.latents import format as stored
from latent_codec.latents.batches import ShapeBatches
from latent_codec.latents.dataset import Latents
from tools.benchmark.commands import time_in_turn
from tools.benchmark.record import machine, report

_UNIT = 128


class _Loaded(Dataset[Any]):
    """Load items by a function; without a list of items, an index is the item."""

    def __init__(self, load: Callable[[Any], Any], items: Sequence[Any] = ()) -> None:
        self.load, self.items = load, items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: Any) -> Any:
        return self.load(self.items[index] if self.items else index)


def _load_npz(path: Path) -> torch.Tensor:
    with np.load(path) as file:
        return torch.from_numpy(file["latents"])


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentsSpeed:
    """Time epochs of float16 posteriors in random batches, with and without drawing."""

    images: int = 4000
    shape: tuple[int, int, int] = (32, 32, 32)
    """Channels, height and width of the latents, which are made up."""
    batch: int = 64
    workers: tuple[int, ...] = (0, 2)
    epochs: int = 3
    """Epochs of which the median counts, after one in which workers start and files get into the cache."""
    out: Path | None = None
    """JSON file for the results."""

    def run(self) -> None:
        """Time every way to read and report images per second."""
        with tempfile.TemporaryDirectory() as folder:
            self._write(Path(folder))
            latents = Latents(Path(folder))
            batches: Any = ShapeBatches(latents.shapes, self.batch)
            lists = [list(rows.indices) for rows in batches]
            results: dict[str, dict[str, Any]] = {}
            for n in self.workers:
                ours: dict[str, Any] = {"sampler": batches, "batch_size": None}
                loaders: dict[str, tuple[Any, dict[str, Any]]] = {
                    "latents, read": (_Loaded(latents.moments), ours),
                    "latents, read and drawn": (latents, ours),
                }
                for name, load in ((".pt", partial(torch.load, weights_only=True)), (".npz", _load_npz)):
                    files = _Loaded(load, sorted(Path(folder).glob(f"*{name}")))
                    loaders[f"a {name} each, read"] = files, {"batch_sampler": lists}
                found: dict[str, float] = {}
                for name, (dataset, options) in loaders.items():  # one at a time: workers stay until theirs is gone
                    loader = DataLoader(dataset, num_workers=n, persistent_workers=n > 0, **options)
                    epoch = {name: lambda _, loader=loader: deque(loader, maxlen=0)}
                    time_in_turn(epoch, 1)
                    found[name] = self.images / time_in_turn(epoch, self.epochs)[0][name]
                ratios = {
                    f"{one} over {other}": found[one] / found[other]
                    for one in list(found)[:2]
                    for other in list(found)[2:]
                }
                results[f"{n} workers"] = {"images_per_second": found, "times_as_fast": ratios}
        about = {"images": self.images, "shape": self.shape, "batch": self.batch, "epochs": self.epochs}
        report(results, about | machine("cpu"), self.out)

    def _write(self, folder: Path) -> None:
        generator = torch.Generator().manual_seed(0)
        header = stored.LatentsHeader(
            format_version=stored.FORMAT_VERSION,
            model_id="0" * 64,
            factor=8,
            pixel_range=(-1.0, 1.0),
            scale_state="raw",
            second_moment="logvar",
            dtype="float16",
            statistics=None,
            flips=False,
        )
        height, width = (header.factor * side for side in self.shape[1:])
        geometry = Geometry(width=width, height=height, orientation=1, mode="RGB", background=None)
        entries: list[stored.LatentsEntry] = []
        for first in range(0, self.images, _UNIT):
            rows: list[stored.LatentsRow] = []
            for i in range(first, min(first + _UNIT, self.images)):
                both = torch.randn(2, *self.shape, generator=generator).half()
                torch.save(both, folder / f"{i:06d}.pt")
                np.savez(folder / f"{i:06d}.npz", latents=both.numpy())
                entry = stored.unplaced_entry(f"{i:06d}.png", geometry, "")
                rows.append(stored.LatentsRow(entry, *both))
            entries += stored.write_shard(folder, header, f"{first:06d}", rows)
        stored.write_index(folder, header, entries)
