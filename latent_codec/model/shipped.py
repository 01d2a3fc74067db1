"""Find the models that come with the package."""

from pathlib import Path

from latent_codec.errors import UserError

_SHIPPED = tuple(parent / "checkpoints" for parent in Path(__file__).parents[1:3])


def resolve(source: str | Path) -> Path:
    """The file of a model given by path or by a shipped model's name; raises `UserError` if there is neither.

    A folder that happens to be called like a shipped model does not hide it.
    """
    path = Path(source)
    if path.is_file():
        return path
    for folder in _SHIPPED:
        if (folder / f"{path}.safetensors").is_file():
            return folder / f"{path}.safetensors"
    raise UserError(f"{source}: neither a file nor a shipped model; shipped are: {', '.join(shipped()) or 'none'}")


def shipped() -> list[str]:
    """Names of the models that come with the package."""
    return sorted({file.stem for folder in _SHIPPED for file in folder.glob("*.safetensors")})
