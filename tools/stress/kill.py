"""Kill encoding at random moments and resume it: `python -m tools.stress.kill SRC --model MODEL`.

Each trial encodes SRC, is killed (SIGKILL) after a random share of the time of an uninterrupted run, and is run again;
every file must then equal that run's. With `--processes 2` one of two is killed: the other one has to finish alone.
"""

import dataclasses
import hashlib
import os
import random
import signal
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import tyro
from tqdm import tqdm

from latent_codec.folders.encode_latents import encode_latents
from latent_codec.folders.encode_lc import EncodeOptions, encode_lc
from latent_codec.folders.jobs import Resume
from latent_codec.folders.resume.ledger import NAME
from latent_codec.folders.resume.units import Share
from latent_codec.inference.options import ComputeOptions
from latent_codec.inference.runner import Runner
from latent_codec.model.codec import Codec
from latent_codec.program import say
from latent_codec.storage.files import temporary_of
from tools.program import main


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kill:
    """Choose what to encode and how often to kill it."""

    src: tyro.conf.Positional[str]
    """Images to encode: a folder, a tar file, or a quoted glob."""
    model: str = "photo"
    """Name of a shipped model, or a model file."""
    format: Literal["lc", "tar", "safetensors"] = "lc"
    """Kind of output; tar: .lc files in tar shards."""
    kills: int = 200
    """Number of trials."""
    processes: Literal[1, 2] = 1
    """Processes that share the folder; one of them is killed."""
    seed: int = 0
    """Seed of the moments of the kills."""

    def run(self) -> None:
        """Run all trials; exit with a message at the first file that differs."""
        torch.set_num_threads(1)  # forked children inherit no threads
        codec = Codec.load(self.model)
        moments = random.Random(self.seed)
        with tempfile.TemporaryDirectory() as temporary:
            started = time.monotonic()
            _wait(self._start(codec, Path(temporary, "whole"), 0))
            seconds = time.monotonic() - started
            whole = _contents(Path(temporary, "whole"), resumed=True)
            for trial in tqdm(range(self.kills), "kills"):
                folder = Path(temporary, str(trial))
                self._trial(codec, folder, moments.random() * seconds / self.processes)
                if (found := _contents(folder, resumed=self.processes == 1)) != whole:
                    names = sorted(k for k in whole.keys() | found.keys() if whole.get(k) != found.get(k))
                    raise SystemExit(f"trial {trial}: {len(names)} files differ, the first {names[0]}")
        say(f"{self.kills} kills of {self.processes} process(es), each resumed: {len(whole)} equal files")

    def _trial(self, codec: Codec, folder: Path, seconds: float) -> None:
        children = [self._start(codec, folder, rank) for rank in range(self.processes)]
        time.sleep(seconds)
        os.kill(children[-1], signal.SIGKILL)
        os.waitpid(children[-1], 0)
        for child in children[:-1]:
            _wait(child)
        if self.processes == 1:
            _wait(self._start(codec, folder, 0))

    def _start(self, codec: Codec, folder: Path, rank: int) -> int:
        """Start a child that encodes, and return its process id."""
        if child := os.fork():
            return child
        torch.set_num_threads(1)  # torch makes its pool anew in a child, which threads must not do at once
        try:
            resume = Resume(share=Share(rank, self.processes, alone=False))
            compute = ComputeOptions(device="cpu", batch_size=4, workers=2)
            options = EncodeOptions(tar=self.format == "tar")
            encode = encode_latents if self.format == "safetensors" else partial(encode_lc, options=options)
            summary = encode(Runner(codec, compute), self.src, folder, resume=resume, quiet=True)
            os._exit(len(summary.failures))
        except BaseException as error:
            say(error, error=True)
            os._exit(255)


def _wait(child: int) -> None:
    _, status = os.waitpid(child, 0)
    if status:
        raise SystemExit(f"a run that should have finished ended with status {status}")


def _contents(folder: Path, *, resumed: bool) -> dict[str, str]:
    """Return the digests of all files except the ledger's, and temporary ones, which go when a folder is resumed."""
    found = (f for f in folder.rglob("*") if f.is_file() and NAME not in f.relative_to(folder).parts)
    files = (f for f in found if resumed or temporary_of(f.name) is None)
    return {f.relative_to(folder).as_posix(): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


if __name__ == "__main__":
    main("tools.stress.kill", Kill, __doc__)
