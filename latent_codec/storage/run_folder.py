"""Find the newest checkpoint of a training run, and the run's provenance."""

import logging
import re
from pathlib import Path
from typing import Any

from latent_codec.errors import UserError
from latent_codec.storage.files import sha256_of
from latent_codec.storage.json_config import loads
from latent_codec.storage.removal import holding
from latent_codec.version import __version__

log = logging.getLogger(__name__)

PRIOR_RUN_MODEL = "model.safetensors"
"""Name of the model file that `train.prior` writes into its run's folder."""


_CHECKPOINT = re.compile(r"step-\d{8}")
_HAS_TENSORS_ALONE = holding(r"\w+\.safetensors")


def checkpoints_in(folder: Path) -> list[Path]:
    """List the checkpoints in a folder by exact name and content: copies that a user keeps beside them are none."""
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted(path for path in found if is_checkpoint(path))


def is_checkpoint(path: Path) -> bool:
    """Return whether a path has the name of a checkpoint, and its record or no files but a checkpoint's."""
    return is_checkpoint_name(path.name) and ((path / "state.json").is_file() or _HAS_TENSORS_ALONE(path))


def is_checkpoint_name(name: str) -> bool:
    """Return whether a name is that of a checkpoint."""
    return _CHECKPOINT.fullmatch(name) is not None


def newest_checkpoint(run: Path) -> Path:
    """Return a run's newest checkpoint whose averaged weights match their checksum, warning of damaged ones.

    Raises `UserError` if there is none.
    """
    finished = checkpoints_in(run / "checkpoints")
    if finished and not (finished[-1] / "codec.safetensors").exists() and (finished[-1] / "prior.safetensors").exists():
        raise UserError(f"{run}: a run of train.prior that has not finished; repeat its command to resume it")
    for path in reversed(finished):
        try:
            expected = loads((path / "state.json").read_text(encoding="utf-8"))["sha256"]["ema.safetensors"]
            if sha256_of(path / "ema.safetensors") == expected:
                return path
        except (OSError, ValueError, KeyError, TypeError):
            pass
        log.warning("passing over damaged checkpoint %s", path)
    if finished:
        raise UserError(f"{run}: all {len(finished)} checkpoints are damaged; resume or repeat the run")
    raise UserError(f"{run}: no finished checkpoint in it; a run's first one appears after save_every steps")


def provenance(run: Path, checkpoint: Path) -> dict[str, Any]:
    """Return a run's config.json and a checkpoint's progress; raises `UserError` if they cannot be read."""
    try:
        state = loads((checkpoint / "state.json").read_text())
        about = loads((run / "config.json").read_text())
        if not (isinstance(about, dict) and about):
            raise ValueError("config.json is empty")
        progress = {key: state[key] for key in ("step", "skipped", "minutes")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{run}: config.json or state.json cannot be read ({error}); resume the run") from error
    return {"training": about, "progress": progress, "exported_by": f"latent_codec {__version__}"}
