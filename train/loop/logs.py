"""Log a run to a JSONL file, to trackers and to the screen."""

import json
import math
from pathlib import Path

from accelerate import Accelerator

from latent_codec.program import say
from latent_codec.storage.files import fsync, write_text


class RunLog:
    """Write log.jsonl on the main process. Lines of steps that a resumed run takes again are dropped when it starts, so
    that each step has one line; a line of step 0, of a run without steps, is always written again."""

    def __init__(self, path: Path, accelerator: Accelerator, step: int) -> None:
        self.path, self.accelerator = path, accelerator
        self._warned: set[str] = set()
        if accelerator.is_main_process and path.exists():
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
            kept = [line for line in lines if 0 < _step_of(line) <= step]
            write_text(path, "".join(line + "\n" for line in kept))
            self._warned = {found["name"] for found in map(json.loads, kept) if found.get("kind") == "warning"}

    def write(self, kind: str, step: int, values: dict[str, float]) -> None:
        """Write a line {"kind", "step", ...}; values that are not finite become null."""
        if not self.accelerator.is_main_process:
            return
        record = {k: float(f"{v:.6g}") if math.isfinite(v) else None for k, v in values.items()}
        with self.path.open("a") as file:
            file.write(json.dumps({"kind": kind, "step": step} | record) + "\n")
        self.accelerator.log({f"{kind}/{k}": v for k, v in values.items()}, step=step)
        text = "  ".join(f"{k} {v:.4g}" for k, v in values.items() if math.isfinite(v))
        say(f"{kind} {step}: {text}")

    def warn(self, name: str, step: int, text: str) -> None:
        """Write a line {"kind": "warning", "step", "name", "text"}, once for each name in a run."""
        if self.accelerator.is_main_process and name not in self._warned:
            self._warned.add(name)
            with self.path.open("a") as file:
                file.write(json.dumps({"kind": "warning", "step": step, "name": name, "text": text}) + "\n")
            say(f"warning {step}: {name}: {text}")

    def flush(self) -> None:
        """Force the log to the disk, where the checkpoint of the same step will be."""
        if self.path.exists():
            fsync(self.path)


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, RecursionError):  # a crash cut the line short, or left stray bytes
        return math.inf
