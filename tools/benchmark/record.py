"""What a benchmark found, and what it takes to find it again."""

import json
import platform
import shlex
import sys
from pathlib import Path
from typing import Any

import torch

from latent_codec.storage.files import write_text
from train.loop.provenance import git_commit


def machine(device: str) -> dict[str, Any]:
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else f"{platform.machine()} CPU"
    return {"device": name, "threads": torch.get_num_threads(), "torch": torch.__version__}


def report(
    results: dict[str, dict[str, Any]],
    about: dict[str, Any],
    out: Path | None,
    *,
    command: list[str] | None = None,
    **more: Any,
) -> None:
    """Print the results and what a reader needs to repeat them; `more` goes to the file alone.

    `command` holds the arguments of `tools.benchmark`, by default those of this process.
    """
    words = shlex.join(["python", "-m", "tools.benchmark", *(sys.argv[1:] if command is None else command)])
    found = {"results": results, "about": {"command": words, "commit": git_commit()} | about}
    print(json.dumps(found, indent=1))
    if out is not None:
        write_text(out, json.dumps(found | more, indent=1) + "\n")
