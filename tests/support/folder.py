"""Make outputs of tiny images, in this process or in others that can be killed at each thing they do to the disk."""

import dataclasses
import itertools
import os
import signal
import time
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

from latent_codec.bitstream.rate_control import Rate
from latent_codec.folders.decode_images import DecodeOptions
from latent_codec.folders.decode_latents import decode_latents
from latent_codec.folders.decode_lc import decode_lc
from latent_codec.folders.encode_latents import LatentsOptions, encode_latents
from latent_codec.folders.encode_lc import EncodeOptions, encode_lc
from latent_codec.folders.jobs import Resume
from latent_codec.folders.resume.ledger import FAILURES, Ledger
from latent_codec.folders.resume.units import Share, Unit, UnitSizes
from latent_codec.folders.summary import Summary
from latent_codec.images.read import ReadOptions
from latent_codec.inference.options import ComputeOptions
from latent_codec.inference.runner import Runner
from latent_codec.latents.dataset import Latents
from latent_codec.latents.format import INDEX
from latent_codec.model.codec import Codec
from latent_codec.storage import tensors as tensor_files
from latent_codec.storage.files import atomic_path
from tests.conftest import files_of
from tests.support.run import PATIENCE, fork_server

CPU = ComputeOptions(batch_size=4, workers=2)
COMPUTE = ComputeOptions(batch_size=2, workers=1)
UNIT = 3
"""Images at most in a unit, so that it has batches of two and of one."""


def small_units(most_images: int = UNIT, **options: Any) -> Resume:
    """Return how a command resumes, with units of so many images."""
    return Resume(unit_sizes=UnitSizes(mean_images=2**63, most_images=most_images), **options)


RESUME, OVERWRITE, BY_TIME = small_units(), small_units(overwrite=True), small_units(check="mtime")
Kind = Literal["streams", "latents", "images of streams", "images of latents", "tars of streams", "tars of images"]
MAKERS: dict[Kind, tuple[Any, Any]] = {
    "streams": (encode_lc, EncodeOptions),
    "latents": (encode_latents, LatentsOptions),
    "images of streams": (decode_lc, DecodeOptions),
    "images of latents": (decode_latents, DecodeOptions),
    "tars of streams": (encode_lc, EncodeOptions),
    "tars of images": (decode_lc, DecodeOptions),
}


def make(
    kind: Kind, codec: Codec, where: Path, folder: Path, compute: Any = CPU, resume: Resume = Resume(), **options: Any
) -> Summary:
    """Make outputs of a kind, with options by the names of their fields; every image is accounted for."""
    command, chosen = MAKERS[kind]
    for name, part in (("rate", Rate), ("read", ReadOptions)):
        if name in (own := {field.name for field in dataclasses.fields(chosen)}):
            given = {field.name for field in dataclasses.fields(part)} & options.keys() - own
            options[name] = part(**{field: options.pop(field) for field in given})
    if kind.startswith("tars"):
        options["tar"] = True
    summary: Summary = command(Runner(codec, compute), where, folder, chosen(**options), resume=resume, quiet=True)
    ended = summary.done + summary.skipped + summary.elsewhere + len(summary.failures) + summary.left_out.total
    assert ended == summary.found
    return summary


KINDS = tuple(MAKERS)
SOURCES: dict[Kind, Kind] = {f"images of {kind}": kind for kind in ("streams", "latents")}
SOURCES["tars of images"] = "tars of streams"
"""Kinds that are decoded; the others are made of image files."""
FILES: tuple[Kind, ...] = ("streams", "images of streams", "images of latents")
"""Kinds whose outputs have names that are known before any work."""
WRITERS: tuple[Kind, ...] = ("streams", "latents", "tars of streams")
"""Kinds that differ in how files are written."""


class Task(NamedTuple):
    """Name what a command makes of which sources, but not the folder that it does it in."""

    kind: Kind
    model: Path
    src: Path

    def do(self, folder: Path, resume: Resume = RESUME, compute: ComputeOptions = COMPUTE, **options: Any) -> Summary:
        """Run to the end; `options` are those of the kind, and streams are draws."""
        if self.kind in ("streams", "tars of streams"):
            options = {"sample": 5} | options
        return make(self.kind, Codec.load(self.model), self.src, folder, compute, resume, **options)


def images(folder: Path) -> dict[str, Image.Image]:
    """Return the images that a command made, by name."""
    return {name: Image.open(folder / name) for name in files_of(folder) if name != FAILURES}


def greatest_difference(a: Path, b: Path) -> int:
    return int(np.abs(np.asarray(Image.open(a), int) - np.asarray(Image.open(b), int)).max())


def assert_told(summary: Summary, reasons: dict[str, str], printed: str) -> None:
    """Require these failures and no others, each told in a line of its own."""
    lines = printed.splitlines()
    assert summary.failures.keys() == reasons.keys() and len(lines) == len(reasons)
    for name, reason in reasons.items():
        assert reason in summary.failures[name]
        assert sum(line.startswith(f"{name}: ") and reason in line for line in lines) == 1


def black_and_grey(folder: Path) -> Path:
    """Write an image of black and one of middle grey."""
    folder.mkdir()
    for name, level in (("black", 0), ("grey", 128)):
        Image.new("L", (8, 8), level).save(folder / f"{name}.png")
    return folder


def temporary_files(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("*.tmp")]


def posteriors(folder: Path) -> dict[tuple[str, str], bytes]:
    """Return the stored bytes of each (path, SHA-256 of its source) in the index; nothing if there is no index."""
    if not (folder / INDEX).exists():
        return {}
    latents = Latents(folder)
    found = (latents.posterior(i) for i in range(len(latents)))
    moments = (torch.stack([p.mean, p.logvar]).numpy().tobytes() for p in found)
    return {(entry.path, entry.sha256): own for entry, own in zip(latents.entries, moments, strict=True)}


def ignore_case(patch: pytest.MonkeyPatch) -> None:
    """Answer as a file system that neither knows case nor keeps letters and their accents apart."""

    def fold(name: str) -> str:
        return unicodedata.normalize("NFD", name).casefold()

    def exists(path: Path) -> bool:
        try:
            return fold(path.name) in map(fold, os.listdir(path.parent))  # noqa: PTH208 (Path is what is faked)
        except OSError:
            return False

    patch.setattr(Path, "exists", exists)


def watch(patch: pytest.MonkeyPatch, event: Callable[[str], None]) -> None:
    """Call `event`, in any thread, before each thing that is done to the disk, or halfway through a write.

    What it raises is taken for what the system says.
    """

    def before(owner: Any, name: str, what: str) -> None:
        real = getattr(owner, name)
        patch.setattr(owner, name, lambda *args, **options: event(what) or real(*args, **options))

    write_bytes, open_path = Path.write_bytes, Path.open

    def write_half(path: Path, data: bytes) -> int:
        write_bytes(path, data[: len(data) // 2])
        event("write")
        return write_bytes(path, data)

    def open_watched(path: Path, mode: str = "r", **options: Any) -> Any:
        file = open_path(path, mode, **options)

        def write(data: bytes) -> int:
            half = file.write(data[: len(data) // 2])
            event("journal")
            return half + file.write(data[half:])

        return mock.Mock(wraps=file, write=write) if mode == "ab" else file

    patch.setattr(Path, "write_bytes", write_half)
    patch.setattr(Path, "open", open_watched)
    before(Path, "touch", "open")
    before(Path, "unlink", "remove")
    before(os, "replace", "rename")
    before(os, "fsync", "fsync")
    before(tensor_files, "save_file", "write")


def start(target: Callable[..., None], *args: Any) -> Any:
    """Start a process that calls a function of a module."""
    process = fork_server().Process(target=target, args=args)
    process.start()
    return process


def finish(process: Any) -> int:
    """Return the exit code of a process; minus the number of the signal that killed it."""
    process.join(PATIENCE)
    assert process.exitcode is not None, "the process hangs"
    return process.exitcode


def work(task: Task, folder: Path, environment: dict[str, str] | None = None, resume: Resume | None = None) -> None:
    os.environ.update(environment or {})
    task.do(folder, dataclasses.replace(resume or RESUME, share=Share.of_launcher()))


def die(task: Task, folder: Path, at: int) -> None:
    """Do a task, but send SIGKILL to this process at the event of this number, counted from 1."""
    numbers = itertools.count(1)

    def event(_: str) -> None:
        if next(numbers) == at:
            os.kill(os.getpid(), signal.SIGKILL)

    with pytest.MonkeyPatch.context() as patch:
        watch(patch, event)
        task.do(folder)


def hold(folder: Path, units: list[Unit], output: Path) -> None:
    """Claim these units, begin to write a file and wait to be killed."""
    with Ledger(folder, "streams", {}) as ledger:
        claims = list(next(ledger.rounds(units)))
        with atomic_path(output):
            (folder / "held").write_text(f"{len(claims)}")
            time.sleep(PATIENCE)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)
