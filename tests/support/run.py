"""Run training programs on a few tiny images, each in a process of its own that can be killed.

A fork server imports the programs once and forks every run: a real process without a second import. It belongs to the
test process that uses it, and all files and ports are that process's own.
"""

import gzip
import importlib
import multiprocessing
import os
import socket
import struct
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing import forkserver
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image

from tests.support.data import ROOT

PATIENCE = 120.0  # seconds until a process that should have ended is taken to hang


def flags(text: str) -> list[str]:
    return text.split()


ONE_STEP = flags("--max-minutes 0.00001")
"""Flags with which a run is stopped after one more step."""

TINY = flags(
    "photo --encoder-widths 8 8 --decoder-widths 8 8 --encoder-depths 1 1 --decoder-depths 1 1 --latent-channels 4 "
    "--batch-size 4 --crop 32 --eval-crop 32 --steps 8 --save-every 1 --keep-checkpoints 99 --log-every 1 "
    "--eval-every 4 --val-images 2 --lr-warmup-steps 2 --learning-rate 0.004 --no-closed-form"
)
"""A preset and flags for 0.02 M parameters, 8 steps and a checkpoint at each."""


def write_images(folder: Path, count: int = 8, seed: int = 0) -> Path:
    """Write PNGs of several sizes, some smaller than a crop of 32."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(seed)
    for i in range(count):
        height, width = [(40, 48), (33, 35), (24, 50), (36, 20)][i % 4]
        coarse = random.integers(0, 256, (height // 4 + 1, width // 4 + 1, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(folder / f"{i:02d}.png")
    return folder


def write_digits(folder: Path, contrast: int = 180, count: int = 36) -> Path:
    """Write an IDX file of two classes on noise, with a brighter upper half and a brighter lower one."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    labels = np.arange(count, dtype=np.uint8) % 2
    pixels = random.integers(0, 60, (count, 28, 28), dtype=np.uint8)
    pixels[labels == 0, :14] += contrast
    pixels[labels == 1, 14:] += contrast
    path = folder / "train-images-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(struct.pack(">BBBB3I", 0, 0, 8, 3, count, 28, 28) + pixels.tobytes()))
    write_labels(folder, labels.tolist())
    return path


def write_labels(folder: Path, labels: Sequence[int]) -> None:
    """Write the IDX file of the labels beside the one of the images."""
    head = struct.pack(">BBBBI", 0, 0, 8, 1, len(labels))
    (folder / "train-labels-idx1-ubyte").write_bytes(head + bytes(labels))


class Started:
    """Run a training program in a process, with its output in a file."""

    def __init__(self, argv: Sequence[str], output: Path, env: dict[str, str], patch: Any, program: str) -> None:
        output.parent.mkdir(parents=True, exist_ok=True)
        self.output = output
        self._process = fork_server().Process(target=_child, args=(list(argv), output, env, patch, program))
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process.is_alive()

    @property
    def text(self) -> str:
        return self.output.read_text() if self.output.exists() else ""

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self) -> int:
        """Return the exit code, or minus the number of the signal that killed it."""
        self._process.join(PATIENCE)
        if self._process.exitcode is None:
            self._process.kill()
            self._process.join()
            raise AssertionError(f"the process hangs:\n{self.text}")
        return self._process.exitcode

    def wait_for(self, condition: Callable[[], object]) -> None:
        """Wait until `condition` is true, which must happen while the process runs."""
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert self.running and time.monotonic() < deadline, self.text
            time.sleep(0.002)


def start(
    argv: Sequence[str], out: Path, *, env: dict[str, str] | None = None, patch: Any = None, program: str = "vae"
) -> Started:
    """Start the program with --out `out`; `patch` is a module-level function called in the process before it."""
    return Started([*argv, "--out", str(out)], out.with_suffix(".txt"), env or {}, patch, program)


def start_ranks(
    argv: Sequence[str], out: Path, ranks: int, *, patch: Any = None, program: str = "vae"
) -> list[Started]:
    """Start `ranks` processes that find one another as torchrun's do (gloo)."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_WORLD_SIZE": str(ranks)}
    argv, env = [*argv, "--out", str(out)], env | {"WORLD_SIZE": str(ranks)}
    own = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
    return [Started(argv, out.with_suffix(f".{rank}.txt"), env | own[rank], patch, program) for rank in range(ranks)]


def run(argv: Sequence[str], out: Path, *, code: int = 0, **options: Any) -> str:
    """Run to the end with this exit code, without a traceback if it is a bad one, and return what was printed."""
    process = start(argv, out, **options)
    assert process.wait() == code and (code == 0 or "Traceback" not in process.text), process.text
    return process.text


def run_ranks(argv: Sequence[str], out: Path, ranks: int, **options: Any) -> str:
    """Run on several processes, and return what the first one printed."""
    processes = start_ranks(argv, out, ranks, **options)
    codes = [process.wait() for process in processes]
    assert codes == [0] * ranks, "\n".join(process.text for process in processes)
    return processes[0].text


def fork_server() -> Any:
    """Return the multiprocessing context of a fork server that has imported the programs and these helpers."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    with mock.patch.dict(os.environ, PYTHONPATH=path, OMP_NUM_THREADS="1"):
        programs = "train.vae train.prior train.diffusion torch._dynamo tests.support.run tests.support.folder"
        forkserver.set_forkserver_preload(programs.split())
        forkserver.ensure_running()
    return multiprocessing.get_context("forkserver")


def _child(argv: list[str], output: Path, env: dict[str, str], patch: Any, program: str) -> None:
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.update({"ACCELERATE_USE_CPU": "true"} | env)
    multiprocessing.set_start_method(None, force=True)  # its own workers start as they would without the fork server
    sys.argv = [f"train.{program}", *argv]
    torch.set_num_threads(1)
    if patch is not None:
        patch()
    importlib.import_module(f"train.{program}").main()
