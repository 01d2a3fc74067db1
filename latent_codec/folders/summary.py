"""Count what a command did with many images, and the time that its stages took."""

import contextlib
import dataclasses
import threading
import time
from collections.abc import Iterator
from typing import Literal, get_args

from latent_codec.errors import UserError, printable
from latent_codec.images.sources import LeftOut, Listing
from latent_codec.program import say

Stage = Literal["decode", "network", "coding", "writing"]
"""Stages of a run: reading and decoding files; networks; prior and entropy coder; writing files."""


@dataclasses.dataclass
class Summary:
    """Count images by how they ended: done + skipped + elsewhere + failed + left out = found."""

    verb: str
    found: int = 0
    done: int = 0
    skipped: int = 0
    """Images whose outputs were up to date."""
    elsewhere: int = 0
    """Images that other processes did in the meantime."""
    failures: dict[str, str] = dataclasses.field(default_factory=dict)
    left_out: LeftOut = dataclasses.field(default_factory=LeftOut)
    """Files that were found and not taken, by reason."""
    bytes_in: int = 0
    bytes_out: int = 0
    pixels: int = 0
    """Pixels of the images done, where bits per pixel are of interest."""
    seconds: float = 0.0
    stages: dict[Stage, float] = dataclasses.field(default_factory=dict)
    """Seconds that threads spent in each stage; stages run side by side, so they add up to more than `seconds`."""

    def __post_init__(self) -> None:
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def timing(self, stage: Stage) -> Iterator[None]:
        """Add the time until the context ends to a stage, from any thread."""
        started = time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - started
            with self._lock:
                self.stages[stage] = self.stages.get(stage, 0.0) + seconds

    def begin(self, listing: Listing, images: int) -> None:
        """Count what is to be done, what was left out, and what could not be listed."""
        self.left_out = listing.left_out
        self.found = images + listing.left_out.total + len(listing.failures)
        for name, reason in listing.failures.items():
            self.fail(name, reason)

    def fail(self, name: str, reason: object) -> None:
        """Count an image as failed, and say why on stderr."""
        text = str(reason) if isinstance(reason, (UserError, str)) else f"{type(reason).__name__}: {reason}"
        self.failures[name] = text
        say(printable(text if text.startswith(name) else f"{name}: {text}"), error=True)

    def __str__(self) -> str:
        others = {"skipped": self.skipped, "by other processes": self.elsewhere, "failed": len(self.failures)}
        others["left out"] = self.left_out.total
        counts = "".join(f", {count} {what}" for what, count in others.items() if count)
        text = f"{self.verb} {self.done} of {self.found} images{counts} in {self.seconds:.1f} s"
        left_out = f"\nleft out: {self.left_out}" if self.left_out.total else ""
        if not self.done:
            return text + left_out
        seconds = max(self.seconds, 1e-9)
        text += f" ({self.done / seconds:.1f} images/s)"
        for what, count in (("in", self.bytes_in), ("out", self.bytes_out)):
            text += f"{';' if what == 'in' else ','} {count / 1e6:.2f} MB {what} ({count / 1e6 / seconds:.2f} MB/s)"
        text += f", ratio {self.bytes_in / max(self.bytes_out, 1):.2f}"
        text += f", {8 * self.bytes_out / self.pixels:.3f} bits per pixel" if self.pixels else ""
        stages = (f"{stage} {self.stages[stage]:.1f} s" for stage in get_args(Stage) if stage in self.stages)
        return f"{text}\ntime in stages, side by side: {', '.join(stages)}{left_out}"
