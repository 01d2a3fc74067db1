"""Checkpoints of a run: staged, verified, committed by one rename; only then is the oldest pruned.

RUN/checkpoints/step-00001000/ holds what is trained and its average (of a VAE codec.safetensors and ema.safetensors:
model files, loadable as they are), optimizer.safetensors and state.json with the SHA-256 of the other three and of its
own content. Nothing is pickled.
"""

import dataclasses
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file

from latent_codec.errors import UserError
from latent_codec.prior.priors import PREFIX
from latent_codec.storage import tensors as tensor_files
from latent_codec.storage.files import fsync, write_text
from latent_codec.storage.json_config import dumps

log = logging.getLogger(__name__)
_OPTIMIZER = "optimizer.safetensors"


class Saved(Protocol):
    """A module that writes itself as a file of its own kind."""

    def save(self, path: Path) -> None:
        """Write a safetensors file with the tensors of `state_dict` in float32."""
        ...

    def parameters(self) -> Iterator[torch.nn.Parameter]: ...
    def named_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]: ...
    def state_dict(self) -> dict[str, torch.Tensor]: ...
    def load_state_dict(self, tensors: Mapping[str, torch.Tensor], /) -> Any: ...


@dataclasses.dataclass
class Progress:
    """What a run has done; everything else follows from the step."""

    step: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    minutes: float = 0.0
    scaler: dict[str, Any] = dataclasses.field(default_factory=dict)


def save(
    folder: Path, modules: Mapping[str, Saved], optimizer: torch.optim.Optimizer, progress: Progress, *, keep: int
) -> Path:
    """Write a checkpoint into `folder` and prune all but the newest `keep`.

    `modules` by the names of their files; the first is what the optimizer trains, and it may train others beside it.
    Checkpoints of later steps go too: the run came back from an earlier one because they are damaged.
    """
    final = folder / f"step-{progress.step:08d}"
    staged = folder / f".{final.name}.tmp"
    for stale in folder.glob(".step-*.tmp"):
        shutil.rmtree(stale)
    staged.mkdir(parents=True)
    files = {name: f"{name}.safetensors" for name in modules}
    for name, module in modules.items():
        module.save(staged / files[name])
    trained = next(iter(modules))
    moments = optimizer_tensors(optimizer, _Together(modules))
    tensor_files.save_tensors(staged / _OPTIMIZER, moments, {"format": "pt"})
    hashes = {name: _sha256(staged / name) for name in (*files.values(), _OPTIMIZER)}
    state = dataclasses.asdict(progress) | {"sha256": hashes}
    write_text(staged / "state.json", dumps(state | {"state_sha256": _text_sha256(dumps(state))}))
    _verify(staged, files[trained], modules[trained].state_dict())
    _verify(staged, _OPTIMIZER, moments)
    _read_state(staged)
    fsync(staged)
    if final.exists():  # damaged, or of a run of no steps that is done again
        shutil.rmtree(final)
    os.rename(staged, final)  # noqa: PTH104 (tests stop the process here by name)
    fsync(folder)
    fsync(folder.parent)
    finished = _finished(folder)
    newest = finished.index(final) + 1
    for other in finished[: max(0, newest - keep)] + finished[newest:]:
        shutil.rmtree(other)
    return final


def restore(folder: Path, modules: Mapping[str, Saved], optimizer: torch.optim.Optimizer) -> Progress:
    """Load the newest sound checkpoint in place; a fresh `Progress` if there is none.

    Raises `UserError` if checkpoints exist but none is sound.
    """
    finished = _finished(folder)
    for path in reversed(finished):
        try:
            progress = _read_state(path)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            log.warning("passing over damaged checkpoint %s: %s", path, error)
            continue
        for name, module in modules.items():
            file = path / f"{name}.safetensors"
            tensors = {name: t for name, t in load_file(file).items() if not name.startswith(PREFIX)}
            tensor_files.check_state(module.state_dict(), tensors, str(file))
            module.load_state_dict(tensors)
        load_optimizer(optimizer, _Together(modules), load_file(path / _OPTIMIZER))
        return progress
    if finished:
        raise UserError(f"{folder}: all {len(finished)} checkpoints are damaged; start again with another --out")
    return Progress()


class _Together:
    """All that the optimizer may train, the first module's parameters by their own names."""

    def __init__(self, modules: Mapping[str, Saved]) -> None:
        self.modules = modules

    def named_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        for i, (prefix, module) in enumerate(self.modules.items()):
            for name, parameter in module.named_parameters():
                yield name if i == 0 else f"{prefix}.{name}", parameter


def _finished(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*"))


def _read_state(path: Path) -> Progress:
    state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    if state.pop("state_sha256") != _text_sha256(dumps(state)):
        raise ValueError("state.json does not match its checksum")
    for name, expected in state.pop("sha256").items():
        if _sha256(path / name) != expected:
            raise ValueError(f"{name} does not match its checksum")
    return Progress(**state)


def _text_sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _verify(staged: Path, file: str, written: dict[str, torch.Tensor]) -> None:
    """Read back what was written; a disk that lies is found before the older checkpoint is given up."""
    found = load_file(staged / file)
    for name, tensor in written.items():
        if not torch.equal(found[name], tensor.cpu()):
            raise OSError(f"{staged}: tensor {name} reads back differently from what was written; check the disk")


class Named(Protocol):
    def named_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]: ...


def optimizer_tensors(optimizer: torch.optim.Optimizer, module: Named) -> dict[str, torch.Tensor]:
    """Adam's moments by parameter name: `backbone.x.weight/exp_avg`."""
    names = {id(p): name for name, p in module.named_parameters()}
    return {
        f"{names[id(p)]}/{key}": value.detach().cpu().contiguous()
        for p, state in optimizer.state.items()
        for key, value in state.items()
    }


def load_optimizer(optimizer: torch.optim.Optimizer, module: Named, tensors: dict[str, torch.Tensor]) -> None:
    parameters = dict(module.named_parameters())
    for name, value in tensors.items():
        parameter, key = parameters[name.rpartition("/")[0]], name.rpartition("/")[2]
        if key != "step":  # a moment lies as its parameter does (device, channels_last)
            value = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
        elif optimizer.defaults.get("fused"):  # which counts where it computes; others count on the CPU
            value = value.to(parameter.device)
        optimizer.state[parameter][key] = value
