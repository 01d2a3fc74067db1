"""Save and restore checkpoints: staged, verified, committed by one rename, and only then are old ones removed.

RUN/checkpoints/step-00001000/ holds a safetensors file of each module (of a VAE codec.safetensors and ema.safetensors,
which are model files), optimizer.safetensors, and state.json with the SHA-256 of these files and of its own content.
Nothing is pickled.
"""

import dataclasses
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from latent_codec.errors import UserError
from latent_codec.prior.priors import PREFIX
from latent_codec.storage.files import fsync, sha256, sha256_of, write_text
from latent_codec.storage.json_config import dumps, loads
from latent_codec.storage.removal import check_replaceable, made_now, move, remove
from latent_codec.storage.run_folder import checkpoints_in, is_checkpoint, is_checkpoint_name
from latent_codec.storage.tensors import check_state, save_tensors

log = logging.getLogger(__name__)
_OPTIMIZER = "optimizer.safetensors"
_STALE = re.compile(r"\.step-\d{8}\.(tmp|old)")


@dataclasses.dataclass
class Progress:
    """Hold how far a run has come; everything else follows from the step."""

    step: int = 0
    skipped: int = 0
    """Steps left out because a number was not finite."""
    skipped_in_a_row: int = 0
    """The latest of them without another step in between."""
    minutes: float = 0.0
    """Training time."""
    scaler: dict[str, Any] = dataclasses.field(default_factory=dict)
    """State of the gradient scaler."""


def save(
    folder: Path, modules: Mapping[str, nn.Module], optimizer: torch.optim.Optimizer, progress: Progress, *, keep: int
) -> Path:
    """Write a checkpoint into `folder`, remove all but the newest `keep`, and return its path.

    Checkpoints of later steps are removed, too: a run only comes to an earlier step again if those are damaged.
    Raises `OSError` if a file reads back differently from what was written, and `UserError` if something else has the
    checkpoint's name.
    """
    final = folder / f"step-{progress.step:08d}"
    check_replaceable(final, is_checkpoint, "a checkpoint")
    staged = folder / f".{final.name}.tmp"
    for stale in folder.glob(".step-*"):
        remove(stale, lambda path: _STALE.fullmatch(path.name) is not None)
    staged.mkdir(parents=True)
    files = {name: f"{name}.safetensors" for name in modules}
    for name, module in modules.items():
        if hasattr(module, "save"):  # models have a file format of their own
            module.save(staged / files[name])  # pyright: ignore[reportCallIssue]
        else:
            _write(staged / files[name], module.state_dict())
    moments = _moments(optimizer, modules)
    _write(staged / _OPTIMIZER, moments)
    hashes = {name: sha256_of(staged / name) for name in (*files.values(), _OPTIMIZER)}
    state = dataclasses.asdict(progress) | {"sha256": hashes}
    write_text(staged / "state.json", dumps(state | {"state_sha256": sha256(dumps(state).encode())}))
    trained = next(iter(modules))
    _verify(staged, files[trained], modules[trained].state_dict())
    _verify(staged, _OPTIMIZER, moments)
    _read_progress(staged)
    fsync(staged)
    if final.exists():  # it is damaged, or the run has no steps and is done again
        _remove(final)
    move(staged, final)
    fsync(folder)
    fsync(folder.parent)
    finished = checkpoints_in(folder)
    newest = finished.index(final) + 1
    for other in finished[: max(0, newest - keep)] + finished[newest:]:
        _remove(other)
    return final


def _remove(checkpoint: Path) -> None:
    """Remove a checkpoint that is none any more from the first moment on, whenever the process is killed."""
    old = checkpoint.with_name(f".{checkpoint.name}.old")
    move(checkpoint, old)
    remove(old, made_now)


def restore(folder: Path, modules: Mapping[str, nn.Module], optimizer: torch.optim.Optimizer) -> Progress:
    """Load the newest sound checkpoint in place; return a fresh `Progress` if there is none.
    Raises `UserError` if checkpoints exist but all are damaged, or if something else has the name of one."""
    for path in folder.glob("step-*"):
        if is_checkpoint_name(path.name):  # found now, and not when the run comes to that step
            check_replaceable(path, is_checkpoint, "a checkpoint")
    finished = checkpoints_in(folder)
    for path in reversed(finished):
        try:
            progress = _read_progress(path)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            log.warning("passing over damaged checkpoint %s: %s", path, error)
            continue
        for name, module in modules.items():
            file = path / f"{name}.safetensors"
            tensors = {name: t for name, t in load_file(file).items() if not name.startswith(PREFIX)}
            check_state(module.state_dict(), tensors, str(file))
            module.load_state_dict(tensors)
        _load_moments(optimizer, modules, load_file(path / _OPTIMIZER))
        return progress
    if finished:
        raise UserError(f"{folder}: all {len(finished)} checkpoints are damaged; start again with another --out")
    return Progress()


def _write(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_tensors(path, {name: t.detach().cpu().contiguous() for name, t in tensors.items()}, {"format": "pt"})


def _read_progress(path: Path) -> Progress:
    state = loads((path / "state.json").read_text(encoding="utf-8"))
    if state.pop("state_sha256") != sha256(dumps(state).encode()):
        raise ValueError("state.json does not match its checksum")
    for name, expected in state.pop("sha256").items():
        if sha256_of(path / name) != expected:
            raise ValueError(f"{name} does not match its checksum")
    return Progress(**state)


def _verify(staged: Path, file: str, written: dict[str, torch.Tensor]) -> None:
    """Read a file back, so that a faulty disk is found before an older checkpoint is removed."""
    found = load_file(staged / file)
    for name, tensor in written.items():
        if not torch.equal(found[name], tensor.cpu()):
            raise OSError(f"{staged}: tensor {name} reads back differently from what was written; check the disk")


def _parameters(modules: Mapping[str, nn.Module]) -> dict[str, nn.Parameter]:
    """Return all parameters by name; names of the first module have no prefix."""
    return {
        name if i == 0 else f"{prefix}.{name}": parameter
        for i, (prefix, module) in enumerate(modules.items())
        for name, parameter in module.named_parameters()
    }


def _moments(optimizer: torch.optim.Optimizer, modules: Mapping[str, nn.Module]) -> dict[str, torch.Tensor]:
    """Return Adam's moments by parameter name, such as `backbone.x.weight/exp_avg`."""
    names = {id(parameter): name for name, parameter in _parameters(modules).items()}
    return {f"{names[id(p)]}/{key}": value for p, state in optimizer.state.items() for key, value in state.items()}


def _load_moments(
    optimizer: torch.optim.Optimizer, modules: Mapping[str, nn.Module], tensors: dict[str, torch.Tensor]
) -> None:
    parameters = _parameters(modules)
    for name, value in tensors.items():
        parameter, key = parameters[name.rpartition("/")[0]], name.rpartition("/")[2]
        if key != "step":  # a moment has its parameter's device and memory format
            value = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
        elif optimizer.defaults.get("fused"):  # a fused Adam counts on the device, others on the CPU
            value = value.to(parameter.device)
        optimizer.state[parameter][key] = value
