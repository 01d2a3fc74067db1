"""Read and compare what training leaves in its folder: checkpoints and lines of the log."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file


def checkpoint(out: Path, step: int) -> Path:
    return out / "checkpoints" / f"step-{step:08d}"


def tensors(out: Path, step: int) -> dict[str, torch.Tensor]:
    """Read all tensors of a checkpoint by file and name."""
    files = sorted(checkpoint(out, step).glob("*.safetensors"))
    assert len(files) >= 3
    return {f"{file.stem}/{name}": value for file in files for name, value in load_file(file).items()}


def assert_same_tensors(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def assert_close_runs(
    one: Path, other: Path, steps: int, relative: float, absolute: float = 0.0, compared: Callable[[str], bool] = bool
) -> None:
    """Compare checkpoints, or some of their tensors by name; differences are relative for Adam's moments alone.

    Moments matter, because Adam itself forgives a wrong scale.
    """
    for step in range(1, steps + 1):
        a, b = tensors(one, step), tensors(other, step)
        assert a.keys() == b.keys()
        for name in filter(compared, a):
            scale = float(b[name].abs().max()) if name.startswith("optimizer/") else 1.0
            assert float((a[name] - b[name]).abs().max()) <= relative * scale + absolute, (step, name)


def log_lines(out: Path, kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]
