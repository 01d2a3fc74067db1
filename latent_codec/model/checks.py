"""Check that a model can do what a command asks of it; each check raises `UserError` if it cannot."""

from latent_codec.errors import UserError
from latent_codec.model.codec import Codec


def check_channels(codec: Codec) -> None:
    """Require a model of grey or of RGB images, the only ones that image files hold."""
    if (channels := codec.config.image_channels) not in (1, 3):
        raise UserError(
            f"the model takes images of {channels} channels; image files need a model of 1 (grey) or 3 (RGB)"
        )


def check_unconditional(codec: Codec, what: str) -> None:
    """Require a model that is not told each image's class, because `what` could not tell it."""
    if classes := codec.config.classes:
        raise UserError(f"the model needs each image's class, one of {len(classes)}, which {what} does not hold")


def check_gaussian(codec: Codec) -> None:
    """Require a model whose latents have a mean and a log-variance to store."""
    if (kind := codec.config.bottleneck.kind) != "gaussian":
        raise UserError(
            f"latents in safetensors are means and log-variances, which the {kind} bottleneck does not have; "
            "write .lc files"
        )


def check_prefix(codec: Codec, channels: int) -> None:
    """Require a model for which its first `channels` channels are a latent."""
    if channels not in (prefixes := codec.config.prefixes or (codec.config.latent_channels,)):
        choice = ", ".join(map(str, prefixes))
        raise UserError(f"{channels} channels are no latent of this model, which has latents of {choice}")
