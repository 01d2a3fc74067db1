"""Print and write what a benchmark measured, with what reproduces it."""

import dataclasses
import json
import platform
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import torch
import tyro

from latent_codec.program import say
from latent_codec.storage.files import write_text
from train.loop.provenance import git_commit


@dataclasses.dataclass(frozen=True, kw_only=True)
class OnImages:
    """Choose the images of a benchmark, the device, and where its results go."""

    dir: tyro.conf.Positional[str]
    """Images to measure on."""
    device: str = "cpu"
    out: Path | None = None
    """JSON file for the results."""

    def report(self, results: dict[str, Any], **about: Any) -> None:
        """Report the results with the set's name and the device."""
        report(results, {"set": Path(self.dir).name} | about | machine(self.device), self.out)


def machine(device: str) -> dict[str, Any]:
    """Return the name of the device, the number of threads and torch's version."""
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else f"{platform.machine()} CPU"
    return {"device": name, "threads": torch.get_num_threads(), "torch": torch.__version__}


def command_line() -> str:
    """Return the command that started this process, as the user typed it."""
    return shlex.join(["python", *sys.orig_argv[1:]])


def now() -> float:
    """Return the seconds of a clock, after all work on a GPU is done."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def report(results: dict[str, Any], about: dict[str, Any], out: Path | None, **more: Any) -> None:
    """Print the results and what reproduces them, and write both to `out`; `more` goes to the file alone."""
    found = {"results": results, "about": {"command": command_line(), "commit": git_commit()} | about}
    say(json.dumps(found, indent=1))
    if out is not None:
        write_text(out, json.dumps(found | more, indent=1) + "\n")
