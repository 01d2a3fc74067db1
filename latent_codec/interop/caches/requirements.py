"""What a consumer cannot do without."""

from latent_codec.errors import UserError
from latent_codec.latents.dataset import Latents


def need_flips(latents: Latents, name: str) -> None:
    """Raise `UserError` if the mirrored images' latents are not there."""
    if not latents.header.flips:
        raise UserError(f"{latents.folder}: {name} needs latents of mirrored images too; encode with --flips")


def need_labels(latents: Latents, name: str) -> None:
    """Raise `UserError` if an image has no class."""
    if without := [entry.path for entry in latents.entries if entry.label is None]:
        raise UserError(
            f"{latents.folder}: {name} needs a class for each image, and {without[0]} is in no folder ({len(without)} "
            "such images); put the images of each class into a folder of its own and encode again"
        )


def need_one_size(latents: Latents, name: str) -> tuple[int, int]:
    """Height and width of all latents; raises `UserError` if they are not all of one size."""
    shapes = latents.shapes
    first = {shape: entry.path for shape, entry in zip(reversed(shapes), reversed(latents.entries), strict=True)}
    if len(first) > 1:
        (one, path), (other, other_path) = list(first.items())[:2]
        raise UserError(
            f"{latents.folder}: {name} takes latents of one size, and {path} has {one[0]}x{one[1]}, {other_path} "
            f"{other[0]}x{other[1]} ({len(first)} sizes in all); encode images of one size"
        )
    return shapes[0]
