"""Folders of tiny images, made in this process or in others that can be killed at each thing they do to the disk."""

import itertools
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pytest
import torch

from latent_codec.bitstream.rate_control import Rate
from latent_codec.folders.decode_latents import decode_folder
from latent_codec.folders.decode_lc import decode_streams
from latent_codec.folders.encode_latents import encode_folder
from latent_codec.folders.encode_lc import encode_streams
from latent_codec.folders.jobs import RESUME, Resume
from latent_codec.folders.resume import units as plan
from latent_codec.folders.resume.ledger import Ledger
from latent_codec.folders.resume.units import Unit
from latent_codec.folders.summary import Summary
from latent_codec.inference.options import ComputeOptions
from latent_codec.inference.runner import Runner
from latent_codec.latents.dataset import Latents
from latent_codec.latents.format import INDEX
from latent_codec.model import file as model_file
from latent_codec.model.codec import Codec
from latent_codec.storage.files import atomic_path
from tests.support.run import PATIENCE, fork_server

COMPUTE = ComputeOptions(batch_size=2, workers=1)
UNIT = 3
"""Images at most in a unit, so that it has batches of two and of one."""

Kind = Literal["streams", "latents", "images of streams", "images of latents", "tars of streams", "tars of images"]


class Task(NamedTuple):
    """What a command does, but for the folder that it does it in."""

    kind: Kind
    model: Path
    src: Path

    def do(self, folder: Path, resume: Resume = RESUME, compute: ComputeOptions = COMPUTE, **options: Any) -> Summary:
        """To the end; every image is accounted for, and every file whole."""
        codec = Codec.load(self.model)
        make: Any = {
            "streams": encode_streams,
            "latents": encode_folder,
            "images of streams": decode_streams,
            "images of latents": decode_folder,
            "tars of streams": encode_streams,
            "tars of images": decode_streams,
        }[self.kind]
        if self.kind in ("streams", "tars of streams"):
            options = {"rate": Rate(), "sample": 5} | options
        if self.kind.startswith("tars"):
            options["tar"] = True
        summary: Summary = make(Runner(codec, compute), self.src, folder, resume=resume, quiet=True, **options)
        assert summary.done + summary.skipped + summary.elsewhere + len(summary.failures) == summary.found
        return summary


def temporary_files(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("*.tmp")]


def posteriors(folder: Path) -> dict[tuple[str, str], bytes]:
    """What the index says of each (path, SHA-256 of its source); nothing if there is no index."""
    if not (folder / INDEX).exists():
        return {}
    latents = Latents(folder)
    found = (latents.posterior(i) for i in range(len(latents)))
    return {
        (entry.path, entry.sha256): torch.stack([p.mean, p.logvar]).numpy().tobytes()
        for entry, p in zip(latents.entries, found, strict=True)
    }


def watch(patch: pytest.MonkeyPatch, event: Callable[[str], None]) -> None:
    """Call `event` with its name at each thing that is done to the disk: before it, or halfway if something is written.

    In threads, too. What it raises is taken for what the system says.
    """

    def before(owner: Any, name: str, what: str) -> None:
        real = getattr(owner, name)

        def watched(*args: Any, **options: Any) -> Any:
            event(what)
            return real(*args, **options)

        patch.setattr(owner, name, watched)

    write_bytes, open_path = Path.write_bytes, Path.open

    def write_half(path: Path, data: bytes) -> int:
        write_bytes(path, data[: len(data) // 2])
        event("write")
        return write_bytes(path, data)

    def open_watched(path: Path, mode: str = "r", **options: Any) -> Any:
        file = open_path(path, mode, **options)
        return _Watched(file, event) if mode == "ab" else file

    patch.setattr(Path, "write_bytes", write_half)
    patch.setattr(Path, "open", open_watched)
    before(Path, "touch", "open")
    before(Path, "unlink", "remove")
    before(os, "replace", "rename")
    before(os, "fsync", "fsync")
    before(model_file, "save_file", "write")


class _Watched:
    """A journal's file."""

    def __init__(self, file: Any, event: Callable[[str], None]) -> None:
        self._file, self._event = file, event

    def write(self, data: bytes) -> int:
        half = self._file.write(data[: len(data) // 2])
        self._event("journal")
        return half + self._file.write(data[half:])

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def start(target: Callable[..., None], *args: Any) -> Any:
    """A process that calls a function of a module; small units there as here."""
    process = fork_server().Process(target=_child, args=(target, *args))
    process.start()
    return process


def finish(process: Any) -> int:
    """Its exit code; minus the number of the signal that killed it."""
    process.join(PATIENCE)
    assert process.exitcode is not None, "the process hangs"
    return process.exitcode


def _child(target: Callable[..., None], *args: Any) -> None:
    torch.set_num_threads(1)
    plan._MEAN_IMAGES, plan._MOST_IMAGES = 2**63, UNIT
    target(*args)


def work(task: Task, folder: Path, environment: dict[str, str] | None = None, resume: Resume | None = None) -> None:
    os.environ.update(environment or {})
    task.do(folder, resume or RESUME._replace(share=plan.Share.of_launcher()))


def die(task: Task, folder: Path, at: int) -> None:
    """SIGKILL itself at the event of this number, counted from 1; to the end if there are not as many."""
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
