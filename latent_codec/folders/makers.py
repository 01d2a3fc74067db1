"""Load the models that made files, found by what the files say of them."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from latent_codec.errors import UserError
from latent_codec.inference.load import load
from latent_codec.inference.options import ComputeOptions
from latent_codec.model.shipped import newest, resolve, shipped_names

if TYPE_CHECKING:
    from latent_codec.inference.runner import Runner
    from latent_codec.model.codec import Codec
    from latent_codec.prior.priors import PriorKind

DEFAULT = "photo"
"""The model that encodes unless another is given."""

T = TypeVar("T")


def runners_for(
    model: str | None,
    models: Path | None,
    wanted: Callable[[], set[T]],
    made_by: Callable[["Codec", T], bool],
    options: ComputeOptions,
) -> list["Runner"]:
    """Load the model of --model, or else those that made files with the ids `wanted`, as `load_makers` does."""
    if model is None:
        return load_makers(wanted(), made_by, models, options)
    if models is not None:
        raise UserError(f"--model {model} says which model it is; leave out --models {models}")
    return [load(model, options)]


def makes_streams(codec: "Codec", maker: tuple["PriorKind", bytes]) -> bool:
    """Return whether a codec writes streams of this kind of prior and stream id."""
    from latent_codec.bitstream.stream_codec import is_maker

    return is_maker(codec, *maker)


def has_id(codec: "Codec", model_id: str) -> bool:
    """Return whether a codec has this model id."""
    return codec.model_id == model_id


def load_makers(
    wanted: set[T], made_by: Callable[["Codec", T], bool], models: Path | None, options: ComputeOptions
) -> list["Runner"]:
    """Load the models that made files with the ids `wanted`, of those shipped and of the model files in `models`.

    `made_by` says whether a model makes files with an id. Without a maker of any, the default model is returned, whose
    readers refuse the files. Raises `UserError` if `models` is no folder, and as `load` does.
    """
    from latent_codec.model.codec import Codec

    found: list[Runner] = []
    for name in _candidates(models):
        if not wanted:
            break
        try:
            codec = Codec.load(name)
        except UserError:
            continue  # another file of that suffix, such as a shard of latents
        made = {one for one in wanted if made_by(codec, one)}
        if made:
            found.append(load(str(name), options))
            wanted = wanted - made
    return found or [load(DEFAULT, options)]


def _candidates(models: Path | None) -> list[str | Path]:
    """List the shipped models, the newest default first, then the files of a folder."""
    if models is not None and not models.is_dir():
        raise UserError(f"--models {models}: not a folder; give one that holds model files")
    first = newest(DEFAULT)
    shipped = sorted(shipped_names(), key=lambda name: name != first)
    return [*map(resolve, shipped), *(sorted(models.glob("*.safetensors")) if models is not None else [])]
